"""Speakers that are clipped as speakers: micro-batches of whole speakers, and the number of examples of each.

The examples of a speaker are clipped together, as one gradient, if they stand in one micro-batch, one after the other.
All speakers of a micro-batch have the same number of examples there, so that the tensors of their examples, [B, T, *],
are those of the speakers, [B/n, n·T, *], without a copy and without padding. A speaker who has fewer examples than the
others goes into another micro-batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from dpkernels.privacy.ranks.pieces import share


class Units:
    """The speaker of each example of a data set.

    Args:
        speakers: an id for each example, from `plan.speaker_ids`.
    """

    def __init__(self, speakers: Sequence[Hashable]) -> None:
        known: dict[Hashable, int] = {}
        self._of = np.array([known.setdefault(speaker, len(known)) for speaker in speakers], dtype=np.int64)

    def groups(self, indices: np.ndarray) -> list[np.ndarray]:
        """The examples of each speaker among these, in the order of the examples."""
        if not len(indices):
            return []
        order = np.argsort(self._of[indices], kind="stable")
        ordered = indices[order]
        starts = np.flatnonzero(np.diff(self._of[ordered])) + 1
        return sorted(np.split(ordered, starts), key=lambda group: int(group[0]))

    def share(self, indices: np.ndarray, lengths: np.ndarray | None, ranks: int) -> list[np.ndarray]:
        """The examples of each rank: all of a speaker go to one."""
        groups = self.groups(indices)
        weights = [float(len(group) if lengths is None else lengths[group].sum()) for group in groups]
        empty = np.empty(0, dtype=np.int64)
        return [
            np.concatenate([groups[place] for place in places]) if places else empty
            for places in share(weights, ranks)
        ]

    def micro_batches(
        self,
        indices: np.ndarray,
        physical_batch_size: int,
        lengths: np.ndarray | None = None,
        max_padded_frames: int | None = None,
    ) -> list[list[int]]:
        """Split a logical batch into micro-batches of whole speakers with equally many examples.

        As `logical_batch.micro_batches`: at most `physical_batch_size` examples and `max_padded_frames` frames, but at
        least one speaker; similar lengths together, the longest first. Without lengths the speakers with the most
        examples come first.
        """
        groups = self.groups(indices)

        def longest(group: np.ndarray) -> float:
            return 0.0 if lengths is None else float(lengths[group].max())

        groups.sort(key=lambda group: (len(group), longest(group)), reverse=True)
        parts: list[list[int]] = []
        start = 0
        while start < len(groups):
            size = len(groups[start])
            room = physical_batch_size
            if lengths is not None and max_padded_frames is not None:
                room = min(room, max_padded_frames // max(math.ceil(longest(groups[start])), 1))
            end = start + max(1, room // size)
            chosen = [group for group in groups[start:end] if len(group) == size]
            parts.append([int(index) for group in chosen for index in group])
            start += len(chosen)
        return parts if lengths is None else sorted(parts, key=lambda part: -float(lengths[part].max()))

    def drawn(self, parts: Sequence[Sequence[int]]) -> Counter[int]:
        """The number of examples of each speaker in a logical batch of these micro-batches."""
        return Counter(int(self._of[index]) for part in parts for index in part)

    def size_of(self, part: Sequence[int], drawn: Mapping[int, int]) -> int:
        """The number of examples of each speaker in a micro-batch of these examples; 1 for none.

        Args:
            part: examples in the order of the rows.
            drawn: of the logical batch.

        Raises:
            ValueError: not all drawn examples of a speaker are in the part, one after the other, or the speakers have
                different numbers of them.
        """
        if not len(part):
            return 1
        speakers = self._of[list(part)]
        starts = [0, *(np.flatnonzero(np.diff(speakers)) + 1), len(part)]
        runs = [int(end - first) for first, end in pairwise(starts)]
        whole = [drawn[int(speakers[first])] for first in starts[:-1]]
        if runs != whole or len(set(runs)) > 1:
            raise ValueError(
                "a micro-batch must hold all examples of each of its speakers, one after the other, and equally many "
                "of each: they are clipped together. Take the parts of logical_batch.parts as they are, or cut them "
                "between speakers"
            )
        return runs[0]
