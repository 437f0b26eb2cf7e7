"""Whether the machine was quiet while it measured: what other processes took of its cores, and the rounds' spread.

On a busy machine the threads of one product wait for the slowest of them. Medians of 4 to 9 times the true ones were
seen, with the contenders in random order. Turns do not help there: such figures are worth nothing, and must say so.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

STAT = Path("/proc/stat")
OTHERS = 0.05
"""Others' processor time, a second and measured thread, beyond which the figures are worth nothing. The services of an
idle machine take 0.01."""
SPREAD = 0.4
"""IQR over median of the contender in the middle. Quiet recorded runs had at most 0.19 for steps, 0.35 for ops."""
SHORTEST = 0.2
"""Seconds below which the kernel's ticks of 10 ms do not tell anything."""


class Timed(Protocol):
    """What a verdict needs of a row or of samples that have times."""

    @property
    def spread(self) -> float | None: ...
    @property
    def others(self) -> float | None: ...


class Neighbours:
    """What processes other than this one take of the machine's cores, from now on."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Cores in use by others since the start, on average, with a hypervisor's steal; None if it cannot be told."""
        wall, busy = time.perf_counter() - self._wall, _busy_seconds()
        if self._busy is None or busy is None or wall < SHORTEST:
            return None
        return max(0.0, (busy - self._busy - (_own_seconds() - self._own)) / wall)


def excess(others: float | None) -> float | None:
    """Others' use of the cores that this process' threads need, in cores; what runs on spare cores does not count."""
    if others is None:
        return None
    spare = max(0, (os.cpu_count() or 1) - torch.get_num_threads())
    return round(max(0.0, others - spare), 3)


def verdict(place: Iterable[Timed], threads: int = 1) -> str:
    """Why the figures of contenders that took turns are worth nothing; "" if nothing speaks against them."""
    rows = list(place)
    others = max((row.others for row in rows if row.others is not None), default=0.0)
    spreads = [row.spread for row in rows if row.spread is not None]
    reasons = []
    if others > OTHERS * threads:
        reasons.append(f"other processes used {others:.1f} of the {threads} cores that were measured")
    if spreads and statistics.median(spreads) > SPREAD:
        reasons.append(f"the rounds differ by {statistics.median(spreads):.0%} (IQR over median)")
    return " and ".join(reasons)


def _busy_seconds() -> float | None:
    """Processor seconds of all processes and of the hypervisor's other guests, all cores together (Linux)."""
    try:
        first = STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return None
    # user, nice, system, (idle, iowait), irq, softirq, steal; guest time is part of user
    ticks = [int(value) for value in first[1:9]]
    return sum(ticks[:3] + ticks[5:]) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Processor seconds of this process, all threads and finished children together."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
