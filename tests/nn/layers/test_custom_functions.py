"""Tensors that examples share do not go through a custom autograd.Function: their gradient would be lost there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nn.per_sample import check_private


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g


class Bias(nn.Module):
    """A raw parameter in a module with children, tripled."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.randn(4))
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        with torch.no_grad():
            scale = 1 + self.bias.norm()
        return h * scale + Tripled.apply(self.bias) if self.shared else Tripled.apply(h * scale + self.bias)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1)


def test_it_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match=r"bias.*autograd\.Function"):
        check_private(Bias(shared=True).double(), loss, (torch.randn(3, 5, 4).double(),))


def test_tensors_with_the_batch_and_no_grad_are_right() -> None:
    check_private(Bias(shared=False).double(), loss, (torch.randn(3, 5, 4).double(),))
