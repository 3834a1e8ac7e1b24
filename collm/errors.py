"""Errors, one class per component that can fail.

`ConfigError`: the settings. `EnvError`: an environment. `EngineError`: an engine. `SandboxError`: the box that model-written
code runs in. `RunError`: the run directory, for example a missing checkpoint, a taken name or a full disk. `TrainingError`:
a number in training that is not finite. `PartLost`: a process of a cluster that held a part of the team. The command line
prints the message without a traceback.
"""

from __future__ import annotations


class CollmError(Exception):
    """An error that the user can act on: its message names the setting or object, the reason and the way out."""

    exit_code = 2


class ConfigError(CollmError):
    """A setting is unknown, out of range, or contradicts another."""


class EnvError(CollmError):
    """An environment violated its contract or could not be created. In an episode it fails that episode only."""


class EngineError(CollmError):
    """An engine could not answer. In an episode it fails that episode only."""


class SandboxError(CollmError):
    """Model-written code cannot be isolated on this machine."""


class RunError(CollmError):
    """A run directory is taken, locked, damaged or missing."""


class SaveError(RunError):
    """Writing to the run directory failed, for example because the disk is full. What was saved before is intact."""

    exit_code = 1


class TrainingError(CollmError):
    """A loss, a gradient or a value is not finite."""

    exit_code = 1


class PartLost(CollmError):
    """A process of a cluster that held a part of the team has died. The run continues from its last checkpoint."""

    exit_code = 1
