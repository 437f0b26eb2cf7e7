"""The table of the layer kinds that grouped ops take, and the checks, packing and unpacking that derive from it.

A kind is a family of ops, `{kind}_norm_sq` and `{kind}_weighted_sum`. A new kind needs a row in `KINDS`, a definition
in `dpkernels.reference`, and functions in the backends that compute it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from dpkernels.backends.layer import GroupedLayer
from dpkernels.ops import bias, depthwise_conv1d, embedding, layer_norm, linear, lora

_MOST_COMPARED = 16
"""The number of checked layers that each further one is compared with. More comparisons cost more than the check."""


@dataclass(frozen=True)
class Kind:
    """The arguments of the ops of one kind of layer.

    Attributes:
        tensors: names of the tensors, in order; `g` is the output's gradient.
        check_norm: checks (*tensors, **options) of a norm; raises if shapes, dtypes, devices or numbers do not fit.
        check_sum: checks (*tensors, factors, *outs, **options) of a weighted sum, and raises likewise.
        outs: names of the weighted sum's outputs, one a parameter.
        options: names and types (float or int) of the numbers that both ops take.
        norm_options: names and types of the numbers that only the norm takes.
        check_norm_values, check_sum_values: check values of real tensors; None if there are no values to check.
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
        """The options of the kind's norm."""
        return {**self.norm_options, **self.options}

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """For each of `tensors`, the argument of `total_norm_sq` and `clip_and_noise` that holds it."""
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


# ---- packing of layers' tensors and numbers into the schema's lists

SCHEMA = "Tensor[] tensors, str[] kinds, float[] floats, int[] ints"
"""The arguments of a grouped op that hold its layers, of any kinds."""

Packed = tuple[list[Tensor], list[str], list[float], list[int]]


