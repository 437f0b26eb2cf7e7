"""Recordings that are listed more than once, found by comparing their stored audio byte for byte.

Sizes are compared first, then a piece from the middle of files of equal size, and whole files only if those pieces are
equal: few FLAC files are read, and 16 KiB of each WAV file.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from asr_finetune.data.utterance import Utterance

_PIECE = 16 * 1024  # bytes: past headers and the silence that recordings begin with


def same_audio(utterances: Sequence[Utterance]) -> list[Hashable]:
    """For each utterance a label of its file or bytes; two labels are equal if and only if all their bytes are.

    Args:
        utterances: each with a `path`, or with the `digest` of its bytes.

    Raises:
        OSError: a file can no longer be read.
    """
    alike: dict[Path, Hashable] = {}  # equal for files whose compared parts are equal
    alike |= dict.fromkeys(item.path for item in utterances if item.path is not None)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        if any(item.path is None for item in utterances):  # of bytes elsewhere only the digest is at hand
            alike = dict(zip(alike, threads.map(_whole, alike), strict=True))
        else:
            for part in _PARTS:
                counts = Counter(alike.values())
                left = [path for path, label in alike.items() if counts[label] > 1]
                for path, value in zip(left, threads.map(part, left), strict=True):
                    alike[path] = (alike[path], value)
    return [item.digest if item.path is None else alike[item.path] for item in utterances]


def _size(path: Path) -> Hashable:
    return path.stat().st_size


def _middle(path: Path) -> Hashable:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _PIECE, 0) // 2)
        return file.read(_PIECE)


def _whole(path: Path) -> Hashable:
    return digest(path.read_bytes())


_PARTS: tuple[Callable[[Path], Hashable], ...] = (_size, _middle, _whole)


def digest(content: bytes) -> bytes:
    """SHA-256 of a recording's bytes, for comparing recordings."""
    return hashlib.sha256(content).digest()
