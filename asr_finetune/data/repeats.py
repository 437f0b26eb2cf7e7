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

from asr_finetune.data.utterance import Utterance

_PIECE = 16 * 1024  # bytes: past headers and the silence that recordings begin with


def first_listed(utterances: Sequence[Utterance]) -> list[int]:
    """For each utterance, the place of the first one whose audio has the same bytes; its own if it is no repeat.

    Args:
        utterances: each with a `path`, or with the `digest` of its bytes.

    Raises:
        OSError: a file can no longer be read.
    """
    alike: list[Hashable] = [None] * len(utterances)  # equal for utterances whose compared parts are equal
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
    """SHA-256 of a recording's bytes, for comparing recordings."""
    return hashlib.sha256(content).digest()
