"""privacy.md 21: the watches hold whichever way the model is entered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.privacy.private_run import Run, private_run, train


class Keeps(nn.Module):
    """Writes the mean of what it saw into a frozen parameter, or a buffer, in a method."""

    def __init__(self, how: str, *, late: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.code = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.register_buffer("seen", torch.zeros(6))
        self.how, self.late, self.calls = how, late, 0

    def keep(self, x: Tensor) -> None:
        mean = x.detach().mean((0, 1))
        self.calls += 1
        if self.calls < 5 and self.late:
            return
        if self.how == "past autograd":
            self.code.data.copy_(mean)
        elif self.how == "in place":
            with torch.no_grad():
                self.code.copy_(mean)
        else:
            self.seen.data.copy_(mean)

    def encode(self, x: Tensor) -> Tensor:
        self.keep(x)  # before any of its modules is called
        found: Tensor = self.last(torch.tanh(self.first(x))).mean(1)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.encode(x), y, reduction="none")


def by(enter: Callable[[Any], Callable[[Tensor], Tensor]]) -> Callable[..., Tensor]:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(enter(model)(batch[0]), batch[1], reduction="none")

    return losses


def by_parts(model: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        model.keep(x)
        found: Tensor = model.last(torch.tanh(model.first(x))).mean(1)
        return found

    return forward


ENTRIES = {
    "__call__": by(lambda model: model),
    "forward": by(lambda model: model.forward),
    "a method": by(lambda model: model.encode),
    "its own loss": lambda model, batch: model.loss(*batch),
    "its modules": by(by_parts),
    "compiled": by(lambda model: torch.compile(model, backend="eager")),
}
NAMED = {
    "past autograd": "computed: 'code'",
    "in place": "computed: 'code'",
    "a buffer": r"autograd .*: 'seen'",
}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("how", NAMED)
def test_what_a_forward_writes_is_seen_whichever_way_it_is_entered(how: str, entry: str) -> None:
    run = private_run(model=Keeps(how), loss_fn=ENTRIES[entry])
    with pytest.raises(RuntimeError, match=NAMED[how]):
        train(run, 3)
    assert run.engine.steps == 0


def test_what_is_written_in_a_later_micro_batch_is_seen_before_its_step() -> None:
    """Its values are compared after the 1st, 2nd and 4th of them; the 5th is not one that is looked at."""
    run = private_run(model=Keeps("past autograd", late=True), loss_fn=ENTRIES["a method"])
    with pytest.raises(RuntimeError, match="computed: 'code'"):
        run.release((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
    assert run.engine.steps == 0


def test_a_forward_of_the_root_does_not_forgive_what_a_method_wrote() -> None:
    run = private_run(model=Keeps("in place"))
    run.begin(2)
    run.model.keep(run.data[[0, 1]][0])
    run.model.how, run.model.late = "nothing", True  # from here on nothing is written
    with pytest.raises(RuntimeError, match="computed: 'code'"):
        run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))


def test_a_refused_write_stays_refused() -> None:
    run = private_run(model=Keeps("in place"), loss_fn=ENTRIES["a method"])
    run.begin(2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="computed: 'code'"):
            run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))
    with pytest.raises(RuntimeError):
        run.optimizer.step()


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_training_loop_may_write_after_a_step(entry: str) -> None:
    model = Keeps("past autograd", late=True)
    model.calls = -100  # never
    run: Run = private_run(model=model, loss_fn=ENTRIES[entry])
    for _ in range(3):
        run.release((0, 1))
        with torch.no_grad():
            run.model.first.weight.clamp_(-0.1, 0.1)
            run.model(run.data[[0]][0])
            run.model.code.data.add_(1)
    assert run.engine.steps == 3
