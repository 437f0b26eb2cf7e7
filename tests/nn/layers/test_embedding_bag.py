"""Bags of ids, of one length and ragged: torch's values, each bag's own gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import EmbeddingRecord, GhostEmbeddingBag, attach, detach, swap, uncovered, unswap
from tests.nn.per_sample import Private, assert_same_module, check_private, run_private

V, D = 7, 3
IDS = torch.tensor([[1, 2, 2, 5], [6, 6, 6, 6], [0, 5, 1, 5]])
LENGTHS = [3, 0, 4, 1]
FLAT = torch.tensor([1, 2, 2, 5, 0, 5, 6, 5])
OPTIONS: list[dict[str, Any]] = [{"mode": "sum"}, {"mode": "mean"}, {"mode": "sum", "padding_idx": 5}]
OPTIONS += [{"mode": "mean", "padding_idx": 5}, {"mode": "mean", "padding_idx": 6}]


def squares(model: nn.Module, *batch: Tensor) -> Tensor:
    y = model(*batch)
    y = y if y.dtype is torch.float64 else y.float()
    return (torch.tanh(y) ** 2 + y).sum(1)


def bag(dtype: torch.dtype = torch.float64, **options: Any) -> nn.EmbeddingBag:
    layer = nn.EmbeddingBag(V, D, dtype=dtype, **options)
    nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_bags_of_one_length(options: dict[str, Any], dtype: torch.dtype) -> None:
    plain = bag(dtype, **options)
    ghost = swap(copy.deepcopy(plain))
    assert type(ghost) is GhostEmbeddingBag
    assert_same_module(plain, ghost)
    tape = attach(ghost)
    for ids in (IDS, IDS.int()):
        y = ghost(ids)
        assert torch.equal(y, plain(ids))
        tape.open(len(ids))
        y.sum().backward()
        assert [type(r) for r in tape.close()] == [EmbeddingRecord]
    detach(ghost)
    assert type(unswap(ghost)) is nn.EmbeddingBag
    check_private(plain, squares, (IDS,))


class Weighted(nn.Module):
    """The weights of the ids come from a trained layer: they must get their gradient, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.scores, self.bag = nn.Embedding(V, 1), bag(mode="sum", **options)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bag(ids, per_sample_weights=torch.tanh(self.scores(ids)).squeeze(-1))


@pytest.mark.parametrize("padding_idx", [None, 5])
@pytest.mark.parametrize("frozen", ["", "bag", "scores"])
def test_weighted_bags(frozen: str, padding_idx: int | None) -> None:
    model = Weighted(padding_idx=padding_idx).double()
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or not name.startswith(frozen))
    check_private(model, squares, (IDS,))


class Ragged(nn.Module):
    """Bags of LENGTHS, by offsets, of FLAT; and one of them alone."""

    def __init__(self, weighted: bool = False, only: int | None = None, **options: Any) -> None:
        super().__init__()
        self.bag, self.only, self.weighted = bag(**options), only, weighted

    def forward(self) -> Tensor:
        lengths, ids = LENGTHS, FLAT
        weights = torch.linspace(-1, 2, len(FLAT), dtype=torch.float64) if self.weighted else None
        if self.only is not None:
            part = slice(sum(LENGTHS[: self.only]), sum(LENGTHS[: self.only + 1]))
            lengths, ids = [LENGTHS[self.only]], FLAT[part]
            weights = None if weights is None else weights[part]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        return self.bag(ids, bounds if self.bag.include_last_offset else bounds[:-1], weights)


@pytest.mark.parametrize("include_last_offset", [False, True])
@pytest.mark.parametrize(
    ("options", "weighted"), [*((o, False) for o in OPTIONS), (OPTIONS[0], True), (OPTIONS[2], True)]
)
def test_ragged_bags(options: dict[str, Any], weighted: bool, include_last_offset: bool) -> None:
    model = Ragged(weighted, include_last_offset=include_last_offset, **options)
    want = []
    for model.only in range(len(LENGTHS)):
        (gradient,) = torch.autograd.grad(squares(model).sum(), model.bag.weight)
        want.append(gradient)
    model.only = None
    exact = torch.stack(want)
    factors = torch.rand(len(LENGTHS))
    private: Private = run_private(swap(copy.deepcopy(model)), squares, (), factors)
    assert torch.equal(private.losses, squares(model).detach())
    squared = exact.flatten(1).square().sum(1)
    torch.testing.assert_close(private.norm_sq, squared, rtol=1e-3, atol=1e-30)
    assert bool((private.norm_sq >= squared * (1 - 1e-9)).all())
    torch.testing.assert_close(
        private.sums["bag.weight"], torch.einsum("b,bvd->vd", factors.double(), exact), rtol=1e-9, atol=1e-12
    )


def test_gradients_of_the_weights_of_ragged_bags() -> None:
    found = []
    for layer in (bag(mode="sum", padding_idx=5), swap(bag(mode="sum", padding_idx=5))):
        nn.init.constant_(layer.weight, 0.3)
        weights = torch.linspace(-1, 2, len(FLAT), dtype=torch.float64, requires_grad=True)
        if isinstance(layer, GhostEmbeddingBag):
            tape = attach(layer)
        y = layer(FLAT, torch.tensor([0, 3, 3, 7]), weights)
        if isinstance(layer, GhostEmbeddingBag):
            tape.open(4)
        (y * torch.arange(4).view(4, 1)).sum().backward()
        found.append(weights.grad)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("offsets", [[1, 3], [0, 9], [0, 5, 3], []])
def test_offsets_that_do_not_say_whose_an_id_is_are_refused(offsets: list[int]) -> None:
    model = nn.Sequential(swap(bag(mode="sum")))
    attach(model)
    with pytest.raises(ValueError, match=r"'0': offsets must begin with 0.*each of the 8 ids"):
        model[0](FLAT, torch.tensor(offsets, dtype=torch.int64))
    last = nn.Sequential(swap(bag(mode="sum", include_last_offset=True)))
    attach(last)
    with pytest.raises(ValueError, match="include_last_offset=True"):
        last[0](FLAT, torch.tensor([0, 3, 7]))


@pytest.mark.parametrize(
    "options",
    [{"mode": "max"}, {"max_norm": 1.0}, {"sparse": True, "mode": "sum"}, {"scale_grad_by_freq": True}],
)
def test_what_has_no_rule_is_named(options: dict[str, Any]) -> None:
    (found,) = uncovered(swap(nn.Sequential(nn.EmbeddingBag(V, D, **options))))
    assert found.name == "0.weight"
    assert str(next(k for k in options if k != "mode" or options[k] == "max")) in found.reason


def test_a_reused_table_merges() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.embedding = bag(mode="mean"), nn.Embedding(V, D)
            self.embedding.weight = self.bag.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.bag(ids) * self.bag(ids.flip(1)[:, :2]) + self.embedding(ids).sum(1)

    private = check_private(Twice().double(), squares, (IDS,))
    assert len(private.records) == 1
