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


def same_audio(utterances: Sequence[Utterance]) -> list[Hashable]:
    """For each utterance a label of its file or bytes; two labels are equal if and only if all their bytes are.

    Args:
        utterances: each with a `path`, or with the `digest` of its bytes.

    Raises:
        OSError: a file can no longer be read.
    """
    files = {_source(item): item for item in utterances}  # of a file of many pieces, one utterance
    alike: dict[Hashable, Hashable] = dict.fromkeys(files)  # equal where the compared parts are equal
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for part in _PARTS:
            counts = Counter(alike.values())
            left = [source for source, label in alike.items() if counts[label] > 1]
            for source, value in zip(
                left, threads.map(part, [files[source] for source in left]), strict=True
            ):
                alike[source] = (alike[source], value)
    return [alike[_source(item)] for item in utterances]


def _source(item: Utterance) -> Hashable:
    return item.path if item.path is not None else item.digest


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
