"""Atomic writing of files: a file is written under another name, flushed and renamed.

A reader finds the old file or the new one, complete, at whatever time the writer is killed. Leftovers of a killed writer begin
with `.saving-` or `.removing-`; `sweep` removes them, and readers ignore them. Files get the permissions of the umask. Nothing
is written or removed through a symbolic link inside a run directory.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from collm.errors import RunError, SaveError
from collm.types import encodable

SAVING, REMOVING = ".saving-", ".removing-"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Convert a failure to write `path` into a SaveError with the reason and the way out."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SaveError(f"cannot write {path}: {reason}. Nothing saved before is damaged: {_way_out(error)}") from error


def _way_out(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room and start again; a run continues with `collm train --resume RUN`."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "mend the folder's permissions, or choose a folder that can be written, and start again."
    if error.errno == errno.ELOOP:
        return "it is a symbolic link; name the file itself."
    if error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return "choose another name or folder."
    return "mend this and start again; a run continues with `collm train --resume RUN`."


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` for a new file or folder. On success it replaces `path`; on failure it is removed.

    Raises SaveError where the disk or the permissions do not allow it.
    """
    aside = path.with_name(f"{SAVING}{path.name}")
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(aside)
            yield aside
            _settle(aside)
            if path.is_dir() and not path.is_symlink():
                doomed = path.with_name(f"{REMOVING}{path.name}")
                remove(doomed)
                os.rename(path, doomed)
                try:
                    os.rename(aside, path)
                except OSError:
                    os.rename(doomed, path)
                    raise
                remove(doomed)
            else:
                os.replace(aside, path)
            _flush(path.parent)
    except BaseException:
        remove(aside)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically. Raises SaveError."""
    with replacing(path) as aside:
        aside.write_text(encodable(text), encoding="utf-8", newline="\n")


def append(path: Path, text: str) -> None:
    """Append text to a file in one write, never through a link and without waiting for the reader of a pipe.

    Raises SaveError.
    """
    with explained(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            os.write(handle, encodable(text).encode())
        finally:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Remove leftovers of a killed writer from a folder and its subfolders."""
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if is_leftover(name):
                remove(Path(place) / name)
        folders[:] = [name for name in folders if not is_leftover(name)]


def is_leftover(name: str) -> bool:
    return name.startswith((SAVING, REMOVING))


def remove(path: Path) -> None:
    """Remove a file, a folder or a link (not its target), if it exists and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def refuse_links(folder: Path) -> None:
    """Raise RunError for a symbolic link anywhere inside a folder, since writing there could change a file elsewhere."""
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place) / name
            if path.is_symlink():
                raise RunError(
                    f"{str(path)!r} is a symbolic link, and nothing is written through a link inside a run directory: it could "
                    "change files elsewhere. Remove it, or continue a copy without links (cp -rL)."
                )


def _settle(path: Path) -> None:
    """Flush a file, or a folder with all its files, to the disk, and set the permissions of the umask."""
    if not path.is_dir():  # opened by this package, so the umask is honoured; libraries write into folders
        _flush(path)
        return
    mode = path.stat().st_mode & 0o777  # mkdir honours the umask
    for place, _, files in os.walk(path):
        for name in files:
            file = Path(place) / name
            os.chmod(file, mode & 0o666)
            _flush(file)
        _flush(Path(place))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot flush a folder
            raise
    finally:
        os.close(handle)
