"""Layers that read the same tensor are asked for one norm; it is that of all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import Choice, LinearRecord, Record, attach, detach, sharing_inputs, swap
from dpkernels.nn.recording.split import SplitRecord


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


@pytest.mark.parametrize("frames", [5, 40])
def test_layers_of_one_input_are_joined(frames: int) -> None:
    records = records_of(Attention(16), torch.randn(3, frames, 16))
    joined = sharing_inputs(records)
    assert (len(records), len(joined)) == (4, 2)
    assert torch.allclose(norms(joined), norms(records), rtol=1e-3)
    exact = torch.stack(
        [
            torch.einsum("btp,btd->bpd", r.g.double(), r.x.double()).square().sum((1, 2))
            for r in records
            if isinstance(r, LinearRecord)
        ]
    ).sum(0)
    assert (norms(joined) >= exact).all()


@pytest.mark.parametrize("joins", [False, True])
def test_an_example_that_is_materialised_does_not_part_the_others(joins: bool) -> None:
    """With `mixed`, 12 frames of 16 → 16 are kept, and 20 materialised; the bits of the norms of the first two are
    the same beside either."""
    torch.manual_seed(2)
    model = swap(Attention(16))
    x = torch.randn(3, 20, 16)
    x[:2, 12:] = 0

    def of_batch(rows: Tensor) -> Tensor:
        tape = attach(model, choice=Choice(mixed=True))
        losses = (model(rows) * (rows != 0)).sum((1, 2))
        tape.open(len(rows))
        losses.sum().backward()
        records = tape.close()
        detach(model)
        assert any(isinstance(record, SplitRecord) for record in records) == (len(rows) == 3)
        return norms(sharing_inputs(records))

    others = of_batch(x[:2]) if joins else of_batch(x[:2, :12])
    assert torch.equal(of_batch(x)[:2], others)


def test_padding_does_not_change_the_form_of_a_joint_norm() -> None:
    """16 frames of 16 → 16 are in Gram form where q, k and v are joined, and in direct form each alone: see `norms`."""
    torch.manual_seed(1)
    x, gs = torch.randn(2, 16, 16), torch.randn(3, 2, 16, 16)
    weights = [nn.Parameter(torch.zeros(16, 16)) for _ in range(3)]

    def norm_sq(padding: int) -> Tensor:
        longer = torch.nn.functional.pad(x, (0, 0, 0, padding))
        padded = [torch.nn.functional.pad(g, (0, 0, 0, padding)) for g in gs]
        records = [LinearRecord("", w, longer, g) for w, g in zip(weights, padded, strict=True)]
        return norms(sharing_inputs(records))

    torch.testing.assert_close(norm_sq(100), norm_sq(0), rtol=1e-9, atol=0)


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
