"""What the ranks send one another in a step: sums to their owners, and what the owners made of them to all."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpkernels.privacy.ranks.group import Ranks, RanksError
from dpkernels.privacy.ranks.pieces import Piece

STAGED_BYTES = 2**26
"""Size of the buffer that a collective works on: 8 bytes for each entry of all ranks."""


@dataclass(frozen=True)
class _Slice:
    """Entries start to stop - 1 of the tensor at `place`, and where they stand in the owner's row of the buffer."""

    place: int
    start: int
    stop: int
    offset: int

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[self.place].detach().view(-1)[self.start : self.stop]

    def within(self, row: Tensor) -> Tensor:
        return row[self.offset : self.offset + self.stop - self.start]


class Exchange:
    """Reduce-scatter and all-gather over the owners' pieces, in rounds of a buffer of bounded size.

    A rank sends 8 bytes for every trained entry (float64 sums) and gets back the parameter's bytes for every entry.

    Args:
        ranks: the processes.
        owned: the pieces of each rank.
    """

    def __init__(self, ranks: Ranks, owned: Sequence[Sequence[Piece]]) -> None:
        self._ranks = ranks
        self._owned = owned
        self._row = row_of(owned)
        self._rounds = list(_rounds(owned, self._row))

    def sums_to_owners(self, sums: Sequence[Tensor]) -> None:
        """Add each rank's sums up. Afterwards the owner's pieces of `sums` hold the totals, and all other entries 0.

        sums: float64, contiguous, of the trained parameters' shapes and in their order.
        """
        if self._ranks.size == 1:
            return
        rank, size = self._ranks.rank, self._ranks.size
        for device, places in _by_device(sums):
            buffer = torch.empty(size, self._row, dtype=torch.float64, device=device)
            total = torch.empty(self._row, dtype=torch.float64, device=device)
            for rows in self._rounds:
                buffer.zero_()
                for row, slices in zip(buffer, rows, strict=True):
                    for piece in _within(slices, places):
                        source = piece.of(sums)
                        piece.within(row).copy_(source)
                        source.zero_()
                self._collective(_REDUCE_SCATTER, total, buffer.view(-1))
                for piece in _within(rows[rank], places):
                    piece.of(sums).copy_(piece.within(total))

    def to_all(self, tensors: Sequence[Tensor]) -> None:
        """Copy each owner's pieces of `tensors` to all ranks.

        tensors: contiguous, of the trained parameters' shapes and in their order; of any dtypes.
        """
        if self._ranks.size == 1:
            return
        rank, size = self._ranks.rank, self._ranks.size
        for device, dtype, places in _by_device_and_dtype(tensors):
            buffer = torch.empty(size, self._row, dtype=dtype, device=device)
            mine = torch.zeros(self._row, dtype=dtype, device=device)
            for rows in self._rounds:
                for piece in _within(rows[rank], places):
                    piece.within(mine).copy_(piece.of(tensors))
                self._collective(ALL_GATHER, buffer.view(-1), mine)
                for other, slices in enumerate(rows):
                    for piece in _within(slices, places) if other != rank else ():
                        piece.of(tensors).copy_(piece.within(buffer[other]))

    def _collective(self, collective: Callable[..., Any], output: Tensor, source: Tensor) -> None:
        try:
            collective(output, source, group=self._ranks.group)
        except RuntimeError as error:
            raise RanksError(
                f"rank {self._ranks.rank} lost another rank within a step. The step is counted, and the parameters "
                "may differ between ranks: start the run again, and it resumes from its last checkpoint. torch's "
                f"error: {error}"
            ) from error


# torch 2.13's names, and those before
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def row_of(owned: Sequence[Sequence[Piece]]) -> int:
    """Entries of each rank in a round: as many as fit into STAGED_BYTES, and the same in all rounds, so that the last
    one is padded by a few entries only."""
    longest = max(sum(piece.entries for piece in pieces) for pieces in owned)
    largest = max(1, STAGED_BYTES // (8 * len(owned)))
    rounds = max(1, math.ceil(longest / largest))
    return max(1, math.ceil(longest / rounds))


def _rounds(owned: Sequence[Sequence[Piece]], row: int) -> Iterator[list[list[_Slice]]]:
    """For each round, the slices of every rank: the rank's entries from round·row to (round + 1)·row - 1."""
    flat = [list(_sliced(pieces, row)) for pieces in owned]
    for number in range(max(map(len, flat), default=0)):
        yield [rounds[number] if number < len(rounds) else [] for rounds in flat]


def _sliced(pieces: Sequence[Piece], row: int) -> Iterator[list[_Slice]]:
    filled, slices = 0, []
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            stop = min(piece.stop, start + row - filled)
            slices.append(_Slice(piece.place, start, stop, filled))
            filled, start = filled + stop - start, stop
            if filled == row:
                yield slices
                filled, slices = 0, []
    if slices:
        yield slices


def _within(slices: Sequence[_Slice], places: set[int]) -> Iterator[_Slice]:
    return (piece for piece in slices if piece.place in places)


def _by_device(tensors: Sequence[Tensor]) -> Iterator[tuple[torch.device, set[int]]]:
    places: dict[torch.device, set[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.device, set()).add(place)
    yield from places.items()


def _by_device_and_dtype(tensors: Sequence[Tensor]) -> Iterator[tuple[torch.device, torch.dtype, set[int]]]:
    places: dict[tuple[torch.device, torch.dtype], set[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault((tensor.device, tensor.dtype), set()).add(place)
    for (device, dtype), these in places.items():
        yield device, dtype, these
