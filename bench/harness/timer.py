"""Timing in turns, A B C A B C …, so that other load on the machine affects every contender alike.

pytest-benchmark's own fixture runs one function many times and can be used once a test; drift between two such
blocks (clocks, a neighbour's load) would look like a difference between contenders.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from bench.harness.quiet import Neighbours, excess


class Runner(Protocol):
    """Something with a timed step and an untimed preparation."""

    def prepare(self) -> None: ...
    def step(self) -> None: ...


@dataclass(frozen=True)
class Samples:
    """The times of one contender, in seconds, in the order of the rounds.

    others: cores that other processes took from this one in the meantime (`bench.harness.quiet`); None if unknown.
    """

    seconds: tuple[float, ...]
    others: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """(q1, q3), by linear interpolation between order statistics; both the value for one sample."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        q1, _, q3 = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return q1, q3

    @property
    def iqr(self) -> float:
        """q3 − q1: the spread that a few disturbed rounds do not reach."""
        q1, q3 = self.quartiles
        return q3 - q1

    @property
    def spread(self) -> float | None:
        """IQR over median; None where the rounds are too few to tell, or take no time."""
        return self.iqr / self.median if len(self.seconds) > 2 and self.median > 0 else None


def host_seconds(function: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    """Wall-clock seconds of one call on the host."""
    start = clock()
    function()
    return clock() - start


def device_seconds(function: Callable[[], None]) -> float:
    """Seconds between two CUDA events around one call: a host clock measures only the asynchronous launches."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def stopwatch(device: str) -> Callable[[Callable[[], None]], float]:
    """Return the function that times a call on a device type."""
    return device_seconds if device.startswith("cuda") else host_seconds


def interleave(
    runners: Mapping[str, Runner],
    *,
    rounds: int,
    warmup: int = 1,
    seconds: float = float("inf"),
    least: int = 3,
    measure: Callable[[Callable[[], None]], float] = host_seconds,
) -> dict[str, Samples]:
    """Times of all runners, taken in turns.

    Args:
        runners: by name; every round takes one step of each, in this order.
        rounds: how many rounds are timed.
        warmup: rounds before them that are not (lazy initialisation, caches, the allocator).
        seconds: stop early when the timed steps have taken this long together, but not before `least` rounds.
        measure: times one call.

    Raises:
        ValueError: rounds < 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected an integer ≥ 1; given {rounds}; pass 1 or more")
    for _ in range(warmup):
        for runner in runners.values():
            runner.prepare()
            runner.step()
    taken: dict[str, list[float]] = {name: [] for name in runners}
    spent = 0.0
    neighbours = Neighbours()
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would be charged to the contender that is running
    try:
        for turn in range(rounds):
            if turn >= least and spent >= seconds:
                break
            for name, runner in runners.items():
                runner.prepare()
                duration = measure(runner.step)
                taken[name].append(duration)
                spent += duration
            gc.collect(0)
    finally:
        if was_enabled:
            gc.enable()
    others = excess(neighbours.cores())
    return {name: Samples(tuple(durations), others) for name, durations in taken.items()}


@dataclass
class Call:
    """A plain function as a runner. `arguments` are used in rotation: more of them than the cache holds."""

    function: Callable[..., object]
    arguments: Sequence[tuple[object, ...]] = ((),)
    _turn: int = 0

    def prepare(self) -> None:
        self._turn = (self._turn + 1) % len(self.arguments)

    def step(self) -> None:
        self.function(*self.arguments[self._turn])
