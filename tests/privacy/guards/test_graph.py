"""What is beside the private model, in the graph of its losses; and a scale that no self-check saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.privacy.private_run import Net, Run, losses_of, private_run, train
from tests.warned import no_warnings


def headed(head: nn.Module) -> Any:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(head(model(batch[0])), batch[1], reduction="none")

    return losses


def frozen(head: nn.Module) -> nn.Module:
    return head.requires_grad_(False)


def test_a_batch_norm_beside_the_model_is_refused_while_it_trains() -> None:
    head = frozen(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    run = private_run(loss_fn=headed(head))
    with pytest.raises(RuntimeError, match=r"batch statistics \('NativeBatchNormBackward0'\).*eval\(\)"):
        run.release((0, 1))
    assert run.engine.steps == 0
    head.eval()
    run.release((0, 1))


def test_a_functional_batch_norm_is_refused_too() -> None:
    class Functional(Net):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(super().forward(x), None, None, training=True)

    run = private_run(model=Functional())
    with pytest.raises(RuntimeError, match="batch statistics"):
        run.release((0, 1))


def test_an_instance_norm_is_no_batch_norm() -> None:
    class Instance(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.instance_norm(self.first(x))[..., :6])

    run = private_run(model=Instance())
    for size in (1, 2, 3):
        run.release(range(size))


def test_trained_parameters_beside_the_model_are_refused_by_shape() -> None:
    head = nn.Linear(3, 3)
    run = private_run(loss_fn=headed(head))
    with pytest.raises(RuntimeError, match=r"2 trained parameters .*\(3, 3\), \(3,\).*detach"):
        run.release((0, 1))
    assert all(parameter.grad is None for parameter in head.parameters())
    frozen(head)
    run.release((0, 1))


def test_inputs_that_require_grad_are_no_parameters() -> None:
    run = private_run(
        loss_fn=lambda model, batch: losses_of(model, [batch[0].clone().requires_grad_(), batch[1]])
    )
    run.release((0, 1))


def test_trained_tensors_that_are_no_parameters_are_refused_by_shape() -> None:
    """A temperature or a log-variance with an optimizer of its own."""
    scale = torch.ones(1, requires_grad=True)
    run = private_run(loss_fn=lambda model, batch: losses_of(model, batch) * scale)
    with pytest.raises(RuntimeError, match=r"tensors that require grad \(shapes \(1,\)\).*nn\.Parameter"):
        run.release((0, 1))
    assert scale.grad is None
    scale.requires_grad_(False)
    run.release((0, 1))


def test_a_function_that_keeps_a_name_of_its_own_is_no_trouble() -> None:
    class Named(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.name = "x"
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g

    run = private_run(loss_fn=lambda model, batch: Named.apply(losses_of(model, batch)))
    run.engine.self_check(run.loss_fn)
    run.release((0, 1))


@pytest.mark.parametrize("late", [1, 3])
def test_the_graph_is_looked_at_again(late: int) -> None:
    """In the 1st, 2nd, 4th, ... backward: what comes with a later one is found with the next."""
    head = frozen(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).eval()
    run = private_run(loss_fn=headed(head))
    for _ in range(late):
        run.release((0, 1))
    head.train()
    with pytest.raises(RuntimeError, match="batch statistics"):
        run.release((0, 1))


def checked_run(loss_fn: Any = losses_of) -> Run:
    run = private_run()
    run.engine.self_check(loss_fn)
    return run


def test_a_scale_that_no_self_check_saw_is_warned_of_once() -> None:
    run = checked_run()
    run.loss_fn = lambda model, batch: losses_of(model, batch) / len(batch[0])
    with pytest.warns(UserWarning, match=r"losses / len\(batch\)"):
        run.release((0, 1))
    with no_warnings():
        run.release((0, 1))


@pytest.mark.parametrize(
    "after",
    [
        torch.clone,
        lambda losses: losses.view(-1),
        lambda losses: losses.double() + 0,
        lambda losses: torch.stack(list(losses)),
        lambda losses: losses[:, None].expand(-1, 2).sum(1) * 1,
    ],
)
def test_a_scale_is_seen_whatever_follows_it(after: Any) -> None:
    run = checked_run(lambda model, batch: losses_of(model, batch) * 1)
    run.loss_fn = lambda model, batch: after(losses_of(model, batch) * 1 / len(batch[0]))
    with pytest.warns(UserWarning, match=r"losses / len\(batch\)"):
        run.release((0, 1))


def test_a_scale_that_was_checked_is_no_matter() -> None:
    def halved(model: nn.Module, batch: Any) -> Tensor:
        return losses_of(model, batch) / 2

    for checked, trained in ((halved, halved), (losses_of, losses_of)):
        run = checked_run(checked)
        run.loss_fn = trained
        with no_warnings():
            train(run, 3)
