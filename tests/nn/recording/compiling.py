"""What the tests of compiled models share: a small model, its batches, and records that are compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dpkernels import nn as ghost
from dpkernels.nn import Record, norms_sq


class Net(nn.Module):
    """Linear layers and a norm, with code between them that a compiler fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x)) * 1.5)).mean(1)


def private(model: nn.Module) -> ghost.Tape:
    return ghost.attach(ghost.swap(model))


def batch(size: int, length: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size * 100 + length)
    return torch.randn(size, length, 6, generator=generator), torch.arange(size) % 3


def records(model: Callable[..., Tensor], tape: ghost.Tape, x: Tensor, y: Tensor) -> list[Record]:
    return records_of(tape, cross_entropy(model(x), y, reduction="none"))


def records_of(tape: ghost.Tape, losses: Tensor) -> list[Record]:
    tape.open(len(losses))
    losses.sum().backward()
    return tape.close()


def sums(found: list[Record]) -> dict[nn.Parameter, Tensor]:
    totals = {p: torch.zeros(p.shape, dtype=torch.float64) for record in found for p in record.parameters}
    ghost.add_weighted_sums(found, torch.linspace(0.1, 1, found[0].batch_size), totals)
    return totals


def same(first: list[Record], second: list[Record]) -> bool:
    """Whether norms and sums of two backwards of one model agree to rounding, for the same parameters."""
    norms = [torch.stack(norms_sq(found)).sum(0) for found in (first, second)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=1e-7)
    one, two = sums(first), sums(second)
    assert one.keys() == two.keys()
    for parameter, total in one.items():
        torch.testing.assert_close(two[parameter], total, rtol=1e-5, atol=1e-6)
    return True