def pack(layers: Sequence[GroupedLayer], *, norms: bool) -> Packed:
    """Return the layers as the lists of SCHEMA, without their outs, which the schema lists apart.

    norms: whether to pack the options of the norms, which take more than the sums.
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
    """Invert `pack`: for the norms if outs is None, otherwise for the sums."""
    layers = []
    tensor = out = 0
    numbers = {float: iter(floats), int: iter(ints)}
    for name in kinds:
        kind = KINDS[name]
        options = kind.all_options if outs is None else kind.options
        layer_tensors = tuple(tensors[tensor : tensor + len(kind.tensors)])
        tensor += len(kind.tensors)
        layer_outs: tuple[Tensor, ...] = ()
        if outs is not None:
            layer_outs = tuple(outs[out : out + len(kind.outs)])
            out += len(kind.outs)
        layer_options = {option: next(numbers[number]) for option, number in options.items()}
        layers.append(GroupedLayer(name, layer_tensors, layer_options, layer_outs))
    return layers


# ---- conversion from columns: lists with one entry a layer


def from_columns(
    xs: Sequence[Tensor],
    gs: Sequence[Tensor],
    kinds: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    outs: Sequence[Tensor] | None = None,
) -> list[GroupedLayer]:
    """Return the layers that columns describe: xs, gs, and the columns that only some kinds take.

    Raises:
        TypeError: no kind takes a column of that name.
        ValueError: a kind is unknown, or a column's length differs from the number of its layers or parameters.
    """
    for name in kinds:
        if name not in KINDS:
            raise ValueError(f"kinds: given {name!r}; pass one of {', '.join(KINDS)} for each layer")
    norms = outs is None
    kind_columns = {name: _kind_columns(kind, norms) for name, kind in KINDS.items()}
    _check_lengths(xs, gs, kinds, columns, outs, kind_columns)
    entries = {name: iter(columns.get(name, ())) for names in kind_columns.values() for name in names}
    layers, place = [], 0
    for x, g, name in zip(xs, gs, kinds, strict=True):
        kind = KINDS[name]
        given = {"xs": x, "gs": g} | {column: next(entries[column]) for column in kind_columns[name]}
        tensors = tuple(given[column] for column in kind.columns)
        options = {o: given[f"{o}s"] for o in (kind.all_options if norms else kind.options)}
        layer_outs: tuple[Tensor, ...] = ()
        if outs is not None:
            layer_outs = tuple(outs[place : place + len(kind.outs)])
            place += len(kind.outs)
        layers.append(GroupedLayer(name, tensors, options, layer_outs))
    return layers


def _kind_columns(kind: Kind, norms: bool) -> list[str]:
    """The columns besides xs and gs that the kind takes, with one entry for each of its layers."""
    options = kind.all_options if norms else kind.options
    return [c for c in kind.columns if c not in ("xs", "gs")] + [f"{name}s" for name in options]


def _check_lengths(
    xs: Sequence[Tensor],
    gs: Sequence[Tensor],
    kinds: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    outs: Sequence[Tensor] | None,
    kind_columns: Mapping[str, list[str]],
) -> None:
    users: dict[str, list[str]] = {}
    for name, names in kind_columns.items():
        for column in names:
            users.setdefault(column, []).append(name)
    for column in columns:
        if column not in users:
            raise TypeError(f"{column}: no kind of layer takes this list; pass one of {', '.join(users)}")
    expected = [("xs", xs, len(kinds), "layer"), ("gs", gs, len(kinds), "layer")]
    if outs is not None:
        expected.append(("outs", outs, sum(len(KINDS[kind].outs) for kind in kinds), "parameter"))
    for column, names in users.items():
        count = sum(kind in names for kind in kinds)
        expected.append((column, columns.get(column, ()), count, f"{' or '.join(names)} layer"))
    for name, values, count, unit in expected:
        if len(values) != count:
            raise ValueError(
                f"{name}: expected {count}, one a {unit}; given {len(values)}; pass one a {unit}"
            )


# ---- checks


def check_norms(layers: Sequence[GroupedLayer], name: str) -> None:
    """Raise if a layer's tensors or numbers do not fit its kind's norm, or batch sizes differ.

    name: the argument that held the layers, for messages.
    """
    if not layers:
        raise ValueError(
            "kinds: given no layer; pass at least one, because its tensors define the batch size"
        )
    batch = layers[0].tensors[0].shape[:1]
    for i, layer in _distinct(layers, norms=True):
        kind = KINDS[layer.kind]
        kind.check_norm(*layer.tensors, **{option: layer.options[option] for option in kind.all_options})
        g = layer.tensors[kind.tensors.index("g")]
        if g.shape[:1] != batch:
            raise ValueError(
                f"{name}[{i}]: expected a batch of {batch[0]}, as {name}[0] has; given {list(g.shape)}; "
                "pass one micro-batch"
            )


def check_sums(layers: Sequence[GroupedLayer], factors: Tensor, name: str) -> None:
    """Raise if a layer's tensors, numbers, outs or the factors do not fit its kind's weighted sum.

    name: the argument that held the layers, for messages.
    """
    for i, layer in _distinct(layers, norms=False):
        kind, x = KINDS[layer.kind], layer.tensors[0]
        if x.shape[:1] != factors.shape:
            raise ValueError(
                f"{name}[{i}]: expected a batch of {len(factors)}, as factors has; given {list(x.shape)}; "
                "pass one micro-batch"
            )
        options = {option: layer.options[option] for option in kind.options}
        kind.check_sum(*layer.tensors, factors, *layer.outs, **options)


def _distinct(layers: Sequence[GroupedLayer], *, norms: bool) -> Iterator[tuple[int, GroupedLayer]]:
    """Yield the layers that need a check, with their indices, and skip those that equal a checked one.

    A check reads only shapes, dtypes, devices and options, so layers that agree in these pass or fail together. A model
    has hundreds of layers but few shapes. (For 192 LoRA layers, norms and sums take 3.8 ms of Python on one core, in
    place of 5.9.)
    """
    seen: list[tuple[object, ...]] = []  # a list, because symbolic sizes have no hash
    for i, layer in enumerate(layers):
        signature = (
            layer.kind,
            [(tensor.shape, tensor.dtype, tensor.device) for tensor in layer.tensors],
            [(tensor.shape, tensor.dtype, tensor.device) for tensor in layer.outs],
            layer.options,
        )
        if signature not in seen:
            _check_arguments(i, layer, norms)
            if len(seen) < _MOST_COMPARED:
                seen.append(signature)
            yield i, layer


def _check_arguments(i: int, layer: GroupedLayer, norms: bool) -> None:
    """Raise if a layer's kind is unknown, or its arguments are not those of the kind."""
    if layer.kind not in KINDS:
        raise ValueError(f"layers[{i}].kind: given {layer.kind!r}; pass one of {', '.join(KINDS)}")
    kind = KINDS[layer.kind]
    outs = () if norms else kind.outs
    for field_name, given, names in (("tensors", layer.tensors, kind.tensors), ("outs", layer.outs, outs)):
        if len(given) != len(names):
            raise ValueError(
                f"layers[{i}].{field_name}: expected {len(names)} ({', '.join(names)}); given {len(given)}; "
                f"pass those of {layer.kind}"
            )
    needed = kind.all_options if norms else kind.options
    missing, unknown = needed.keys() - layer.options.keys(), layer.options.keys() - kind.all_options.keys()
    if missing or unknown:
        raise ValueError(
            f"layers[{i}].options: expected {', '.join(needed) or 'none'}; given {', '.join(layer.options) or 'none'}; "
            f"pass those of {layer.kind}"
        )


def check_norm_values(layers: Sequence[GroupedLayer]) -> None:
    """Check the values of the tensors of each layer's norm."""
    for layer in layers:
        check = KINDS[layer.kind].check_norm_values
        if check is not None:
            check(*layer.tensors, **layer.options)


def check_sum_values(layers: Sequence[GroupedLayer], factors: Tensor) -> None:
    """Check the values of the tensors of each layer's weighted sum."""
    for layer in layers:
        check = KINDS[layer.kind].check_sum_values
        if check is not None:
            check(*layer.tensors, factors, *layer.outs, **layer.options)
