"""A busy machine is noticed: others' use of the cores, the spread between rounds, and what a result says of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from bench.harness import quiet
from bench.harness.results import Results, Row, load
from bench.harness.table import show
from bench.harness.timer import Call, Samples, interleave
from bench.reports.step import markdown

ABOUT = {
    "slug": "two",
    "device": "two cores",
    "threads": 2,
    "load": 0.1,
    "versions": {},
    "commit": "c",
    "date": "2026-11-30",
}


def row(contender: str, seconds: tuple[float, ...], others: float | None = 0.0) -> Row:
    return Row("case", "Case", {"B": 8, "T": 150}, contender).timed(Samples(seconds, others))


def machine_with(monkeypatch: pytest.MonkeyPatch, others: float, own: float, cores: int = 2) -> None:
    """A machine on which a second passes between two readings, with this much use of its cores in it."""
    wall = itertools.count()
    monkeypatch.setattr(quiet.time, "perf_counter", lambda: float(next(wall)))
    busy, mine = itertools.count(), itertools.count()
    monkeypatch.setattr(quiet, "_busy_seconds", lambda: 100.0 + next(busy) * (others + own))
    monkeypatch.setattr(quiet, "_own_seconds", lambda: 5.0 + next(mine) * own)
    monkeypatch.setattr(quiet.os, "cpu_count", lambda: cores)


def test_others_are_what_this_process_did_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, others=0.75, own=1.5)
    assert quiet.Neighbours().cores() == pytest.approx(0.75)


def test_all_time_but_idle_time_is_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """user 100, nice 50, system 25, (idle, iowait), irq 10, softirq 10, steal 5 ticks; guest time is part of user."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 50 25 9000 700 10 10 5 90 0\ncpu0 1\n", encoding="utf-8")
    monkeypatch.setattr(quiet, "STAT", stat)
    monkeypatch.setattr(quiet.os, "sysconf", lambda name: 100)
    assert quiet._busy_seconds() == pytest.approx(2.0)
    monkeypatch.setattr(quiet, "STAT", tmp_path / "absent")
    assert quiet.Neighbours().cores() is None


def test_what_runs_on_spare_cores_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for cores, others, wanted in ((2, 0.5, 0.5), (4, 1.5, 0.0), (4, 2.5, 0.5)):
        monkeypatch.setattr(quiet.os, "cpu_count", lambda cores=cores: cores)
        assert quiet.excess(others) == wanted
    assert quiet.excess(None) is None


def test_the_timer_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, others=0.5, own=1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    taken = interleave({"A": Call(lambda: None), "B": Call(lambda: None)}, rounds=3, measure=lambda f: 1.0)
    assert {samples.others for samples in taken.values()} == {0.5}


STEADY = (1.0, 1.01, 1.02, 1.0, 1.01)
RANDOM = (1.0, 4.0, 9.0, 2.0, 6.0)


def test_a_quiet_run_says_nothing() -> None:
    results = Results("step", ABOUT, [row("a", STEADY), row("b", STEADY, 0.05)])
    assert results.disturbed() == {}
    assert "WORTH NOTHING" not in show(results)
    assert "worth nothing" not in markdown([results])


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([("a", STEADY, 0.8), ("b", STEADY, 0.8)], "other processes used 0.8 of the 2 cores"),
        ([("a", RANDOM, 0.0), ("b", RANDOM, None), ("c", STEADY, 0.0)], "the rounds differ by 100%"),
    ],
)
def test_a_busy_run_says_that_it_is_worth_nothing(
    rows: list[tuple[str, tuple[float, ...], float | None]], reason: str, tmp_path: Path
) -> None:
    """In the terminal, in the results file, and on the page that is made of it."""
    results = Results("step", ABOUT, [row(*given) for given in rows])
    assert f"WORTH NOTHING: {reason}" in show(results).replace("\n", " ")
    again = load(results.save(tmp_path))
    assert list(again.disturbed().values()) == list(results.disturbed().values())
    assert f"**1 cases are worth nothing**: {reason}" in markdown([again])


def test_one_noisy_contender_does_not_condemn_the_others() -> None:
    results = Results("step", ABOUT, [row("a", RANDOM), row("b", STEADY), row("c", STEADY)])
    assert results.disturbed() == {}


def test_two_rounds_do_not_tell() -> None:
    assert Results("step", ABOUT, [row("a", (1.0, 9.0))]).disturbed() == {}
