"""Recordings that are listed more than once: their audio is compared as it is stored, byte for byte.

Sizes come first, then a piece from the middle of files of one size, and whole files only where that is equal too: a
corpus of FLAC files is hardly read, one of WAV files at 16 KiB a file.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asr_finetune.data.corpus import Utterance

_PIECE = 16 * 1024  # bytes: past headers and the silence that recordings begin with


def first_listed(utterances: Sequence[Utterance]) -> list[int]:
    """For each utterance the place of the first one whose audio has the same bytes: its own, where it is no repeat.

    Args:
        utterances: each with a `path`, or with the `digest` of its bytes.

    Raises:
        OSError: a file can no longer be read.
    """
    alike: list[Hashable] = [None] * len(utterances)  # equal for what has been the same so far
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for part in _PARTS:
            counts = Counter(alike)
            places = [place for place, label in enumerate(alike) if counts[label] > 1]
            for place, value in zip(
                places, threads.map(part, [utterances[place] for place in places]), strict=True
            ):
                alike[place] = (alike[place], value)
    first: dict[Hashable, int] = {}
    return [first.setdefault(label, place) for place, label in enumerate(alike)]


def _size(item: Utterance) -> Hashable:
    return os.stat(item.path).st_size if item.path is not None else item.digest


def _middle(item: Utterance) -> bytes:
    if item.path is None:
        return b""
    with item.path.open("rb") as file:
        file.seek(max(item.path.stat().st_size - _PIECE, 0) // 2)
        return file.read(_PIECE)


def _whole(item: Utterance) -> bytes | None:
    return digest(item.path.read_bytes()) if item.path is not None else item.digest


_PARTS: tuple[Callable[[Utterance], Hashable], ...] = (_size, _middle, _whole)


def digest(content: bytes) -> bytes:
    """SHA-256 of a recording's bytes, by which they are compared."""
    return hashlib.sha256(content).digest()
