"""The timer: whose turn it is, what is timed, and what is said of it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from bench.harness.timer import Call, Samples, host_seconds, interleave


class FakeClock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def measure(self, function: Callable[[], None]) -> float:
        return host_seconds(function, self)


class Worker:
    """Takes the next of its times a step, and says when."""

    def __init__(self, name: str, clock: FakeClock, times: list[float], log: list[str]) -> None:
        self.name, self.clock, self.times, self.log = name, clock, list(times), log

    def prepare(self) -> None:
        self.clock.now += 1000.0  # must never be timed
        self.log.append(f"prepare {self.name}")

    def step(self) -> None:
        self.clock.now += self.times.pop(0)
        self.log.append(self.name)


def test_contenders_take_turns() -> None:
    clock, log = FakeClock(), []
    workers = {name: Worker(name, clock, [1.0] * 4, log) for name in "ABC"}
    interleave(workers, rounds=3, warmup=1, measure=clock.measure)
    assert [entry for entry in log if len(entry) == 1] == list("ABC") * 4
    assert log[:4] == ["prepare A", "A", "prepare B", "B"]


def test_medians_and_spread_leave_out_the_warm_up_and_the_preparation() -> None:
    clock, log = FakeClock(), []
    workers = {
        "A": Worker("A", clock, [500.0, 1.0, 5.0, 2.0, 3.0, 4.0], log),
        "B": Worker("B", clock, [500.0, 20.0, 20.0, 90.0, 20.0, 20.0], log),
    }
    taken = interleave(workers, rounds=5, warmup=1, measure=clock.measure)
    assert taken["A"].seconds == (1.0, 5.0, 2.0, 3.0, 4.0)
    assert (taken["A"].median, taken["A"].quartiles, taken["A"].iqr) == (3.0, (2.0, 4.0), 2.0)
    assert (taken["B"].median, taken["B"].iqr) == (20.0, 0.0)


def test_one_sample_has_no_spread() -> None:
    assert Samples((2.0,)).iqr == 0.0


def test_time_ends_the_rounds_but_not_before_the_least() -> None:
    clock, log = FakeClock(), []
    workers = {"A": Worker("A", clock, [1.0] * 20, log)}
    assert len(interleave(workers, rounds=9, seconds=5, measure=clock.measure)["A"].seconds) == 5
    assert len(interleave(workers, rounds=9, seconds=0, least=2, measure=clock.measure)["A"].seconds) == 2


def test_no_rounds_is_an_error() -> None:
    with pytest.raises(ValueError, match="rounds: expected an integer ≥ 1"):
        interleave({}, rounds=0)


def test_no_collection_falls_on_a_contender_and_the_collector_is_left_as_it_was() -> None:
    seen = []
    assert gc.isenabled()
    interleave({"A": Call(lambda: seen.append(gc.isenabled()))}, rounds=2, warmup=0)
    assert seen == [False, False]
    assert gc.isenabled()


def test_arguments_are_used_in_rotation() -> None:
    seen: list[int] = []
    interleave({"A": Call(seen.append, [(0,), (1,), (2,)])}, rounds=5, warmup=1)
    assert seen == [1, 2, 0, 1, 2, 0]
