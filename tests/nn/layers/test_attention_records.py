"""PackedLinearRecord: blocks of rows that are there or not, merged, materialised, and as one linear layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import PackedLinearRecord
from dpkernels.nn.layers.attention_records import RowBlock


def exact_gradients(record: PackedLinearRecord) -> Tensor:
    exact = torch.zeros(record.batch_size, *record.weight.shape, dtype=torch.float64)
    for block in record.blocks:
        exact[:, block.rows] = torch.einsum("btp,btd->bpd", block.g.double(), block.x.double())
    return exact


def blocks(*places: tuple[int, int]) -> tuple[RowBlock, ...]:
    """(first row, rows) of each."""
    return tuple(RowBlock(first, torch.randn(2, 4, 3), torch.randn(2, 4, rows)) for first, rows in places)


PLACES = [((0, 1), (4, 2)), ((0, 2),), ((2, 2),), ((0, 2), (2, 4)), ((0, 6),)]


@pytest.mark.parametrize("second", [None, *PLACES])
@pytest.mark.parametrize("first", PLACES)
def test_packed_records_where_rows_are_missing(first: Any, second: Any) -> None:
    """A block whose output got no gradient is left out: its rows are 0 in every form, and what merges adds up."""
    weight = nn.Parameter(torch.zeros(6, 3))
    record: Any = PackedLinearRecord("layer", weight, blocks(*first))
    assert record.held_bytes() == sum(4 * (b.x.numel() + b.g.numel()) for b in record.blocks)
    exact = exact_gradients(record)
    if second is not None:
        other = PackedLinearRecord("other", weight, blocks(*second))
        exact = exact + exact_gradients(other)
        record = record.merge(other)
        assert isinstance(record, PackedLinearRecord) == (first == second)
    factors = torch.tensor([0.5, 2.0])
    want = torch.einsum("b,bpd->pd", factors.double(), exact)
    squares = exact.flatten(1).square().sum(1)
    for form in (record, record.as_linear(torch.float32), *record.materialised()):
        total = torch.zeros(6, 3, dtype=torch.float64)
        form.add_weighted_sum(factors, {weight: total})
        torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(form.norm_sq().double(), squares, rtol=1e-3, atol=0)
        assert bool((form.norm_sq().double() >= squares * (1 - 1e-6)).all())
