"""The table of the kinds of layers that grouped ops take, and what follows from it: checks, packing, unpacking.

A kind is a family of ops, `{kind}_norm_sq` and `{kind}_weighted_sum`. To add one is to add its row to `KINDS`, its
definition to `dpkernels.reference`, and its functions to the backends that compute it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from dpkernels.backends.layer import GroupedLayer
from dpkernels.ops import bias, depthwise_conv1d, embedding, layer_norm, linear, lora

_MOST_COMPARED = 16
"""Layers that others are compared with: to compare with more would cost more than to check."""


@dataclass(frozen=True)
class Kind:
    """What the ops of one kind of layer take.

    Attributes:
        tensors: names of their tensors, in order: the output's gradient is `g`.
        check_norm: takes (*tensors, **options) of a norm; raises where shapes, dtypes, devices or numbers do not fit.
        check_sum: takes (*tensors, factors, *outs, **options) of a weighted sum, and raises likewise.
        outs: names of what a weighted sum adds to, one a parameter.
        options: names and types (float or int) of the numbers that both ops take.
        norm_options: of those that only the norm takes.
        check_norm_values, check_sum_values: look at values, of real tensors; None where there is nothing to look at.
    """

    tensors: tuple[str, ...]
    check_norm: Callable[..., None]
    check_sum: Callable[..., None]
    outs: tuple[str, ...] = ("out",)
    options: Mapping[str, type] = field(default_factory=dict)
    norm_options: Mapping[str, type] = field(default_factory=dict)
    check_norm_values: Callable[..., None] | None = None
    check_sum_values: Callable[..., None] | None = None

    @cached_property
    def all_options(self) -> Mapping[str, type]:
        """What its norm takes."""
        return {**self.norm_options, **self.options}

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The list of `total_norm_sq` and `clip_and_noise` that holds each of its tensors."""
        first = next((name for name in self.tensors if name != "g"), None)
        return tuple("gs" if name == "g" else "xs" if name == first else f"{name}s" for name in self.tensors)


KINDS: dict[str, Kind] = {
    "linear": Kind(("x", "g"), linear.check_norm, linear.check_sum),
    "bias": Kind(("g",), bias.check_norm, bias.check_sum),
    "lora": Kind(
        ("x", "h", "g", "dh"),
        lora.check_norm,
        lora.check_sum,
        outs=("out_a", "out_b"),
        options={"scaling": float},
    ),
    "embedding": Kind(
        ("ids", "g"),
        embedding.check_norm,
        embedding.check_sum,
        options={"padding_idx": int},
        check_norm_values=embedding.check_norm_values,
        check_sum_values=embedding.check_sum_values,
    ),
    "layer_norm": Kind(("x_hat", "g"), layer_norm.check_norm, layer_norm.check_sum),
    "depthwise_conv1d": Kind(
        ("x", "g"),
        depthwise_conv1d.check_norm,
        depthwise_conv1d.check_sum,
        options={"stride": int, "padding": int, "dilation": int},
        norm_options={"kernel_size": int},
    ),
}
"""Every kind of layer that grouped ops take. The order is that of `DPK_LAYER_*` in csrc/grouped_kernels.h."""


# ---- packing: a layer's tensors and numbers, in the schema's lists

SCHEMA = "Tensor[] tensors, str[] kinds, float[] floats, int[] ints"
"""Of the layers of a grouped op, whatever their kinds."""

Packed = tuple[list[Tensor], list[str], list[float], list[int]]


def pack(layers: Sequence[GroupedLayer], *, norms: bool) -> Packed:
    """The layers as the lists of SCHEMA; their outs are the schema's own.

    norms: whether for their norms, which take more options than their sums.
    """
    tensors: list[Tensor] = []
    floats: list[float] = []
    ints: list[int] = []
    for layer in layers:
        kind = KINDS[layer.kind]
        tensors += layer.tensors
        for name, number in (kind.all_options if norms else kind.options).items():
            if number is float:
                floats.append(float(layer.options[name]))
            else:
                ints.append(layer.options[name])
    return tensors, [layer.kind for layer in layers], floats, ints


