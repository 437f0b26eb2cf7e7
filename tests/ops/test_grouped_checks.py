"""Ops on many layers compare a layer with those before it rather than check it again: nothing may slip through that."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dpkernels import ops
from dpkernels.ops import layers

BATCH, FRAMES = 2, 5


def zeros(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*sizes, dtype=dtype)


def layer(kind: str) -> dict[str, Any]:
    """A layer's arguments: x, g, outs and, by the ops' names, its options."""
    out = {"dtype": torch.float64}
    tokens = {"x": zeros(BATCH, FRAMES, 4), "g": zeros(BATCH, FRAMES, 3)}
    vector = {"x": zeros(BATCH, FRAMES, 3), "g": zeros(BATCH, FRAMES, 3), "outs": [zeros(3, **out)]}
    if kind == "lora":
        pair = {"hs": zeros(BATCH, FRAMES, 2), "dhs": zeros(BATCH, FRAMES, 2)}
        return tokens | pair | {"scalings": 1.0, "outs": [zeros(2, 4, **out), zeros(3, 2, **out)]}
    if kind == "embedding":
        ids = zeros(BATCH, FRAMES, dtype=torch.int64)
        return tokens | {"x": ids, "padding_idxs": -1, "outs": [zeros(7, 3, **out)]}
    if kind == "depthwise_conv1d":
        geometry = {"strides": 1, "paddings": 1, "dilations": 1, "kernel_sizes": 3}
        tensors = {name: zeros(BATCH, 4, FRAMES) for name in ("x", "g")}
        return tensors | geometry | {"outs": [zeros(4, 1, 3, **out)]}
    if kind == "linear":
        return tokens | {"outs": [zeros(3, 4, **out)]}
    if kind in ("bias", "layer_norm"):
        return vector
    raise ValueError(f"kind: {kind!r} has no layer here; add one, and its faults to FAULTS and OF_OUTS")


def arguments(
    kind: str, given: list[dict[str, Any]], *, norms: bool
) -> tuple[list[Any], dict[str, list[Any]]]:
    """(xs, gs, kinds), and the lists that only its kind takes."""
    options = {name: [one[name] for one in given] for name in layers._kind_columns(layers.KINDS[kind], norms)}
    return [[one["x"] for one in given], [one["g"] for one in given], [kind] * len(given)], options


def add(kind: str, given: list[dict[str, Any]]) -> None:
    lists, options = arguments(kind, given, norms=False)
    outs = [out for one in given for out in one["outs"]]
    ops.clip_and_noise(*lists, torch.ones(BATCH), outs, **options)


def total(kind: str, given: list[dict[str, Any]]) -> Tensor:
    lists, options = arguments(kind, given, norms=True)
    return ops.total_norm_sq(*lists, **options)


# What is wrong with the last layer, and which argument is named, by the op itself: native code checks too.
FAULTS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("linear", {"x": zeros(BATCH, FRAMES, 4).half()}, TypeError, "g"),
    ("linear", {"x": zeros(BATCH, FRAMES - 1, 4)}, ValueError, "g"),
    ("linear", {"g": zeros(BATCH, FRAMES, 3).to("meta")}, ValueError, "g"),
    ("linear", {"x": zeros(3, FRAMES, 4), "g": zeros(3, FRAMES, 3)}, ValueError, r"[xg]s\[2\]"),
    ("bias", {"g": zeros(BATCH, 3)}, ValueError, "g"),
    ("bias", {"g": zeros(BATCH, FRAMES, 3).long()}, TypeError, "g"),
    ("lora", {"hs": zeros(BATCH, FRAMES, 3)}, ValueError, "dh"),
    ("lora", {"hs": zeros(BATCH, FRAMES, 2).double()}, TypeError, "h"),
    ("lora", {"dhs": zeros(BATCH, FRAMES, 1)}, ValueError, "dh"),
    ("lora", {"dhs": zeros(BATCH, FRAMES, 2).to("meta")}, ValueError, "dh"),
    ("lora", {"scalings": float("nan")}, ValueError, "scaling"),
    ("lora", {"scalings": torch.tensor(float("inf"))}, ValueError, "scaling"),
    ("embedding", {"x": zeros(BATCH, FRAMES).int()}, TypeError, "ids"),
    ("layer_norm", {"x": zeros(BATCH, FRAMES, 4)}, ValueError, "g"),
    ("depthwise_conv1d", {"strides": 0}, ValueError, "stride"),
    ("depthwise_conv1d", {"dilations": 2}, ValueError, "g"),
    ("depthwise_conv1d", {"paddings": 2}, ValueError, "g"),
]
OF_OUTS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("linear", {"outs": [zeros(4, 3).double()]}, ValueError, "out"),
    ("linear", {"outs": [zeros(3, 4).half()]}, TypeError, "out"),
    ("bias", {"outs": [zeros(4).double()]}, ValueError, "out"),
    ("lora", {"outs": [zeros(2, 4).double(), zeros(3, 3).double()]}, ValueError, "out_b"),
    ("lora", {"outs": [zeros(2, 5).double(), zeros(3, 2).double()]}, ValueError, "out_a"),
    ("lora", {"outs": [zeros(2, 4).double(), zeros(3, 2).double().to("meta")]}, ValueError, "out_b"),
    ("embedding", {"outs": [zeros(7, 4).double()]}, ValueError, "out"),
    ("depthwise_conv1d", {"outs": [zeros(4, 1, 2).double()]}, ValueError, "g"),
]


ids = torch.full((BATCH, FRAMES), -1)
IDS_OF_NO_ROW = [
    ({"x": ids}, "ids: given values from -1"),
    ({"x": ids + 8}, "ids: given values from 7 to 7, but out has 7 rows"),
    ({"padding_idxs": -2}, "padding_idx: given -2"),
    ({"padding_idxs": 7}, "padding_idx: given 7; pass a row of 7 rows"),
]


@pytest.mark.parametrize(("fault", "message"), IDS_OF_NO_ROW)
def test_ids_of_no_row_are_refused_in_any_layer(fault: dict[str, Any], message: str) -> None:
    given = [layer("embedding"), layer("embedding") | fault, layer("embedding")]
    with pytest.raises(ValueError, match=f"^{message}"):
        add("embedding", given)
    assert not any(out.any() for one in given for out in one["outs"])
    if "rows" not in message:  # a norm knows no table
        with pytest.raises(ValueError, match=f"^{message}"):
            total("embedding", given)


def test_every_kind_has_a_fault_of_its_norm() -> None:
    assert {kind for kind, *_ in FAULTS} == set(layers.KINDS)


@pytest.mark.parametrize(("kind", "fault", "error", "name"), FAULTS)
def test_norms_refuse_a_last_layer_that_does_not_fit(
    kind: str, fault: dict[str, Any], error: type[Exception], name: str
) -> None:
    fine = [layer(kind), layer(kind)]
    total(kind, fine)
    with pytest.raises(error, match=f"^{name}: expected"):
        total(kind, [*fine, layer(kind) | fault])


@pytest.mark.parametrize(("kind", "fault", "error", "name"), FAULTS + OF_OUTS)
def test_sums_refuse_a_last_layer_that_does_not_fit(
    kind: str, fault: dict[str, Any], error: type[Exception], name: str
) -> None:
    fine = [layer(kind), layer(kind)]
    add(kind, fine)
    with pytest.raises(error, match=f"^{name}: expected"):
        add(kind, [*fine, layer(kind) | fault])


def test_a_scaling_that_is_a_tensor_is_compared_by_value() -> None:
    scaled = [layer("lora") | {"scalings": torch.tensor(value)} for value in (1.0, 1.0, float("inf"))]
    total("lora", scaled[:2])
    with pytest.raises(ValueError, match=r"^scaling: expected a finite number"):
        total("lora", scaled)


def test_layers_beyond_those_that_are_compared_are_checked() -> None:
    many = []
    for width in range(1, layers._MOST_COMPARED + 4):
        many.append(layer("linear") | {"x": zeros(BATCH, FRAMES, width), "outs": [zeros(3, width).double()]})
    add("linear", many)
    with pytest.raises(TypeError, match="out: expected float32 or float64"):
        add("linear", [*many[:-1], many[-1] | {"outs": [many[-1]["outs"][0].half()]}])
    with pytest.raises(ValueError, match="g: expected"):
        total("linear", [*many[:-1], many[-1] | {"g": zeros(BATCH, FRAMES + 1, 3)}])


def test_a_layer_like_others_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    real = layers.KINDS["lora"]

    def counted(*tensors: Tensor, **options: Any) -> None:
        checked.append("lora")
        real.check_sum(*tensors, **options)

    monkeypatch.setitem(layers.KINDS, "lora", dataclasses.replace(real, check_sum=counted))
    add("lora", [layer("lora") for _ in range(5)])
    assert checked == ["lora"]


def test_sizes_may_be_symbolic() -> None:
    """As torch.compile(dynamic=True) and torch.export have them: they compare, but have no hash."""
    pair = [layer("lora"), layer("lora")]
    tensors = [one[name] for one in pair for name in ("x", "g", "hs", "dhs")]

    def norm(*given: Tensor) -> Tensor:
        x, g, h, dh = (list(given[i::4]) for i in range(4))
        return ops.total_norm_sq(x, g, ["lora"] * 2, hs=h, dhs=dh, scalings=[1.0] * 2)

    graph = make_fx(norm, tracing_mode="symbolic")(*tensors)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        torch.ops.dpkernels.total_norm_sq.default
    ]
