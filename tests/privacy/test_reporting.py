"""privacy.md 14: what is not private says so, and stays out of what is kept for others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dpkernels.privacy import SelfCheckReport, StepStats
from dpkernels.privacy.ledger import Ledger
from dpkernels.privacy.optimizer import DPOptimizer
from tests.privacy.private_run import private_run, train


def test_step_statistics_are_right_and_marked_not_private() -> None:
    run = private_run(sigma=0, clip=0.5)
    assert run.optimizer.last_step is None
    run.data.tensors[0][2] = float("nan")
    run.release((0, 1), (2, 3))
    stats = run.optimizer.last_step
    assert isinstance(stats, StepStats)
    assert (stats.examples, stats.non_finite, stats.clip_rate) == (4, 1, 0.75)
    for kind in (StepStats, SelfCheckReport):
        assert "NOT PRIVATE" in (kind.__doc__ or "")
    assert "NOT PRIVATE" in repr(stats)
    assert "NOT PRIVATE" in (DPOptimizer.last_step.__doc__ or "")
    run.release(())
    assert run.optimizer.last_step == StepStats(0, 0.0, 0.0, 0)


def check_kept_state_is_public(run: object, path: Path) -> None:
    """No statistic of the data is in the ledger or in the engine's and the optimizer's state."""
    train(run, 3)  # type: ignore[arg-type]
    state = run.engine.state_dict()  # type: ignore[attr-defined]
    text = json.dumps(state) + path.read_text() + str(run.optimizer.state_dict())  # type: ignore[attr-defined]
    for field in dataclasses.fields(StepStats):
        assert f'"{field.name}"' not in text, f"{field.name} is kept"
    assert "loss" not in text


def test_nothing_kept_holds_statistics_of_the_data(tmp_path: Path) -> None:
    check_kept_state_is_public(private_run(ledger=tmp_path / "l"), tmp_path / "l")


def test_planted_clip_rate_in_the_ledger_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Ledger._append
    monkeypatch.setattr(Ledger, "_append", lambda self, entry: original(self, {**entry, "clip_rate": 0.5}))
    with pytest.raises(AssertionError):
        check_kept_state_is_public(private_run(ledger=tmp_path / "l"), tmp_path / "l")


def test_a_resumed_report_counts_what_the_ledger_holds(tmp_path: Path) -> None:
    run = private_run(ledger=tmp_path / "l", sigma=6.0)
    train(run, 2)
    run.engine.get_epsilon(1e-3)
    run.engine.get_epsilon(1e-3, accountant="rdp")
    noted = [json.loads(line)["entry"] for line in (tmp_path / "l").read_text().splitlines()]
    figures = {entry["accountant"]: entry["epsilon"] for entry in noted if entry["kind"] == "epsilon"}
    assert figures["pld"] < figures["rdp"]
    assert all(
        entry["delta"] == 1e-3 and entry["steps"] == 2 for entry in noted if entry["kind"] == "epsilon"
    )
