"""A run directory: created once, locked by one process at a time, never written through a link."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import signal
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from collm.errors import ConfigError, RunError
from collm.runs.files import explained, is_leftover, refuse_links, sweep, write_text
from collm.runs.output import complain
from collm.settings import former
from collm.settings.load import apply_overrides, parse_config
from collm.settings.rooms import Config

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
EXAMPLES = "examples.jsonl"
"""Worked examples of a run, in its directory and in exported folders."""
EMPTY = frozenset({"lock", CHECKPOINTS})
"""Names that a folder may hold before a run begins in it; a start that was killed leaves them."""
_EPISODES = re.compile("([0-9]{6,})(-evaluation)?[.]jsonl")
RESUMABLE = ("run.iterations", "run.device", "run.threads", "run.trackers", "cluster.")
"""Settings, or prefixes of settings, that may change when a run is resumed."""
CHANGEABLE = ("env.", "evaluation.", "rollout.", "run.threads", "run.device", "run.seed", "team.compute", "team.api_key_env")
"""Settings, or prefixes of settings, that may change when a trained run is evaluated."""
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class _Run(TypedDict):
    iterations: int
    seed: NotRequired[int]


class _Env(TypedDict):
    name: str


class _Algorithm(TypedDict):
    name: str
    group_size: NotRequired[int]


class _Settings(TypedDict):
    """The settings that every reader of a run needs."""

    run: _Run
    env: _Env
    algorithm: _Algorithm


_SETTINGS: TypeAdapter[Any] = TypeAdapter(_Settings)


def command(*words: object) -> str:
    """A command line that can be pasted into a shell."""
    return shlex.join(str(word) for word in words)


def begin(folder: Path, config: Config) -> None:
    """Create a run directory and write its settings; a folder without them does not count as a run.

    Raises RunError where the folder holds a run or other files, SaveError where it cannot be written.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in folder.iterdir() if not is_leftover(path.name)}
    if CONFIG in found or checkpoints(folder):
        raise RunError(
            f"run {str(folder)!r} exists already. Continue it with `{command('collm', 'train', '--resume', folder)}`, or give "
            "this one another name: --run.name NAME."
        )
    if found - EMPTY:
        raise RunError(
            f"{str(folder)!r} is not empty and is not a run directory: it holds {min(found - EMPTY)!r}. Give the run another "
            "name: --run.name NAME."
        )
    refuse_links(folder)
    sweep(folder)
    write_config(folder, config)


def write_config(folder: Path, config: Config) -> None:
    write_text(folder / CONFIG, json.dumps(config.resolved(), indent=1))


def read_config(folder: Path) -> Config:
    """The settings of a run. Raises RunError where there is none."""
    return parse_config(read_settings(folder))


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run as plain values, under their present names. Raises RunError where there are none, or they are
    damaged."""
    return former.translate(_settings_file(folder))


def _settings_file(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise RunError(f"{str(folder)!r} is not a run directory: the folder does not exist.")
    if not folder.is_dir():
        raise RunError(f"{str(folder)!r} is not a run directory: it is not a folder.")
    path = folder / CONFIG
    if not os.path.lexists(path):
        raise RunError(
            f"{str(folder)!r} is not a run directory: it holds no {CONFIG}, so no run has begun there. Start one with "
            "`collm train RECIPE`."
        )
    content = read_file(path)
    try:
        values = json.loads(content)
        _SETTINGS.validate_python(values, strict=True)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{str(path)!r} cannot be read: {damage(error)}. Restore it, or train the run anew.") from error
    return dict(values)


def read_file(path: Path) -> bytes:
    """The content of a regular file of a run. Raises RunError, also for a pipe, whose reading might never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise RunError(f"{str(path)!r} cannot be read: it is not a file.")
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{str(path)!r} cannot be read: {error.strerror}.") from error


