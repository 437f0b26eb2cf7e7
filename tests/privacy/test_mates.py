"""The mates check, and the self-check's tolerance: what mixes examples in one arithmetic only is found there."""

from __future__ import annotations

import weakref
from collections import namedtuple
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine
from dpkernels.privacy import mates, self_check
from dpkernels.privacy.mates import with_other_mates
from dpkernels.privacy.probing import private_backward
from dpkernels.privacy.self_check import SelfCheckError

FRAMES, WIDTH = 5, 6


class Net(nn.Module):
    """Two trained layers around something that may mix."""

    def __init__(self, mixing: nn.Module) -> None:
        super().__init__()
        self.first, self.mixing, self.last = nn.Linear(WIDTH, WIDTH), mixing, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.mixing(self.first(x)))
        return y


class Mixes(nn.Module):
    """Adds a share of the batch's mean, in one dtype or in all."""

    def __init__(self, share: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.share, self.dtype = share, dtype

    def forward(self, y: Tensor) -> Tensor:
        return y if self.dtype not in (None, y.dtype) else y + self.share * y.mean(0)


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean((1, 2))


def in_half(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return losses(model, x)


def batch(size: int = 3) -> Tensor:
    return torch.randn(size, FRAMES, WIDTH, generator=torch.Generator().manual_seed(0))


def made(engine: PrivacyEngine, mixing: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = Net(mixing)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    data: Any = DataLoader(TensorDataset(batch(8)), batch_size=4)
    return engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        data_loader=data,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )[0]


@pytest.mark.parametrize("loss_fn", [losses, in_half])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_independent_examples_pass(loss_fn: Any, size: int) -> None:
    with closing(PrivacyEngine()) as engine:
        made(engine, nn.Tanh())
        engine.self_check(loss_fn, batch(size))
        engine.check_mates(loss_fn, batch(size))


def test_what_mixes_in_half_precision_only_is_found_there() -> None:
    with closing(PrivacyEngine()) as engine:
        model = made(engine, Mixes(0.1, torch.bfloat16))
        engine.self_check(losses, batch())
        with pytest.raises(SelfCheckError, match="with other examples beside it, example 0 of the batch"):
            engine.check_mates(in_half, batch())
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("share", [1e-2, 1e-4])
def test_the_self_check_asks_for_mates_too(share: float) -> None:
    """Below float32's tolerance, where a batch and an example alone are compared."""
    with closing(PrivacyEngine()) as engine:
        made(engine, Mixes(share))
        with pytest.raises(SelfCheckError):
            engine.self_check(losses, batch(), tolerance=1.0)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_large_loss_hides_no_mixing_of_gradients(offset: float) -> None:
    with closing(PrivacyEngine()) as engine:
        made(engine, Mixes(1e-4))
        with pytest.raises(SelfCheckError, match="all trained parameters changed by") as caught:
            engine.check_mates(lambda model, x: losses(model, x) + offset, batch())
    (found,) = caught.value.report.failures
    assert found.error < 0.01 * found.norm


def test_a_loss_that_mixes_without_a_gradient_is_found() -> None:
    def mixing(model: nn.Module, x: Tensor) -> Tensor:
        found = losses(model, x)
        return found + found.detach().mean()

    with closing(PrivacyEngine()) as engine:
        made(engine, nn.Tanh())
        with pytest.raises(SelfCheckError, match="the loss changed by"):
            engine.check_mates(mixing, batch())


def test_one_backwards_records_are_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a large model are as large as its activations."""
    seen: list[weakref.ref[Any]] = []

    def watching(tape: Any, losses: Tensor) -> list[Any]:
        assert all(record() is None for record in seen)
        records = private_backward(tape, losses)
        seen.extend(map(weakref.ref, records))
        return records

    for module in (mates, self_check):
        monkeypatch.setattr(module, "private_backward", watching)
    with closing(PrivacyEngine()) as engine:
        made(engine, nn.Tanh())
        engine.self_check(losses, batch())
    assert len(seen) > 2 * (2 + 2 * (2 + 3))  # two layers' weights, in two modes, by both checks


@pytest.mark.parametrize("share", [1e-2, 3e-2])
def test_a_half_parameter_that_nothing_is_computed_in_loosens_nothing(share: float) -> None:
    class Idle(Mixes):
        def __init__(self) -> None:
            super().__init__(share)
            self.idle = nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)

    with closing(PrivacyEngine()) as engine:
        made(engine, Idle())
        with pytest.raises(SelfCheckError, match=r"beyond 0\.002"):
            engine.self_check(losses, batch())


def test_computing_in_half_precision_has_its_own_tolerance() -> None:
    with closing(PrivacyEngine()) as engine:
        made(engine, nn.Tanh())
        assert engine.self_check(in_half, batch()).tolerance == 6e-2
        assert engine.self_check(losses, batch()).tolerance == 2e-3


def test_the_others_move_and_are_halved_whatever_the_batch_is_made_of() -> None:
    pair = namedtuple("pair", ["x", "y"])
    x = torch.arange(3.0).view(3, 1) + 1
    given = {
        "x": x,
        "labels": torch.tensor([7, 8, 9]),
        "pair": pair(x, 4),
        "texts": ["a", "b", "c"],
        "whole": torch.ones(2),
    }
    found = with_other_mates(given, 1, 3)
    assert found["x"].tolist() == [[1.5], [2.0], [0.5]]
    assert found["labels"].tolist() == [9, 8, 7]
    assert found["pair"].x.tolist() == found["x"].tolist()
    assert found["pair"].y == 4
    assert found["texts"] == ["c", "b", "a"]
    assert found["whole"].tolist() == [1, 1]
    assert x.tolist() == [[1], [2], [3]]
