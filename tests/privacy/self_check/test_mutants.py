"""Single faults that had survived every other test: each is killed by one here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import ExpandedRecord
from dpkernels.privacy import BudgetExhausted, epsilon, read_ledger
from tests.privacy.private_run import private_run, train

DELTA = 1e-3


def test_steps_after_a_carried_run_belong_to_the_run_that_carried_it(tmp_path: Path) -> None:
    """Their σ differ: charged to the other one's, ε would be another."""
    path = tmp_path / "ledger.jsonl"
    first = private_run(sigma=8.0)
    train(first, 3)
    second = private_run(sigma=0.8, ledger=path)
    train(second, 1)
    second.engine.load_state_dict(first.engine.state_dict())
    train(second, 2)
    spent = second.engine.get_epsilon(DELTA)
    second.engine.close()
    runs = {run.mechanism.noise_multiplier: run.steps for run in read_ledger(path).runs}
    assert runs == {8.0: 3, 0.8: 3}
    third = private_run(sigma=8.0, ledger=path)
    assert third.engine.get_epsilon(DELTA) == pytest.approx(spent)
    assert spent > epsilon(0.8, 0.2, 3, DELTA)


def test_what_a_checkpoint_adds_counts_against_the_target_at_once() -> None:
    """Steps that were found to fit are not believed to fit after a checkpoint told of others."""
    q = 8 / 40
    earlier = private_run(sigma=1.0)
    train(earlier, 4)
    run = private_run(sigma=1.0, target_epsilon=epsilon(1.0, q, 6, DELTA), target_delta=DELTA)
    train(run, 1)  # which asks for many at once
    run.engine.load_state_dict(earlier.engine.state_dict())
    train(run, 1)
    with pytest.raises(BudgetExhausted):
        train(run, 1)
    assert run.engine.steps == 6


def test_the_second_backward_of_two_passes_is_looked_at_too() -> None:
    """A penalty that reaches a weight in the second backward only: no layer's rule has seen it."""

    class Late(torch.autograd.Function):
        """The identity; in its second backward it back-propagates through a weight of its own accord."""

        backwards = 0

        @staticmethod
        def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
            Late.backwards += 1
            return g, torch.ones(3, 8) if Late.backwards == 2 else None

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(torch.tanh(self.first(x))).mean(1)
            return Late.apply(found, self.last.weight)

    run = private_run(model=Penalised(), strategy="two_pass")
    run.begin(2)
    with pytest.raises(RuntimeError, match=r"used past their layers' rules: 'last\.weight'"):
        run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))
    assert Late.backwards == 2


@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
def test_recover_forgets_the_forward_that_failed(strategy: str) -> None:
    """Its uses of the parameters, counted still, would keep the records of the next forward."""
    run = private_run(strategy=strategy)
    run.begin(2)
    run.loss_fn(run.model, run.data[[0, 1]])  # and then there is no memory for a backward
    assert sum(run.optimizer.tape._uses.values())
    assert run.optimizer.recover() is False
    assert not sum(run.optimizer.tape._uses.values())


def test_a_record_of_a_foreign_parameter_is_refused_by_name() -> None:
    run = private_run()
    foreign = nn.Parameter(torch.zeros(3))
    run.optimizer.tape.open(2)
    with pytest.raises(RuntimeError, match=r"'elsewhere': it used a tensor of shape \(3,\) which is not"):
        run.optimizer.tape.add(ExpandedRecord("elsewhere", foreign, torch.ones(2, 3)))
    run.optimizer.tape.discard()
