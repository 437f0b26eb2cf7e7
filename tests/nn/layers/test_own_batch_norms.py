"""Batch norms with a forward of their own: frozen as they evaluate, or refused by name."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpkernels
from dpkernels.nn import (
    FrozenOwnBatchNorm,
    attach,
    batch_norms_in_training,
    freeze_batch_norm,
    swap,
    uncovered,
    unswap,
)
from tests.nn.layers.test_norm import cubes, randomised
from tests.nn.per_sample import assert_same_module, check_private


class Inherited(nn.BatchNorm2d):
    """Nothing of its own."""


class Thin(nn.BatchNorm1d):
    """Channels last, then an activation."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(super().forward(input.transpose(1, 2)).transpose(1, 2))


class CutAndPaste(nn.BatchNorm2d):
    """Written as timm's BatchNormAct2d: torch's forward over again, and an activation in place."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0.0,
            self.eps,
        )
        return self.act(x)


class Split(nn.BatchNorm2d):
    """As timm's SplitBatchNorm2d: in training the batch's halves have statistics of their own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.other = nn.BatchNorm2d(*sizes).requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        first, second = input.chunk(2)
        return torch.cat([super().forward(first), self.other(second)])


class Checked(nn.BatchNorm3d):
    """Checks its input in a way of its own."""

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.shape[1] == self.num_features


KINDS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: Inherited(3), (4, 3, 5, 2)),
    (lambda: Thin(3), (4, 5, 3)),
    (lambda: CutAndPaste(3), (4, 3, 5, 2)),
    (lambda: CutAndPaste(3, momentum=None), (3, 3, 2, 2)),
    (lambda: CutAndPaste(3, affine=False), (4, 3, 5, 2)),
    (lambda: Split(3), (4, 3, 5, 2)),
    (lambda: Checked(3), (2, 3, 2, 2, 2)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("make", "shape"), KINDS)
def test_it_trains_as_it_evaluates(make: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = randomised(nn.Sequential(nn.Tanh(), make(), nn.Tanh())).to(dtype)
    x = torch.randn(shape).to(dtype)
    state = copy.deepcopy(plain.state_dict())
    frozen = freeze_batch_norm(copy.deepcopy(plain))
    assert isinstance(frozen[1], FrozenOwnBatchNorm)
    assert isinstance(frozen[1], type(plain[1]))
    assert_same_module(plain, frozen)
    want = plain.eval()(x)
    assert torch.equal(frozen.train()(x), want)
    assert frozen[1].training
    assert batch_norms_in_training(frozen) == []
    if plain[1].affine:
        check_private(frozen, cubes, (x,))
        assert not uncovered(swap(frozen))
    for name, t in frozen.state_dict().items():
        assert torch.equal(t, state[name])


@pytest.mark.parametrize(("make", "shape"), KINDS)
def test_a_frozen_one_is_copied_and_saved_frozen(make: Any, shape: tuple[int, ...]) -> None:
    model = swap(freeze_batch_norm(randomised(nn.Sequential(nn.Tanh(), make()))))
    x, file = torch.randn(shape), io.BytesIO()
    want = model(x)
    attach(model)
    torch.save(model, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), copy.deepcopy(model), unswap(copy.deepcopy(model))):
        assert type(again[1]) is type(model[1])
        assert again[1].ghost_tape is None
        torch.testing.assert_close(again.train()(x), want)


class OwnArithmetic(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        over = (1, -1, 1, 1)
        return (x - self.running_mean.view(over)) * self.weight.view(over)


class TwiceWeighted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.weight.norm()


class OthersBias(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, -self.bias, eps=self.eps)


class AlwaysByBatch(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps
        )


class OtherEps(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.5)


class Centred(CutAndPaste):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Counting(CutAndPaste):
    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return super().forward(x)


class Demanding(CutAndPaste):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < 100:
            raise ValueError("at least 100 columns")
        return super().forward(x)


REFUSED = [
    (OwnArithmetic, "does not normalise by torch.nn.functional.batch_norm"),
    (TwiceWeighted, "uses its weight or bias for more than batch_norm"),
    (OthersBias, "another weight or bias than its own"),
    (AlwaysByBatch, "in training mode or with another eps"),
    (OtherEps, "in training mode or with another eps"),
    (Centred, "mixes the samples of a batch"),
    (Counting, "changes its parameters or buffers in evaluation mode"),
    (Demanding, r"raises for an input of \[2, 3, 2, 2\]: at least 100 columns"),
]


@pytest.mark.parametrize(("own_class", "says"), REFUSED)
def test_what_cannot_be_frozen_is_refused_by_name_and_stays(own_class: Any, says: str) -> None:
    model = nn.Sequential(nn.Tanh(), own_class(3)).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"freeze_batch_norm: '1' \({own_class.__name__}\): .*{says}"):
        freeze_batch_norm(model)
    assert type(model[1]) is own_class
    assert all(m.training for m in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not dpkernels.fix(model).complete


def test_fix_freezes_them() -> None:
    report = dpkernels.fix(model := nn.Sequential(nn.Conv2d(3, 3, 1), CutAndPaste(3)))
    assert report.complete
    assert "CutAndPaste -> FrozenCutAndPaste" in str(report)
    assert dpkernels.coverage(model).complete


def test_timms_batch_norm_with_an_activation() -> None:
    timm = pytest.importorskip("timm")
    plain = randomised(nn.Sequential(nn.Tanh(), timm.layers.BatchNormAct2d(3))).double()
    x = torch.randn(4, 3, 5, 2).double()
    frozen = freeze_batch_norm(copy.deepcopy(plain)).train()
    assert torch.equal(frozen(x), plain.eval()(x))
    check_private(frozen, cubes, (x,))
