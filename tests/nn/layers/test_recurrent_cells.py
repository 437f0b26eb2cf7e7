from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import (
    BiasRecord,
    GhostGRUCell,
    GhostLSTMCell,
    GhostRNNCell,
    LinearRecord,
    attach,
    detach,
    swap,
    uncovered,
    unswap,
)
from tests.nn.per_sample import assert_same_module, check_private

KINDS: dict[str, Callable[..., Any]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": partial(nn.RNNCell, nonlinearity="relu"),
}
GHOSTS = {nn.LSTMCell: GhostLSTMCell, nn.GRUCell: GhostGRUCell, nn.RNNCell: GhostRNNCell}
ANY_KIND = pytest.mark.parametrize("kind", KINDS)


class Loop(nn.Module):
    """A cell at every step of [B,T,d]."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, *first: Tensor) -> Tensor:
        hx: Any = None if not first else first if len(first) > 1 else first[0]
        outs = []
        for x_t in x.unbind(1):
            hx = self.cell(x_t, hx)
            outs.append(hx[0] if isinstance(hx, tuple) else hx)
        return torch.stack(outs, 1)


def squares(model: nn.Module, x: Tensor, *first: Tensor) -> Tensor:
    y = model(x, *first)
    return ((y if y.dtype is torch.float64 else y.float()) ** 2).sum((1, 2))


def states_of(cell: nn.Module, batch: int) -> list[Tensor]:
    return [torch.randn(batch, 4) for _ in range(1 + isinstance(cell, nn.LSTMCell))]


@pytest.mark.thinned(5)
@ANY_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_states", [True, False])
def test_a_loop_is_one_record_of_each_parameter(
    kind: str, dtype: torch.dtype, bias: bool, with_states: bool
) -> None:
    model = Loop(KINDS[kind](3, 4, bias=bias)).to(dtype)
    first = states_of(model.cell, 3) if with_states else []
    private = check_private(model, squares, tuple(t.to(dtype) for t in (torch.randn(3, 6, 3), *first)))
    assert len(private.records) == (4 if bias else 2)
    assert {type(r) for r in private.records} <= {LinearRecord, BiasRecord}


@ANY_KIND
@pytest.mark.parametrize("autocast", [False, True])
def test_results_are_torchs(kind: str, autocast: bool) -> None:
    plain = KINDS[kind](3, 4)
    ghost: Any = swap(copy.deepcopy(plain))
    x, first = torch.randn(5, 3), states_of(plain, 5)
    hx: Any = tuple(first) if len(first) == 2 else first[0]
    attach(ghost)
    for given in (hx, None):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            want, got = plain(x, given), ghost(x, given)
        for one, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (want, got)), strict=True):
            assert one.dtype is other.dtype
            torch.testing.assert_close(other, one)
    detach(ghost)


@ANY_KIND
def test_state_and_swap_are_torchs(kind: str) -> None:
    plain = KINDS[kind](3, 4)
    swapped: Any = swap(copy.deepcopy(plain))
    assert type(swapped) is GHOSTS[type(plain)]
    assert_same_module(plain, swapped)
    assert uncovered(swapped) == []
    x = torch.randn(3)  # not private: an input without a batch is torch's to take
    torch.testing.assert_close(swapped(x), plain(x))
    assert type(unswap(swapped)) is type(plain)


@ANY_KIND
def test_what_has_no_batch_is_refused_by_name(kind: str) -> None:
    model: Any = swap(nn.ModuleDict({"cell": KINDS[kind](3, 4)}))
    attach(model)
    with pytest.raises(ValueError, match=r"'cell': its input has shape \[3\]"):
        model["cell"](torch.randn(3))
    for state in (torch.zeros(4), torch.zeros(1, 4)):
        hx: Any = (torch.zeros(2, 4), state) if kind == "lstm" else state
        with pytest.raises(ValueError, match=r"'cell': its hx has shape \[(1, )?4\]"):
            model["cell"](torch.randn(2, 3), hx)
    detach(model)