def unpack(
    tensors: Sequence[Tensor],
    kinds: Sequence[str],
    floats: Sequence[float],
    ints: Sequence[int],
    outs: Sequence[Tensor] | None = None,
) -> list[GroupedLayer]:
    """What `pack` packed, for norms where there are no outs and for sums where there are."""
    layers = []
    tensor = out = 0
    numbers = {float: iter(floats), int: iter(ints)}
    for name in kinds:
        kind = KINDS[name]
        options = kind.all_options if outs is None else kind.options
        own = tuple(tensors[tensor : tensor + len(kind.tensors)])
        tensor += len(kind.tensors)
        own_outs: tuple[Tensor, ...] = ()
        if outs is not None:
            own_outs = tuple(outs[out : out + len(kind.outs)])
            out += len(kind.outs)
        given = {option: next(numbers[number]) for option, number in options.items()}
        layers.append(GroupedLayer(name, own, given, own_outs))
    return layers


# ---- from lists, one for each argument


def from_columns(
    xs: Sequence[Tensor],
    gs: Sequence[Tensor],
    kinds: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    outs: Sequence[Tensor] | None = None,
) -> list[GroupedLayer]:
    """The layers that lists of one argument each describe: of x, of g, and of what only some kinds take.

    Raises:
        TypeError: a list that no kind has.
        ValueError: an unknown kind; a list of another length than there are layers (of its kinds, of parameters) to it.
    """
    for name in kinds:
        if name not in KINDS:
            raise ValueError(f"kinds: given {name!r}; pass one of {', '.join(KINDS)} a layer")
    norms = outs is None
    own = {name: _own_columns(kind, norms) for name, kind in KINDS.items()}
    _check_lengths(xs, gs, kinds, columns, outs, own)
    rest = {name: iter(columns.get(name, ())) for names in own.values() for name in names}
    layers, place = [], 0
    for x, g, name in zip(xs, gs, kinds, strict=True):
        kind = KINDS[name]
        given = {"xs": x, "gs": g} | {column: next(rest[column]) for column in own[name]}
        tensors = tuple(given[column] for column in kind.columns)
        options = {o: given[f"{o}s"] for o in (kind.all_options if norms else kind.options)}
        own_outs: tuple[Tensor, ...] = ()
        if outs is not None:
            own_outs = tuple(outs[place : place + len(kind.outs)])
            place += len(kind.outs)
        layers.append(GroupedLayer(name, tensors, options, own_outs))
    return layers


def _own_columns(kind: Kind, norms: bool) -> list[str]:
    """The lists that hold what only this kind takes: one entry for each of its layers."""
    options = kind.all_options if norms else kind.options
    return [c for c in kind.columns if c not in ("xs", "gs")] + [f"{name}s" for name in options]


def _check_lengths(
    xs: Sequence[Tensor],
    gs: Sequence[Tensor],
    kinds: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    outs: Sequence[Tensor] | None,
    own: Mapping[str, list[str]],
) -> None:
    users: dict[str, list[str]] = {}
    for name, names in own.items():
        for column in names:
            users.setdefault(column, []).append(name)
    for column in columns:
        if column not in users:
            raise TypeError(f"{column}: no kind of layer takes this; pass lists of {', '.join(users)}")
    expected = [("xs", xs, len(kinds), "layer"), ("gs", gs, len(kinds), "layer")]
    if outs is not None:
        expected.append(("outs", outs, sum(len(KINDS[kind].outs) for kind in kinds), "parameter"))
    for column, names in users.items():
        count = sum(kind in names for kind in kinds)
        expected.append((column, columns.get(column, ()), count, f"{' or '.join(names)} layer"))
    for name, values, count, what in expected:
        if len(values) != count:
            raise ValueError(f"{name}: expected {count}, one a {what}; given {len(values)}; pass one each")


# ---- checks


