"""GhostMultiheadAttention and its packed record: against torch's values, and against one-by-one gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dpkernels.nn import (
    GhostMultiheadAttention,
    GhostOutProjection,
    LinearRecord,
    PackedLinearRecord,
    attach,
    detach,
    ghost_subclass,
    register_swap,
    swap,
    uncovered,
    unswap,
)
from dpkernels.nn.convert.swapping import _ORIGINALS, _SWAPS
from tests.nn.per_sample import assert_same_module, check_private, run_private

B, T, S, E, HEADS = 3, 4, 5, 8, 2
Masks = Callable[[int, int, int], dict[str, Tensor]]  # of batch, T, S


def randomised(module: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    for p in module.parameters():  # torch starts the biases at 0
        nn.init.normal_(p, std=0.4)
    return module.to(dtype)


class Attending(nn.Module):
    """Batches [B,T,E] (keys and values [B,S,·]) through attention of either layout; its weights enter the loss."""

    def __init__(
        self, attention: nn.MultiheadAttention, which: str, masks: Masks | None, **options: Any
    ) -> None:
        super().__init__()
        self.attention, self.which, self.masks, self.options = attention, which, masks, options

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor | None]:
        given = [torch.tanh(t) for t in (x, *others)]
        places = {"self": (0, 0, 0), "cross": (0, 1, 1), "apart": (0, 1, 2), "keys": (0, 0, 1)}[self.which]
        masks = {} if self.masks is None else self.masks(len(x), x.shape[1], given[places[1]].shape[1])
        masks = {n: m.to(x.dtype) if m.is_floating_point() else m for n, m in masks.items()}
        if not self.attention.batch_first:
            given = [t.transpose(0, 1) for t in given]
        y, weights = self.attention(*(given[i] for i in places), **masks, **self.options)
        return y if self.attention.batch_first else y.transpose(0, 1), weights


def loss(model: nn.Module, *batch: Tensor) -> Tensor:
    y, weights = model(*batch)
    total = torch.tanh(y).square().flatten(1).sum(1)
    return total if weights is None else total + (weights**2).flatten(1).sum(1)


def causal(batch: int, frames: int, source: int) -> dict[str, Tensor]:
    return {"attn_mask": torch.ones(frames, source, dtype=torch.bool).triu(1)}


def by_head(batch: int, frames: int, source: int) -> dict[str, Tensor]:
    """The same for each example, so that one alone gets its own, too."""
    mask = torch.linspace(-1, 1, HEADS * frames * source).view(HEADS, frames, source)
    return {"attn_mask": mask.repeat(batch, 1, 1)}


def padded(batch: int, frames: int, source: int) -> dict[str, Tensor]:
    return {"key_padding_mask": (torch.arange(source) >= source - 1).expand(batch, -1)}


def both(batch: int, frames: int, source: int) -> dict[str, Tensor]:
    return causal(batch, frames, source) | padded(batch, frames, source)


CASES: dict[str, tuple[dict[str, Any], str, Masks | None, dict[str, Any]]] = {
    "self": ({}, "self", None, {}),
    "self, no weights": ({}, "self", None, {"need_weights": False}),
    "weights by head": ({}, "self", None, {"average_attn_weights": False}),
    "no bias": ({"bias": False}, "cross", None, {"need_weights": False}),
    "cross": ({}, "cross", None, {}),
    "apart": ({}, "apart", None, {"need_weights": False}),
    "query is key": ({}, "keys", None, {}),
    "kdim and vdim": ({"kdim": 6, "vdim": 5}, "apart", None, {}),
    "kdim and vdim, no bias": ({"kdim": 6, "vdim": 5, "bias": False}, "apart", None, {"need_weights": False}),
    "added": ({"add_bias_kv": True, "add_zero_attn": True}, "cross", both, {}),
    "added, no weights": ({"add_bias_kv": True}, "self", both, {"need_weights": False}),
    "added zero": ({"add_zero_attn": True}, "self", by_head, {"need_weights": False}),
    "causal": ({}, "self", causal, {"is_causal": True, "need_weights": False}),
    "causal with weights": ({}, "self", causal, {"is_causal": True}),
    "causal, padded": ({}, "self", both, {"is_causal": True, "need_weights": False}),
    "padded": ({}, "cross", padded, {"need_weights": False}),
    "by head": ({}, "self", by_head, {}),
}


def case(name: str, batch_first: bool, dtype: torch.dtype) -> tuple[Attending, tuple[Tensor, ...]]:
    kwargs, which, masks, options = CASES[name]
    attention = randomised(nn.MultiheadAttention(E, HEADS, batch_first=batch_first, **kwargs), dtype)
    length = T if which == "keys" else S
    others = (torch.randn(B, length, attention.kdim), torch.randn(B, length, attention.vdim))
    count = {"self": 0, "cross": 1, "keys": 1, "apart": 2}[which]
    batch = tuple(t.to(dtype) for t in (torch.randn(B, T, E), *others[:count]))
    return Attending(attention, which, masks, **options), batch


@pytest.mark.thinned(5)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_each_examples_own(name: str, batch_first: bool) -> None:
    model, batch = case(name, batch_first, torch.float64)
    check_private(model, loss, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["self", "cross", "kdim and vdim", "added, no weights"])
def test_gradients_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    model, batch = case(name, True, dtype)
    check_private(model, lambda m, *xs: loss(m, *xs).float(), batch)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_values_and_input_gradients_are_torchs(name: str, batch_first: bool) -> None:
    plain, batch = case(name, batch_first, torch.float64)
    ghost = swap(copy.deepcopy(plain))
    assert type(ghost.attention) is GhostMultiheadAttention
    assert type(ghost.attention.out_proj) is GhostOutProjection
    assert_same_module(plain, ghost)
    tape = attach(ghost)
    ours, theirs = ([t.clone().requires_grad_() for t in batch] for _ in range(2))
    (y, weights), (want_y, want_weights) = ghost(*ours), plain(*theirs)
    torch.testing.assert_close(y, want_y, rtol=1e-12, atol=1e-13)
    assert (weights is None) == (want_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, want_weights, rtol=1e-12, atol=1e-13)
    tape.open(B)
    loss(lambda *_: (y, weights), *ours).sum().backward()
    loss(lambda *_: (want_y, want_weights), *theirs).sum().backward()
    tape.close()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-10, atol=1e-12)
    detach(ghost)
    assert type(unswap(ghost).attention) is nn.MultiheadAttention
    assert type(ghost.attention.out_proj) is type(plain.attention.out_proj)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_draws_what_torch_draws(batch_first: bool, need_weights: bool) -> None:
    plain = randomised(nn.MultiheadAttention(E, HEADS, dropout=0.4, batch_first=batch_first))
    ghost = swap(copy.deepcopy(plain))
    attach(ghost)
    x = torch.randn(B, T, E)
    found = []
    for layer in (plain, ghost):
        torch.manual_seed(3)
        found.append(layer(x, x, x, need_weights=need_weights))
    torch.testing.assert_close(found[1], found[0])
    assert not torch.equal(ghost(x, x, x)[0], ghost(x, x, x)[0])
    ghost.eval()
    assert torch.equal(ghost(x, x, x)[0], ghost(x, x, x)[0])


def test_autocast_gives_torchs_values_and_dtypes() -> None:
    plain = randomised(nn.MultiheadAttention(E, HEADS, batch_first=True, add_bias_kv=True))
    ghost = swap(copy.deepcopy(plain))
    tape = attach(ghost)
    x = torch.randn(B, T, E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for need_weights in (True, False):
            want, got = (layer(x, x, x, need_weights=need_weights) for layer in (plain, ghost))
            torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    tape.open(B)
    got[0].float().sum().backward()
    assert all(bool(r.norm_sq().isfinite().all()) for r in tape.close())


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_input_without_a_batch_is_one_example(batch_first: bool) -> None:
    plain = randomised(nn.MultiheadAttention(E, HEADS, batch_first=batch_first))
    ghost = swap(copy.deepcopy(plain))
    tape = attach(ghost)
    x, padding = torch.randn(T, E), torch.arange(T) >= T - 1
    mask = torch.randn(HEADS, T, T)
    want = plain(x, x, x, key_padding_mask=padding.float(), attn_mask=mask)
    y, weights = ghost(x, x, x, key_padding_mask=padding.float(), attn_mask=mask)
    torch.testing.assert_close((y, weights), want)
    tape.open(1)
    y.sum().backward()
    assert {r.batch_size for r in tape.close()} == {1}


def test_records_of_one_projection() -> None:
    kinds = {"self": LinearRecord, "cross": PackedLinearRecord, "apart": PackedLinearRecord}
    for name, kind in kinds.items():
        model, batch = case(name, True, torch.float32)
        records = run_private(swap(model), loss, batch).records
        packed = [r for r in records if getattr(r, "weight", None) is model.attention.in_proj_weight]
        assert [type(r) for r in packed] == [kind]


@pytest.mark.parametrize(
    "frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "in_proj", "out_proj"]
)
def test_frozen_parts(frozen: str) -> None:
    for name in ("self", "cross"):
        model, batch = case(name, False, torch.float64)
        for parameter, p in model.attention.named_parameters():
            p.requires_grad_(not parameter.startswith(frozen))
        check_private(model, loss, batch)


def test_a_frozen_layer_is_torchs() -> None:
    plain = randomised(nn.MultiheadAttention(E, HEADS, batch_first=True)).requires_grad_(False)
    ghost = swap(copy.deepcopy(plain))
    attach(ghost)
    x = torch.randn(B, T, E, requires_grad=True)
    assert torch.equal(ghost(x, x, x)[0], plain(x, x, x)[0])


class Twice(nn.Module):
    """One attention for self-attention and for cross-attention, in any order: its uses of the packed weight merge."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.attention, self.order = randomised(nn.MultiheadAttention(E, HEADS, batch_first=True)), order

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, None]:
        for use in self.order:
            key, value = {"s": (x, x), "c": (memory, memory), "a": (memory, memory.flip(1))}[use]
            x = torch.tanh(x + self.attention(x, key, value, need_weights=False)[0])
        return x, None


