"""Pieces: the trained parameters cut into parts of public size, and the rank that owns each."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

PIECE_ENTRIES = 2**20
"""Largest number of a parameter's entries that one noise stream serves."""
_LEAST_ENTRIES = 2**16
_PIECES = 2**9


@dataclass(frozen=True)
class Piece:
    """Entries start to stop - 1 of a trained parameter, flattened.

    Attributes:
        index: the piece's number among all pieces, which is its noise stream's index.
        place: the parameter's position among the trained parameters.
    """

    index: int
    place: int
    start: int
    stop: int

    @property
    def entries(self) -> int:
        """Number of entries."""
        return self.stop - self.start

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of a contiguous tensor of the parameter's shape: the tensor itself if it is whole, else a view."""
        if self.entries == tensor.numel():
            return tensor
        return tensor.detach().view(-1)[self.start : self.stop]


def piece_entries(total: int) -> int:
    """Entries of a piece, at most, where `total` entries are trained: a power of two that makes some 512 pieces.

    Larger pieces would not divide evenly among many ranks, and smaller ones cost time on the host. The size does not
    depend on the number of ranks, so that under a test's fixed key the noise does not either.
    """
    even = 1 << (-(-total // _PIECES) - 1).bit_length()
    return min(max(even, _LEAST_ENTRIES), PIECE_ENTRIES)


def cut(parameters: Iterable[Tensor]) -> list[Piece]:
    """The pieces of the trained parameters, in order: a parameter of at most `piece_entries` entries is one piece."""
    parameters = list(parameters)
    most = piece_entries(sum(parameter.numel() for parameter in parameters))
    pieces: list[Piece] = []
    for place, parameter in enumerate(parameters):
        entries = parameter.numel()
        for start in range(0, max(entries, 1), most):
            pieces.append(Piece(len(pieces), place, start, min(start + most, entries)))
    return pieces


def owners(pieces: Sequence[Piece], ranks: int) -> list[list[Piece]]:
    """The pieces of each rank: every piece has one owner, owners follow one another in order, and each owns about as
    many entries (more or less by a piece)."""
    owned: list[list[Piece]] = [[] for _ in range(ranks)]
    total = sum(piece.entries for piece in pieces)
    passed = 0
    for piece in pieces:
        middle = passed + piece.entries / 2
        owned[min(int(middle * ranks / total), ranks - 1) if total else 0].append(piece)
        passed += piece.entries
    return owned


def share(weights: Sequence[float], ranks: int) -> list[list[int]]:
    """Positions of the items for each rank, ascending: the heaviest first, each to the rank with the least so far.

    Among equal ranks the one with fewer items gets it, then the lower one, so that items of equal weight are dealt
    out evenly. Every rank computes the same.
    """
    given: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0.0, 0, rank) for rank in range(ranks)]
    for position in sorted(range(len(weights)), key=lambda item: -weights[item]):
        total, count, rank = heap[0]
        given[rank].append(position)
        heapq.heapreplace(heap, (total + weights[position], count + 1, rank))
    return [sorted(positions) for positions in given]
