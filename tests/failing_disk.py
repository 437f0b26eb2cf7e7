"""A disk that fails, for tests: it is full, or read-only, from a file on; or it takes so many bytes of a file."""

from __future__ import annotations

import builtins
import errno
import io
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def make_unwritable(patch: pytest.MonkeyPatch, name: str, *, full: bool) -> None:
    """From now on no file whose name contains `name` can be written: each is /dev/full, or on a read-only disk."""
    original = io.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        named = Path(os.fsdecode(file)).name if not isinstance(file, int) else ""
        if name in named and mode.strip("b") in ("w", "a"):
            if not full:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(file))
            file = "/dev/full"
        return original(file, mode, *arguments, **options)

    patch.setattr(io, "open", opened)
    patch.setattr(builtins, "open", opened)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within it the system writes no file beyond `size` bytes, as at the end of a disk: what fits is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