@pytest.mark.parametrize("order", ["ss", "cc", "sc", "cs", "ca", "aa", "sca"])
def test_reused_attention_keeps_its_cross_terms(order: str) -> None:
    batch = (torch.randn(B, T, E, dtype=torch.float64), torch.randn(B, S, E, dtype=torch.float64))
    private = check_private(Twice(order).double(), loss, batch)
    assert len(private.records) == 4


def test_a_projection_without_gradient_adds_nothing() -> None:
    class ValuesOnly(nn.Module):
        """With one key the weights are 1 whatever q and k are; and its keys' output is not used at all."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = randomised(nn.MultiheadAttention(E, HEADS, batch_first=True))

        def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, None]:
            return self.attention(x, memory[:, :1], memory[:, 1:2], need_weights=False)[0], None

    batch = (torch.randn(B, T, E, dtype=torch.float64), torch.randn(B, S, E, dtype=torch.float64))
    private = check_private(ValuesOnly().double(), loss, batch)
    assert not bool(private.sums["attention.in_proj_weight"][: 2 * E].abs().max() > 1e-12)


def test_batches_that_do_not_fit_are_refused_not_broadcast() -> None:
    for first in (True, False):
        model = nn.Sequential(nn.MultiheadAttention(E, HEADS, batch_first=first))
        attach(swap(model))
        x, one = torch.randn(B, B, E), torch.randn(1, B, E) if first else torch.randn(B, 1, E)
        with pytest.raises(ValueError, match=r"'0': query \(3, 3, 8\), key \(1, 3, 8\).*same batch"):
            model[0](x, one, one)
        with pytest.raises(
            RuntimeError, match=r"'0': key_padding_mask has shape \(1, 3\), but should have \(3, 3\)"
        ):
            model[0](x, x, x, key_padding_mask=torch.zeros(1, B, dtype=torch.bool))
        with pytest.raises(
            RuntimeError, match=r"'0': attn_mask has shape \(3, 3, 3\), but should have \(6, 3, 3\)"
        ):
            model[0](x, x, x, attn_mask=torch.zeros(B, B, B))
        with pytest.raises(RuntimeError, match="is_causal is a hint"):
            model[0](x, x, x, is_causal=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_name() -> None:
    model = swap(nn.Sequential(nn.MultiheadAttention(E, HEADS, batch_first=True)))
    attach(model)
    x = torch._nested_tensor_from_mask(torch.randn(2, 3, E), torch.tensor([[True] * 3, [True, True, False]]))
    with pytest.raises(TypeError, match=r"'0': got nested tensors.*enable_nested_tensor=False"):
        model[0](x, x, x)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(self.query_of(x), x, x, need_weights=False)[0]

    def query_of(self, x: Tensor) -> Tensor:
        return x.tanh()


def test_a_subclass_is_refused_until_it_has_a_rule() -> None:
    model = nn.Sequential(OwnAttention(E, HEADS, batch_first=True))
    found = {u.name: u.reason for u in uncovered(swap(model))}
    assert set(found) == {f"0.{name}" for name, _ in model[0].named_parameters()}
    assert all("register_swap(OwnAttention" in reason for reason in found.values())
    ghost = ghost_subclass(OwnAttention, GhostMultiheadAttention)
    register_swap(OwnAttention, ghost)
    try:
        model = nn.Sequential(randomised(OwnAttention(E, HEADS, batch_first=True)))
        check_private(model, lambda m, x: m(x).square().flatten(1).sum(1), (torch.randn(B, T, E),))
    finally:
        del _SWAPS[OwnAttention], _ORIGINALS[ghost]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "out_proj", nn.Sequential(nn.Linear(E, E))),
        lambda layer: setattr(layer, "out_proj", nn.Linear(E, E)),
        lambda layer: parametrizations.weight_norm(layer.out_proj),
    ],
)
def test_an_output_layer_that_torch_reads_past_is_refused(change: Callable[[Any], Any]) -> None:
    layer = nn.MultiheadAttention(E, HEADS)
    change(layer)
    model = nn.Sequential(swap(layer))
    assert "out_proj" in {u.name: u.reason for u in uncovered(model)}["0.in_proj_weight"]
    model.requires_grad_(False)
    assert uncovered(model) == []
    attach(model)  # a frozen one needs no rule


def test_gradcheck() -> None:
    """The private function's gradient of its inputs; its parameters' are the records, checked above."""
    layer = swap(randomised(nn.MultiheadAttention(4, 2, batch_first=True), torch.float64))
    tape = attach(layer)
    x, memory = (torch.randn(2, n, 4, dtype=torch.float64, requires_grad=True) for n in (2, 3))

    def forward(*inputs: Tensor) -> Tensor:
        tape.discard()
        y = layer(*inputs, need_weights=False)[0]
        tape.open(2)
        return y

    assert torch.autograd.gradcheck(lambda x: forward(x, x, x), (x,))
    assert torch.autograd.gradcheck(lambda x, m: forward(x, m, m), (x, memory))
    tape.discard()
