"""privacy.md 14: what is not private says so, and stays out of what is kept for others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from dpkernels.privacy import PrivacyEngine, SelfCheckReport, StepStats
from dpkernels.privacy.accounting.ledger import Ledger
from dpkernels.privacy.step.optimizer import DPOptimizer
from tests.privacy.private_run import Run, private_run, train


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


def names_in(state: object) -> set[str]:
    """Every key of nested mappings and sequences, and every string among their values."""
    if isinstance(state, Mapping):
        return set(map(str, state)).union(*map(names_in, state.values()))
    if isinstance(state, list | tuple):
        return set().union(*map(names_in, state))
    return {state} if isinstance(state, str) else set()


def check_kept_state_is_public(run: Run, path: Path) -> None:
    """No statistic of the data is in the ledger or in the engine's and the optimizer's state."""
    train(run, 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for where, state in (
        ("ledger", lines),
        ("engine", run.engine.state_dict()),
        ("optimizer", run.optimizer.state_dict()),
    ):
        names = names_in(state)
        assert len(names) > 3, f"{where}: nothing was looked at"
        for field in dataclasses.fields(StepStats):
            assert field.name not in names, f"{where}: {field.name} is kept"
        assert not any("loss" in name for name in names), f"{where}: a loss is kept"


def test_nothing_kept_holds_statistics_of_the_data(tmp_path: Path) -> None:
    check_kept_state_is_public(private_run(ledger=tmp_path / "l"), tmp_path / "l")


def test_planted_clip_rate_in_the_ledger_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Ledger._append
    monkeypatch.setattr(Ledger, "_append", lambda self, entry: original(self, {**entry, "clip_rate": 0.5}))
    with pytest.raises(AssertionError, match="ledger: clip_rate"):
        check_kept_state_is_public(private_run(ledger=tmp_path / "l"), tmp_path / "l")


@pytest.mark.parametrize(
    ("holder", "kept"),
    [
        (DPOptimizer, {"last_step": {"clip_rate": 0.5}}),
        (DPOptimizer, {"last_step": [{"mean_loss": 2.0}]}),
        (PrivacyEngine, {"runs": [{"non_finite": 1}]}),
    ],
)
def test_planted_statistics_in_a_state_are_caught(
    holder: type, kept: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = holder.state_dict
    monkeypatch.setattr(holder, "state_dict", lambda self: {**original(self), **kept})
    with pytest.raises(AssertionError, match=r"(optimizer|engine): .* is kept"):
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
