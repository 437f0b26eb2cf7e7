"""privacy.md 11: runs that train one model in turn have one ε, with or without a ledger."""

from __future__ import annotations

import copy
import fcntl
import gc
import warnings
from pathlib import Path

import pytest
from torch import nn

from dpkernels.nn import detach
from dpkernels.privacy import BudgetExhausted, LedgerError, epsilon
from tests.privacy.private_run import Run, private_run, train
from tests.warned import no_warnings

DELTA, RATE = 1e-3, 8 / 40


def trained(taken: int, **arguments: object) -> Run:
    """A run that has ended; its model is free for another."""
    run = private_run(accountant="rdp", **arguments)  # type: ignore[arg-type]
    train(run, taken)
    detach(run.model)
    return run


def spent_by(sigma: float, steps: int) -> float:
    return epsilon(sigma, RATE, steps, DELTA, accountant="rdp")


def again(model: nn.Module, **arguments: object) -> Run:
    """A further run on a model that was trained by 3 steps."""
    with pytest.warns(UserWarning, match=r"trained by 3 private steps of earlier runs.*build the model anew"):
        return private_run(model=model, accountant="rdp", **arguments)  # type: ignore[arg-type]


def test_a_later_run_counts_the_steps_that_the_weights_have_taken() -> None:
    second = again(trained(3).model)
    train(second, 2)
    assert (second.engine.steps, second.engine.earlier_steps) == (5, 3)
    assert second.engine.get_epsilon(DELTA) == pytest.approx(spent_by(1.0, 5))


def test_each_run_counts_with_its_own_noise() -> None:
    second = again(trained(3, sigma=0.8).model, sigma=8.0)
    assert second.engine.get_epsilon(DELTA) == pytest.approx(spent_by(0.8, 3))
    assert second.engine.history[0][0].noise_multiplier == 0.8


def test_they_count_towards_the_target_at_once() -> None:
    target = spent_by(1.0, 5) * 1.0001
    second = again(trained(3).model, target_epsilon=target, target_delta=DELTA)
    with pytest.raises(BudgetExhausted):
        train(second)
    assert second.engine.steps == 5


def test_they_are_none_of_the_planned_steps() -> None:
    second = again(trained(3).model, steps=2)
    assert train(second) == 2
    assert second.engine.steps == 5


def test_parameters_that_are_frozen_now_count() -> None:
    model = trained(3).model
    model.requires_grad_(False)
    model.last = nn.Linear(8, 3)
    assert again(model).engine.earlier_steps == 3


def test_a_third_run_counts_both() -> None:
    second = again(trained(3).model)
    train(second, 1)
    detach(second.model)
    with pytest.warns(UserWarning, match="trained by 4 private steps"):
        third = private_run(model=second.model)
    assert third.engine.earlier_steps == 4


def test_a_model_that_is_built_anew_begins_anew() -> None:
    first = trained(3)
    with no_warnings("no self_check"):
        run = private_run(model=copy.deepcopy(first.model))
        train(run, 1)
    assert run.engine.steps == 1


def test_a_run_that_took_no_step_counts_nothing() -> None:
    first = private_run()
    detach(first.model)
    with no_warnings():
        assert private_run(model=first.model).engine.steps == 0


def test_the_ledger_of_both_runs_counts_once(tmp_path: Path) -> None:
    first = trained(3, ledger=tmp_path / "ledger.jsonl")
    with no_warnings():
        second = private_run(model=first.model, ledger=tmp_path / "ledger.jsonl")
    assert (second.engine.steps, second.engine.earlier_steps) == (3, 0)


@pytest.mark.parametrize("kept", [False, True])
def test_a_ledger_that_lacks_them_is_refused(kept: bool, tmp_path: Path) -> None:
    first = trained(3, ledger=tmp_path / "first.jsonl" if kept else None)
    path = tmp_path / "second.jsonl"
    with pytest.raises(LedgerError, match=r"second\.jsonl' lacks 3 steps.*Give both runs the same ledger"):
        private_run(model=first.model, ledger=path)
    assert not path.exists()
    assert again(first.model).engine.steps == 3  # the model is usable


def test_another_unit_is_refused() -> None:
    first = trained(3)
    speakers = {"unit": "speaker", "speakers": [i % 20 for i in range(40)], "max_examples_per_speaker": 2}
    with pytest.raises(ValueError, match=r"trained earlier .* unit='example'.*do not add up to one ε"):
        private_run(model=first.model, **speakers)
    assert again(first.model).engine.steps == 3


def test_a_checkpoint_of_the_earlier_run_goes_on_with_it() -> None:
    """Its steps are planned ones then: the run that resumes ends where the first would have."""
    first = trained(3, steps=5)
    second = again(first.model, steps=5)
    second.engine.load_state_dict(first.engine.state_dict())
    assert (second.engine.steps, second.engine.earlier_steps, len(second.loader)) == (3, 0, 2)


def test_a_checkpoint_of_the_later_run_keeps_them_apart() -> None:
    second = again(trained(3).model, steps=4)
    train(second, 1)
    resumed = private_run(steps=4)
    resumed.engine.load_state_dict(second.engine.state_dict())
    assert (resumed.engine.steps, resumed.engine.earlier_steps, len(resumed.loader)) == (4, 3, 3)


def test_what_is_kept_of_a_run_does_not_hold_its_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    model = trained(1, ledger=path).model
    with warnings.catch_warnings(), path.open("ab") as opened:
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert model is not None


def test_the_optimizers_checkpoint_carries_the_count() -> None:
    """As that of a script which saves model and optimizer, and knows of no engine."""
    first = private_run(accountant="rdp")
    train(first, 3)
    resumed = private_run(accountant="rdp")
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    assert resumed.engine.steps == 3
    resumed.engine.load_state_dict(first.engine.state_dict())  # once is enough, twice is once
    assert resumed.engine.steps == 3
    assert resumed.engine.get_epsilon(DELTA) == first.engine.get_epsilon(DELTA)


def test_torchs_optimizer_and_a_private_one_load_each_others_state() -> None:
    run = private_run()
    train(run, 1)
    state = run.optimizer.state_dict()
    run.optimizer.original_optimizer.load_state_dict(state)
    del state["privacy"]
    other = private_run()
    other.optimizer.load_state_dict(state)
    assert other.engine.steps == 0


def test_an_optimizers_checkpoint_of_another_data_set_is_refused() -> None:
    first = trained(1)
    other = private_run(examples=50)
    with pytest.raises(
        ValueError, match=r"the checkpoint has dataset_size=40.*leave its entry 'privacy' out"
    ):
        other.optimizer.load_state_dict(first.optimizer.state_dict())
