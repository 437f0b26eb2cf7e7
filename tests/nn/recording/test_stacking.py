"""Layers called many times in one forward: one record, exact cross terms, at a cost linear in the calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from dpkernels.nn import (
    BiasRecord,
    ExpandedRecord,
    GhostLinear,
    GhostLoRALinear,
    LinearRecord,
    Record,
    attach,
    detach,
    swap,
    uncovered,
    unswap,
)
from tests.nn.per_sample import check_private

WIDTH = 4


def lora() -> nn.Module:
    layer = GhostLoRALinear(WIDTH, WIDTH, r=2)
    nn.init.normal_(layer.lora_B)
    return layer


def conv(**kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv1d(WIDTH, WIDTH, 3, **{"padding": 1, **kwargs})


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "lora": lora,
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "conv": conv(),
    "depthwise": conv(groups=WIDTH),
    "dilated depthwise": conv(groups=WIDTH, dilation=2, padding=2),
    "grouped": conv(groups=2),
    "prelu": nn.PReLU,
}


class Loop(nn.Module):
    """A layer called at every one of n steps, on what the step before made of it."""

    def __init__(self, layer: nn.Module, steps: int) -> None:
        super().__init__()
        self.layer, self.steps = layer, steps

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for _ in range(self.steps):
            h = torch.tanh(self.layer(h) + x)
        return h


class Decoder(nn.Module):
    """A token table that is looked up and tied to the output layer, at every step."""

    def __init__(self, steps: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(6, WIDTH, padding_idx=padding_idx)
        self.head = nn.Linear(WIDTH, 6, bias=False)
        self.head.weight = self.table.weight
        self.steps = steps

    def forward(self, ids: Tensor) -> Tensor:
        scores = []
        for step in range(self.steps):
            scores.append(self.head(torch.tanh(self.table((ids + step) % 6))))
        return torch.stack(scores, 1)


class Lookup(Decoder):
    """The table alone."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([self.table((ids + step) % 6) * (step + 1) for step in range(self.steps)], 1)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) ** 2).flatten(1).sum(1)


def input_of(model: nn.Module) -> Tensor:
    if isinstance(model, Decoder):
        return torch.randint(0, 6, (3, 2))
    return torch.randn(3, WIDTH, 7 if isinstance(model.layer, nn.Conv1d) else WIDTH)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    **{name: lambda steps, make=make: Loop(make(), steps) for name, make in LAYERS.items()},  # type: ignore[misc]
    "tied": Decoder,
    "tied, padded": lambda steps: Decoder(steps, padding_idx=1),
    "lookup": Lookup,
}


@pytest.mark.parametrize("kind", MODELS)
def test_many_calls_are_one_record(kind: str) -> None:
    model = MODELS[kind](5).double()
    x = input_of(model)
    private = check_private(model, squares, (x.double() if x.is_floating_point() else x,))
    trained = {p for r in private.records for p in r.parameters}
    assert sum(len(r.parameters) for r in private.records) == len(trained)


class Elements(TorchDispatchMode):
    """Counts the elements of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out._is_view():
            self.count += out.numel()
        return out


def elements_of_the_merge(model: nn.Module) -> int:
    tape = attach(swap(model))
    x = input_of(model)
    loss = squares(model, x).sum()
    tape.open(len(x))
    loss.backward()
    with Elements() as elements:
        tape.close()
    detach(model)
    return elements.count


@pytest.mark.thinned(5)
@pytest.mark.parametrize("kind", MODELS)
def test_the_cost_is_linear_in_the_calls(kind: str) -> None:
    few, many = (elements_of_the_merge(MODELS[kind](steps)) for steps in (8, 32))
    assert many <= 4.5 * few


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_per_sample_gradients_are_added_in_place(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(5))
    gradients = [torch.randn(2, 5, dtype=dtype) for _ in range(4)]
    first = BiasRecord("a", weight, gradients[0])
    before = gradients[0].clone()
    assert first.absorb(BiasRecord("a", weight, gradients[1]))
    place = first.g.data_ptr()
    for g in gradients[2:]:
        assert first.absorb(ExpandedRecord("b", weight, g))
    assert first.g.data_ptr() == place
    assert torch.equal(gradients[0], before), "autograd's own tensor was written to"
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    torch.testing.assert_close(first.g, torch.stack(gradients).to(wide).sum(0), rtol=1e-6, atol=1e-6)
    assert first.layer == "a + b"
    assert not first.absorb(BiasRecord("c", nn.Parameter(torch.zeros(5)), gradients[0]))


def test_what_cannot_be_combined_among_many_is_named() -> None:
    a, b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3, 2))
    layers = [GhostLoRALinear(3, 3, 2, alpha=alpha) for alpha in (2, 2, 4)]
    records: list[Record] = []
    for index, layer in enumerate(layers):
        layer.lora_A, layer.lora_B, layer.ghost_name = a, b, f"layer{index}"
        tape = attach(layer)
        loss = layer(torch.randn(2, 3)).sum()
        tape.open(2)
        loss.backward()
        records += tape.close()
        detach(layer)
    with pytest.raises(TypeError, match="cannot be combined"):
        records[0].merge(*records[1:])


class Plain(nn.Linear):
    """A subclass that computes what nn.Linear does."""

    extra: int

    def __init__(self, *args: Any, note: str = "") -> None:
        super().__init__(*args)
        self.note = note

    def describe(self) -> str:
        return self.note


class Deeper(Plain):
    pass


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return self.weight.mean() * super().forward(input)


class OwnWeight(nn.Linear):
    """Its weight is another than the parameter."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return 2 * value if name == "weight" else value


class Padded(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.flip(2), bias)


class OwnConstant(nn.LayerNorm):
    eps = property(lambda self: 0.5, lambda self, value: None)  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Plain, Deeper])
def test_a_subclass_that_inherits_all_is_swapped(kind: type[Plain]) -> None:
    model = Loop(kind(WIDTH, WIDTH), 3)
    model.layer.note = "mine"
    swap(model)
    assert isinstance(model.layer, kind)
    assert isinstance(model.layer, GhostLinear)
    assert model.layer.describe() == "mine"
    assert type(swap(Loop(kind(WIDTH, WIDTH), 3)).layer) is type(model.layer)
    private = check_private(unswap(model), squares, (torch.randn(3, WIDTH),))
    assert type(model.layer) is kind
    assert [type(r) for r in private.records] == [LinearRecord, BiasRecord]


@pytest.mark.parametrize(
    "layer",
    [
        OwnForward(WIDTH, WIDTH),
        OwnWeight(WIDTH, WIDTH),
        Padded(WIDTH, WIDTH, 3),
        OwnConstant(WIDTH),
        parametrize.register_parametrization(nn.Linear(WIDTH, WIDTH), "weight", nn.Tanh()),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_subclass_that_replaces_something_is_not(layer: nn.Module) -> None:
    kind = type(layer)
    assert type(swap(nn.Sequential(layer))[0]) is kind


def test_a_large_subclass_with_its_own_forward_is_still_refused() -> None:
    (weight,) = uncovered(swap(OwnForward(300, 300, bias=False)))
    assert "no rule" in weight.reason
