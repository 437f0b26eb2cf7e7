"""Group and instance norms: torch's values, each example's own gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dpkernels.nn import BiasRecord, GhostGroupNorm, NormRecord, attach, detach, swap, uncovered, unswap
from tests.nn.layers.test_norm import cubes, randomised
from tests.nn.per_sample import assert_same_module, check_private

CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "groups": (lambda: nn.GroupNorm(2, 6), (4, 6, 5)),
    "groups of images": (lambda: nn.GroupNorm(3, 6, eps=1e-2), (4, 6, 3, 2)),
    "groups of vectors": (lambda: nn.GroupNorm(2, 6), (4, 6)),
    "groups of volumes": (lambda: nn.GroupNorm(6, 6), (4, 6, 2, 2, 3)),
    "one group": (lambda: nn.GroupNorm(1, 6), (4, 6, 5)),
    "instance 1d": (lambda: nn.InstanceNorm1d(6, affine=True), (4, 6, 5)),
    "instance 2d": (lambda: nn.InstanceNorm2d(6, affine=True, eps=1e-2), (4, 6, 3, 2)),
    "instance 3d": (lambda: nn.InstanceNorm3d(6, affine=True), (4, 6, 2, 2, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    make, shape = CASES[name]
    plain = randomised(make()).to(dtype)
    ghost = swap(copy.deepcopy(plain))
    assert type(ghost).__name__ == f"Ghost{type(plain).__name__}"
    assert_same_module(plain, ghost)
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    tape = attach(ghost)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = plain(x1), ghost(x2)
    assert torch.equal(y1, y2)
    tape.open(len(x))
    g = torch.randn(shape).to(dtype)
    y1.backward(g)
    y2.backward(g)
    assert [type(r) for r in tape.close()] == [NormRecord, BiasRecord]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 2e-2)
    assert (x1.grad.double() - x2.grad.double()).norm() <= tolerance * x1.grad.double().norm()
    detach(ghost)
    assert type(unswap(ghost)) is type(plain)
    check_private(nn.Sequential(nn.Tanh(), plain, nn.Tanh()), cubes, (x,))


class Transposed(nn.Module):
    """Its layer's input and output gradient are views of [B,T,C]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
@pytest.mark.parametrize("name", ["groups", "instance 1d"])
def test_frozen_parts_and_views(name: str, frozen: str) -> None:
    make, _ = CASES[name]
    layers = [randomised(make()) for _ in range(2)]
    for layer in layers:
        if frozen:
            getattr(layer, frozen).requires_grad_(False)
    plain = nn.Sequential(nn.Tanh(), Transposed(layers[0]), nn.Tanh(), Transposed(layers[1])).double()
    check_private(plain, cubes, (torch.randn(4, 5, 6, dtype=torch.float64),))


def test_a_reused_norm_merges() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = randomised(nn.GroupNorm(2, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    private = check_private(Twice().double(), cubes, (torch.randn(3, 6, 4, dtype=torch.float64),))
    assert len(private.records) == 2


def test_an_instance_without_a_batch_is_one_example() -> None:
    plain = randomised(nn.InstanceNorm1d(6, affine=True))
    ghost = swap(copy.deepcopy(plain))
    tape = attach(ghost)
    x = torch.randn(6, 5)
    y = ghost(x)
    assert torch.equal(y, plain(x))
    tape.open(1)
    y.pow(3).sum().backward()
    assert [r.batch_size for r in tape.close()] == [1, 1]


def test_autocast_gives_the_dtype_that_torch_gives() -> None:
    for name in ("groups", "instance 2d"):
        make, shape = CASES[name]
        plain = randomised(make())
        ghost = swap(copy.deepcopy(plain))
        tape = attach(ghost)
        x = torch.randn(shape)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            want, y = plain(x), ghost(x)
        assert torch.equal(want, y)
        assert want.dtype is y.dtype
        tape.open(len(x))
        y.float().sum().backward()
        tape.close()


def test_running_statistics_are_refused_by_name() -> None:
    model = swap(nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)))
    found = uncovered(model)
    assert [u.name for u in found] == ["0.weight", "0.bias"]
    assert all("track_running_stats=False" in u.reason for u in found)
    assert uncovered(model.requires_grad_(False)) == []
    assert uncovered(swap(nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)))) == []


def test_gradcheck() -> None:
    layer: Any = GhostGroupNorm(2, 4).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    tape = attach(layer)

    def forward(x: torch.Tensor) -> torch.Tensor:
        tape.discard()
        y = layer(x)
        tape.open(2)
        return y

    assert torch.autograd.gradcheck(forward, (x,))
    tape.discard()