def check_norms(layers: Sequence[GroupedLayer], name: str) -> None:
    """Raise where a layer's tensors or numbers do not fit its kind's norm, or its batch another's.

    name: what the caller gave the layers as.
    """
    if not layers:
        raise ValueError("kinds: given no layer; pass at least one: the batch's size is that of its tensors")
    batch = layers[0].tensors[0].shape[:1]
    for i, layer in _unlike(layers, norms=True):
        kind = KINDS[layer.kind]
        kind.check_norm(*layer.tensors, **{option: layer.options[option] for option in kind.all_options})
        g = layer.tensors[kind.tensors.index("g")]
        if g.shape[:1] != batch:
            raise ValueError(
                f"{name}[{i}]: expected a batch of {batch[0]}, as {name}[0] has; given {list(g.shape)}; "
                "pass one micro-batch"
            )


def check_sums(layers: Sequence[GroupedLayer], factors: Tensor, name: str) -> None:
    """Raise where a layer's tensors, numbers, outs or the factors do not fit its kind's weighted sum.

    name: what the caller gave the layers as.
    """
    for i, layer in _unlike(layers, norms=False):
        kind, x = KINDS[layer.kind], layer.tensors[0]
        if x.shape[:1] != factors.shape:
            raise ValueError(
                f"{name}[{i}]: expected a batch of {len(factors)}, as factors has; given {list(x.shape)}; "
                "pass one micro-batch"
            )
        options = {option: layer.options[option] for option in kind.options}
        kind.check_sum(*layer.tensors, factors, *layer.outs, **options)


def _unlike(layers: Sequence[GroupedLayer], *, norms: bool) -> Iterator[tuple[int, GroupedLayer]]:
    """The layers that have to be checked, with their places: those not like one that was.

    A check sees a tensor's shape, dtype and device, and the options as they are, so layers that agree in these pass or
    fail together; and a model has hundreds of layers, but a handful of shapes. (192 LoRA layers: 3.8 ms of Python for
    norms and sums on one core, in place of 5.9.)
    """
    seen: list[tuple[object, ...]] = []  # not a set: symbolic sizes have no hash
    for i, layer in enumerate(layers):
        like = (
            layer.kind,
            [(tensor.shape, tensor.dtype, tensor.device) for tensor in layer.tensors],
            [(tensor.shape, tensor.dtype, tensor.device) for tensor in layer.outs],
            layer.options,
        )
        if like not in seen:
            _check_arguments(i, layer, norms)
            if len(seen) < _MOST_COMPARED:
                seen.append(like)
            yield i, layer


def _check_arguments(i: int, layer: GroupedLayer, norms: bool) -> None:
    """Raise where a layer is of no kind, or has other arguments than its kind takes."""
    if layer.kind not in KINDS:
        raise ValueError(f"layers[{i}].kind: given {layer.kind!r}; pass one of {', '.join(KINDS)}")
    kind = KINDS[layer.kind]
    outs = () if norms else kind.outs
    for what, given, names in (("tensors", layer.tensors, kind.tensors), ("outs", layer.outs, outs)):
        if len(given) != len(names):
            raise ValueError(
                f"layers[{i}].{what}: expected {len(names)} ({', '.join(names)}); given {len(given)}; "
                f"pass those of {layer.kind}"
            )
    needed = kind.all_options if norms else kind.options
    lack, strange = needed.keys() - layer.options.keys(), layer.options.keys() - kind.all_options.keys()
    if lack or strange:
        raise ValueError(
            f"layers[{i}].options: expected {', '.join(needed) or 'none'}; given {', '.join(layer.options) or 'none'}; "
            f"pass those of {layer.kind}"
        )


def check_norm_values(layers: Sequence[GroupedLayer]) -> None:
    """What only values tell, of each layer's norm."""
    for layer in layers:
        check = KINDS[layer.kind].check_norm_values
        if check is not None:
            check(*layer.tensors, **layer.options)


def check_sum_values(layers: Sequence[GroupedLayer], factors: Tensor) -> None:
    """What only values tell, of each layer's weighted sum."""
    for layer in layers:
        check = KINDS[layer.kind].check_sum_values
        if check is not None:
            check(*layer.tensors, factors, *layer.outs, **layer.options)