def damage(error: Exception) -> str:
    """The reason why a file's content is invalid, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        said = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        return f"it lacks {place!r}" if first["type"] == "missing" else f"{place!r}: {said}" if place else said
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


CODE = ("algorithm.baseline", "critic.metrics")
"""Settings of training that may name a "module:function"."""


def check_named(folder: Path, values: Mapping[str, Any], named: Mapping[str, Any], *, training: bool = False) -> None:
    """Raise RunError where a run's settings name code or a secret of this machine that the command line (`named`, "room.key" ->
    value) does not repeat, since a run directory can come from an untrusted source. training: the settings in `CODE` are used,
    too."""
    for setting in CODE if training else ():
        room, _, name = setting.partition(".")
        table = values.get(room)
        code = str(table.get(name, "")) if isinstance(table, dict) else ""
        if ":" in code and named.get(setting) != code:
            raise RunError(
                f"run {str(folder)!r} trains with {setting}={code!r}, which is not built in: it is Python code, and a run "
                f"folder may come from elsewhere. If you trust it, name it again: --{setting} {code}"
            )
    name = str(values["env"]["name"])
    if ":" in name and "env.name" not in named:
        raise RunError(
            f"run {str(folder)!r} plays the environment {name!r}, which is not built in: it is Python code, and a run folder "
            f"may come from elsewhere. If you trust it, name it again: --env.name {name}"
        )
    cluster = values.get("cluster")
    address = str(cluster.get("address", "")) if training and isinstance(cluster, dict) else ""
    if ":" in address and "cluster.address" not in named:
        raise RunError(
            f"run {str(folder)!r} was trained on the Ray cluster at {address}, which can run code in this process. If you "
            f"trust it, name it again: --cluster.address {address}; otherwise another one, or 'none' for this process alone."
        )
    team = values.get("team")
    key = team.get("api_key_env") if isinstance(team, dict) else None
    if key and named.get("team.api_key_env") != key:
        raise RunError(
            f"run {str(folder)!r} sends the API key in the environment variable {key!r} to servers that it names itself. If "
            f"you trust them, name the variable again: --team.api_key_env {key}"
        )


def resumed_config(folder: Path, overrides: Mapping[str, Any]) -> Config:
    """The settings with which a run is resumed.

    Raises ConfigError where an override is not in `RESUMABLE`, or where the run began with settings that no longer exist.
    """
    for name in overrides:
        if not name.startswith(RESUMABLE):
            raise ConfigError(
                f"{name!r} cannot change when a run is resumed: these can: {', '.join(RESUMABLE)}*. Start a new run for other "
                "settings: collm train RECIPE --run.name NAME."
            )
    kept = _settings_file(folder)
    if gone := former.lost(kept):
        raise ConfigError(
            f"run {str(folder)!r} began with {', '.join(gone)}, which this version of collm does not have: it would not go on "
            "exactly. Continue with the version that began it, or start a new run from the models in its folder final."
        )
    values = former.translate(kept)
    apply_overrides(values, overrides)
    return parse_config(values)


def run_config(folder: Path, overrides: Mapping[str, Any], *, playing: bool = True) -> Config:
    """A run's settings with `{"room.key": value}` on top. Raises RunError or ConfigError.

    The examples are those that the run recorded. playing: the run's environment and servers will be used; those that are not
    built in must be repeated in `overrides`.
    """
    values = read_settings(folder)
    if playing:
        check_named(folder, values, overrides)
    for key in overrides:
        if not key.startswith(CHANGEABLE):
            raise ConfigError(
                f"{key!r} is not a setting that the evaluation of a trained run can change: these are env.*, evaluation.*, "
                "rollout.*, run.threads, run.device, run.seed, team.compute and team.api_key_env."
            )
    values.pop("cluster", None)  # a trained team is evaluated in one process
    if (folder / EXAMPLES).is_file():
        apply_overrides(values, {"rollout.examples": str(folder / EXAMPLES)})
    apply_overrides(values, overrides)
    return parse_config(values)


def episode_files(folder: Path, *, evaluation: bool) -> dict[int, Path]:
    """Iteration -> its file of episodes, in order; other files are ignored."""
    places = (folder / "episodes").iterdir() if (folder / "episodes").is_dir() else ()
    named = [(_EPISODES.fullmatch(path.name), path) for path in places]
    return dict(sorted((int(name[1]), path) for name, path in named if name and bool(name[2]) == evaluation))


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    places = (folder / CHECKPOINTS).iterdir() if (folder / CHECKPOINTS).is_dir() else ()
    return sorted(path for path in places if re.fullmatch("[0-9]{6,}", path.name) and path.is_dir())


def with_absolute_data(options: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Environment options with the paths of data files made absolute, so that a run continues from any folder."""
    found = dict(options)
    for name, value in options.items():
        if name in ("data", "eval_data") and isinstance(value, str):
            parts = re.fullmatch(r"(.+?)((?:\[-?\d*:-?\d*\])?)", value, re.DOTALL)
            if parts and not value.startswith("hf:") and (root / parts[1]).is_file():
                found[name] = f"{(root / parts[1]).absolute()}{parts[2]}"
    return found


def ignored(signum: int) -> bool:
    """Whether the parent process made this process ignore a signal, as nohup does with SIGHUP."""
    return signum == signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN


def hold(handle: int, what: str, *, wait: bool = False) -> None:
    """Lock an open file until it is closed. On a file system without locks a warning is printed instead.

    Raises RunError where another process holds it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise RunError(f"run {what!r} is being trained by another process; wait for it or stop it.") from error
        if error.errno not in NO_LOCKS:
            raise RunError(f"run {what!r} cannot be locked: {error.strerror}.") from error
        complain(
            f"collm: the file system of {what!r} has no locks ({error.strerror}); make sure that no other process works there."
        )


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run directory: one process at a time. On a file system without locks a warning is printed instead."""
    refuse_links(folder)
    with explained(folder / "lock"):
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        hold(handle, str(folder))
        sweep(folder)
        yield
    finally:
        os.close(handle)
