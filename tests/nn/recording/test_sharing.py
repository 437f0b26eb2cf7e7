"""Layers that read the same tensor are asked for one norm; it is that of all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import LinearRecord, Record, attach, detach, sharing_inputs, swap


class Attention(nn.Module):
    """Query, key and value of one input, and a fourth layer of another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x) * self.k(x) + self.v(x)))


def records_of(model: nn.Module, x: Tensor) -> list[Record]:
    tape = attach(swap(model))
    loss = model(x).square().sum()
    tape.open(len(x))
    loss.backward()
    records = tape.close()
    detach(model)
    return records


def norms(records: list[Record]) -> Tensor:
    return torch.stack([r.norm_sq().double() for r in records]).sum(0)


@pytest.mark.parametrize(("frames", "asked"), [(5, 2), (40, 4)])
def test_joined_where_gram_is_cheaper(frames: int, asked: int) -> None:
    records = records_of(Attention(16), torch.randn(3, frames, 16))
    joined = sharing_inputs(records)
    assert (len(records), len(joined)) == (4, asked)
    assert torch.allclose(norms(joined), norms(records), rtol=1e-3)
    exact = torch.stack(
        [
            torch.einsum("btp,btd->bpd", r.g.double(), r.x.double()).square().sum((1, 2))
            for r in records
            if isinstance(r, LinearRecord)
        ]
    ).sum(0)
    assert (norms(joined) >= exact).all()


def test_views_of_one_tensor_are_not_one_input() -> None:
    """Same address, other strides or shape: another input."""
    x, weight = torch.randn(2, 6, 8), nn.Parameter(torch.randn(4, 8))
    other = nn.Parameter(torch.randn(4, 8))
    first = LinearRecord("first", weight, x[:, :3], torch.randn(2, 3, 4))
    second = LinearRecord("second", other, x.view(2, 6, 8)[:, ::2], torch.randn(2, 3, 4))
    assert len(sharing_inputs([first, second])) == 2
    assert len(sharing_inputs([first, LinearRecord("third", other, x[:, :3], torch.randn(2, 3, 4))])) == 1


def test_other_records_pass_through() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    records = records_of(model, torch.randn(2, 3, 8))
    assert sorted(map(id, sharing_inputs(records))) == sorted(map(id, records))


def test_catches_a_layer_left_out() -> None:
    """The check above is one that a dropped output gradient fails."""
    records = records_of(Attention(16), torch.randn(3, 5, 16))
    assert not torch.allclose(norms(sharing_inputs(records[1:])), norms(records), rtol=1e-3)
