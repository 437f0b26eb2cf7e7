"""What a step sends: planned from the parts of the trained parameters, given to the collectives, sent by the kernel.

Three counts of the same thing. `Plan` follows from shapes and the number of processes. `Watch` adds up the tensors that
the collectives are called with. `socket_bytes` is what this process's TCP connections have really carried.
"""

from __future__ import annotations

import math
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor

from dpkernels.privacy import DPOptimizer
from dpkernels.privacy.ranks import exchange
from dpkernels.privacy.ranks.pieces import cut, owners

SUM_BYTES = 8  # sums are float64
_TCP_INFO_BYTES_SENT = 200  # the offset of tcpi_bytes_sent in Linux's struct tcp_info


@dataclass(frozen=True)
class Plan:
    """What the exchange of a step moves, from shapes alone.

    Attributes:
        entries: trained entries.
        processes: R.
        pieces: streams of noise, each with one owner.
        rounds: calls of each collective.
        padded: entries in the buffers of all rounds: the parts are padded to the longest.
        copies: slices that are copied into or out of a buffer, on one process and in one direction.
    """

    entries: int
    processes: int
    pieces: int
    rounds: int
    padded: int
    copies: int

    def bytes_in(self) -> int:
        """Bytes of the buffers that are summed: 8 an entry, and the padding."""
        return SUM_BYTES * self.padded

    def bytes_out(self, entry: int = 4) -> int:
        """Bytes of the buffers that the new parameters come in: their dtype's size an entry, and the padding."""
        return entry * self.padded

    def sent(self, entry: int = 4) -> float:
        """Bytes that a process sends at least: of what is summed all parts but its own, of what is gathered its own
        part to (R - 1) others; a ring of any length sends exactly this."""
        return (self.bytes_in() + self.bytes_out(entry)) * (self.processes - 1) / self.processes


def plan(parameters: Sequence[Tensor], processes: int) -> Plan:
    """The plan of a step with these trained parameters."""
    pieces = cut(parameters)
    entries = sum(piece.entries for piece in pieces)
    if processes == 1:
        return Plan(entries, 1, len(pieces), 0, 0, 0)
    owned = owners(pieces, processes)
    lengths = [sum(piece.entries for piece in of_rank) for of_rank in owned]
    row = exchange.row_of(owned)
    rounds = math.ceil(max(lengths) / row)
    copies = sum(len(slices) for rows in exchange._rounds(owned, row) for slices in rows)
    return Plan(entries, processes, len(pieces), rounds, rounds * row * processes, copies)


@dataclass
class Watch:
    """What the collectives were given, and how long each part of a step took on this process, in seconds."""

    calls: dict[str, int] = field(default_factory=dict)
    given: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def clear(self) -> None:
        """Begin again."""
        self.calls.clear()
        self.given.clear()
        self.seconds.clear()

    def counted(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        """A collective whose larger buffer is counted: the input of a reduce-scatter, the output of an all-gather."""

        def call(output: Tensor, source: Tensor, **keywords: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            self.given[name] = self.given.get(name, 0) + max(output.nbytes, source.nbytes)
            return collective(output, source, **keywords)

        return call

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time is added up."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
                self.calls[name] = self.calls.get(name, 0) + 1

        return call


@contextmanager
def watched(optimizer: DPOptimizer) -> Iterator[Watch]:
    """Watch the steps of a private optimizer: "in" (sums to owners), "out" (their results to all), "facts"."""
    watch = Watch()
    ranks, moves = optimizer._ranks, optimizer._exchange
    with (
        mock.patch.object(exchange, "_REDUCE_SCATTER", watch.counted("sums", exchange._REDUCE_SCATTER)),
        mock.patch.object(exchange, "ALL_GATHER", watch.counted("results", exchange.ALL_GATHER)),
        mock.patch.object(moves, "sums_to_owners", watch.timed("in", moves.sums_to_owners)),
        mock.patch.object(moves, "to_all", watch.timed("out", moves.to_all)),
        mock.patch.object(ranks, "_told", watch.timed("facts", ranks._told)),
    ):
        yield watch


def socket_bytes() -> int | None:
    """Bytes that this process's open TCP connections have sent so far, by the kernel; None where it does not say."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            number = int(name)
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                if connection.type != socket.SOCK_STREAM:
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES_SENT + 8)
        except OSError:  # closed since the folder was listed, or not connected
            continue
        if len(info) < _TCP_INFO_BYTES_SENT + 8:
            return None
        total += struct.unpack_from("<Q", info, _TCP_INFO_BYTES_SENT)[0]
    return total
