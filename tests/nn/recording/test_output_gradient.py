"""`Record.output_gradient`: scaled with each example's loss, whichever of a record's tensors it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import Record, Tape, attach, swap
from dpkernels.nn.layers.linear import ghost_linear
from dpkernels.nn.recording.module import GhostModule


class Backwards(GhostModule, nn.Module):
    """y = x W, as GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return ghost_linear(self, x.transpose(1, 2), self.weight, None, transposed=True)


class Attending(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return self.attention(x, x[:, :3], x[:, 1:4], need_weights=False)[0]


LAYERS: list[Any] = [
    Backwards,
    Attending,
    lambda: Attending(kdim=4, vdim=4, add_bias_kv=True),
    lambda: nn.Conv1d(4, 6, 3),
    lambda: nn.Conv1d(4, 4, 3, groups=4),
    lambda: nn.ConvTranspose1d(4, 6, 1),
    lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
    lambda: nn.ConvTranspose1d(4, 4, 3, groups=4, stride=2, output_padding=1),
    lambda: nn.ConvTranspose1d(4, 2, 3, groups=2),
    lambda: nn.GroupNorm(2, 4),
    lambda: nn.InstanceNorm1d(4, affine=True),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("materialised", [False, True])
def test_it_is_linear_in_the_losses_example_by_example(
    make: Any, materialised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Tape, "_materialises", lambda _, record: materialised and record.entries() is not None
    )
    model = swap(make().double())
    tape = attach(model)
    weights = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    y = model(torch.randn(3, 4, 7, dtype=torch.float64))
    losses = torch.tanh(y).square().flatten(1).sum(1)
    found: list[list[Record]] = []
    for scale in (torch.ones(3, dtype=torch.float64), weights):
        tape.open(3)
        (losses * scale).sum().backward(retain_graph=True)
        found.append(tape.close(again=True))
    tape.discard()
    for plain, scaled in zip(*found, strict=True):
        g = plain.output_gradient
        assert len(g) == 3
        assert bool(g.any())
        torch.testing.assert_close(
            scaled.output_gradient, g * weights.view(3, *(1,) * (g.dim() - 1)), rtol=1e-9, atol=1e-12
        )
