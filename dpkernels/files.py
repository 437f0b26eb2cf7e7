"""Atomic writes: after a crash a file holds either its old or its new content. A write that fails says why."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dpkernels.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the system's numbers of a full disk
_FIXES = {
    NO_ROOM: "make room there (`df` says how much is free)",
    (errno.EROFS, errno.EACCES, errno.EPERM): "make it writable, or give another place",
}


class WriteError(UserError, OSError):
    """A file cannot be written: the disk is full, the folder is read-only or was removed, or the disk fails."""


def unwritten(path: str | os.PathLike[str], error: OSError) -> str:
    """A sentence without its end: what cannot be written, why, and the fix where one is known."""
    fix = next((fix for numbers, fix in _FIXES.items() if error.errno in numbers), "check the disk")
    return f"{os.fspath(path)} cannot be written ({error.strerror or error}): {fix}"


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within it, a failed write of `path` is a WriteError, whose message has the reason and the fix.

    Args:
        path: the file or folder that is written.

    Raises:
        WriteError: in place of an OSError; errors that have a message for the user are left as they are.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's writer of archives meets the disk's error, and then raises one of its own about the archive's end
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, UserError) or not isinstance(reason, OSError):
            raise
        raise WriteError(unwritten(path, reason)) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, mode: int | None = None) -> None:
    """Write a file through a temporary neighbour: fsync, rename, fsync of the folder.

    Args:
        path: the file.
        write: writes its content to an open file.
        mode: its mode, before anything is written to it; None: what the umask leaves.

    Raises:
        WriteError: the file cannot be written; it holds what it held before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary neighbours of `path` that killed processes left. No other process may be writing it."""
    for temporary in path.parent.glob(f".{path.name}.*"):
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
