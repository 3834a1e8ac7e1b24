"""Errors, named after the boundary that was crossed.

`ConfigError`, `EnvError`, `EngineError` and `SandboxError` say who broke which promise: the settings, a world, an engine,
or the box that model-written code runs in. `RunError` is about the run directory: a missing checkpoint, a taken name, a
full disk. `TrainingError` stops a run whose numbers are no longer numbers. The command line prints the message alone.
"""

from __future__ import annotations


class CollmError(Exception):
    """An error that a person can act on: its message names the setting or thing, the reason and the way out."""

    exit_code = 2


class ConfigError(CollmError):
    """A setting is unknown, out of range, or contradicts another."""


class EnvError(CollmError):
    """An environment broke its contract, or could not be made. Inside an episode it fails that episode only."""


class EngineError(CollmError):
    """An engine could not answer. Inside an episode it fails that episode only."""


class SandboxError(CollmError):
    """Model-written code cannot be isolated on this machine."""


class RunError(CollmError):
    """A run directory is taken, locked, damaged or missing."""


class SaveError(RunError):
    """Writing to the run directory failed, for example because the disk is full. What was saved before is intact."""

    exit_code = 1


class TrainingError(CollmError):
    """A loss, a gradient or a value stopped being finite."""

    exit_code = 1
