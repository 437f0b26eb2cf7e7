"""One batch for each family of ops, with the truth by autograd of the layer itself in float64, one sample at a time."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkernels import ops
from dpkernels.backends import registry
from dpkernels.ops import layers

FAMILIES = tuple(layers.KINDS)
WITH_LENGTHS = tuple(
    family
    for family in FAMILIES
    if "lengths" in inspect.signature(getattr(ops, f"{family}_norm_sq")).parameters
)
SCALING = 0.75
VOCABULARY = 6
CONV = {"stride": 2, "padding": 3, "dilation": 2}
KERNEL = 3


@dataclass(frozen=True)
class Case:
    """Inputs of one call: tensors with the batch first, and the op's options."""

    family: str
    tensors: dict[str, Tensor]
    out_shapes: tuple[tuple[int, ...], ...]
    norm_options: dict[str, Any] = field(default_factory=dict)
    sum_options: dict[str, Any] = field(default_factory=dict)
    lengths: Tensor | None = None
    _truth: dict[int, list[Tensor]] = field(default_factory=dict, init=False)

    @property
    def batch(self) -> int:
        return len(next(iter(self.tensors.values())))

    def _lengths(self) -> dict[str, Any]:
        return {} if self.lengths is None else {"lengths": self.lengths}

    def norms(self, **options: Any) -> list[Tensor]:
        """The norm op's [B] results, one a parameter."""
        function = getattr(ops, f"{self.family}_norm_sq")
        result = function(*self.tensors.values(), **self._lengths(), **{**self.norm_options, **options})
        return list(result) if isinstance(result, tuple) else [result]

    def sums(self, factors: Tensor, dtype: torch.dtype = torch.float64, start: float = 0.0) -> list[Tensor]:
        """The weighted sums, one a parameter."""
        outs = [torch.full(shape, start, dtype=dtype) for shape in self.out_shapes]
        function = getattr(ops, f"{self.family}_weighted_sum")
        function(*self.tensors.values(), factors, *outs, **self._lengths(), **self.sum_options)
        return outs

    def layer(self, outs: Sequence[Tensor] = ()) -> ops.GroupedLayer:
        """This layer in a grouped op: in one for sums where there are outs."""
        options = self.sum_options if outs else self.norm_options
        return ops.GroupedLayer(self.family, tuple(self.tensors.values()), options, tuple(outs))

    def alone(self, i: int) -> "Case":
        """Sample i in a batch of its own, cut to its own length."""
        cut = slice(None) if self.lengths is None else slice(int(self.lengths[i]))
        tensors = {name: tensor[i : i + 1, cut].clone() for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, lengths=None)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Case":
        """The same case with every floating tensor changed."""
        changed = {n: change(t) if t.is_floating_point() else t for n, t in self.tensors.items()}
        return replace(self, tensors=changed)

    def gradients(self, i: int) -> list[Tensor]:
        """Sample i's gradients by autograd in float64, one a parameter; on the CPU, moved to where the tensors are."""
        if i not in self._truth:
            one = self.alone(i).tensors
            tensors = {n: (t[0].double() if t.is_floating_point() else t[0]).cpu() for n, t in one.items()}
            with torch.device("cpu"):
                layers = _layers(self.family, tensors, self.out_shapes, self.norm_options)
                truth = [torch.autograd.grad(layer(w), w, upstream)[0] for w, layer, upstream in layers]
            self._truth[i] = [t.to(one["g"].device) for t in truth]
        return self._truth[i]

    def scale(self, i: int) -> list[float]:
        """S_i = Σ_t‖x_t‖‖g_t‖ of every parameter: the size of the terms before they cancel."""
        one = self.alone(i)
        t = {n: v[0].double() for n, v in one.tensors.items()}
        if self.family == "linear":
            return [float((t["x"].norm(dim=1) * t["g"].norm(dim=1)).sum())]
        if self.family == "lora":
            of_a = (t["x"].norm(dim=1) * t["dh"].norm(dim=1)).sum()
            return [float(of_a), SCALING * float((t["h"].norm(dim=1) * t["g"].norm(dim=1)).sum())]
        if self.family == "layer_norm":
            return [float((t["x_hat"] * t["g"]).norm(dim=1).sum())]
        if self.family == "depthwise_conv1d":
            return [float((t["x"].norm(dim=1) * t["g"].norm(dim=1)).norm()) * KERNEL]
        if self.family in ("bias", "embedding"):
            return [float(t["g"].norm(dim=1).sum())]
        raise _without_case(self.family)


Layer = tuple[Tensor, Callable[[Tensor], Tensor], Tensor]


def _layers(
    family: str, t: dict[str, Tensor], shapes: tuple[tuple[int, ...], ...], options: dict[str, Any]
) -> list[Layer]:
    """(weight, the layer as a function of it, the gradient of its output) of every parameter."""
    weights = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    if family == "linear":
        return [(weights[0], lambda w: F.linear(t["x"], w), t["g"])]
    if family == "bias":
        return [(weights[0], lambda b: torch.zeros_like(t["g"]) + b, t["g"])]
    if family == "lora":
        return [
            (weights[0], lambda a: F.linear(t["x"], a), t["dh"]),
            (weights[1], lambda b: SCALING * F.linear(t["h"], b), t["g"]),
        ]
    if family == "embedding":
        padding = options["padding_idx"]
        return [(weights[0], lambda w: F.embedding(t["ids"], w, padding_idx=padding), t["g"])]
    if family == "layer_norm":
        return [(weights[0], lambda w: t["x_hat"] * w, t["g"])]
    if family == "depthwise_conv1d":
        return [(weights[0], lambda w: F.conv1d(t["x"][None], w, groups=len(t["x"]), **CONV)[0], t["g"])]
    raise _without_case(family)


def make(
    family: str,
    batch: int = 3,
    frames: int = 7,
    d: int = 5,
    p: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    lengths: Tensor | None = None,
    rank: int = 3,
) -> Case:
    """A batch of standard normal inputs; d and p are the sizes of the layer."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    if family == "linear":
        tensors = {"x": randn(batch, frames, d), "g": randn(batch, frames, p)}
        return Case(family, tensors, ((p, d),), lengths=lengths)
    if family == "bias":
        return Case(family, {"g": randn(batch, frames, p)}, ((p,),), lengths=lengths)
    if family == "lora":
        widths = {"x": d, "h": rank, "g": p, "dh": rank}
        tensors = {name: randn(batch, frames, width) for name, width in widths.items()}
        scaling = {"scaling": SCALING}
        return Case(family, tensors, ((rank, d), (p, rank)), scaling, scaling, lengths)
    if family == "embedding":
        tensors = {"ids": torch.randint(0, VOCABULARY, (batch, frames)), "g": randn(batch, frames, d)}
        return Case(family, tensors, ((VOCABULARY, d),), {"padding_idx": 1}, {"padding_idx": 1})
    if family == "layer_norm":
        tensors = {"x_hat": randn(batch, frames, d), "g": randn(batch, frames, d)}
        return Case(family, tensors, ((d,),), lengths=lengths)
    if family == "depthwise_conv1d":
        reach = frames + 2 * CONV["padding"] - CONV["dilation"] * (KERNEL - 1) - 1
        tensors = {"x": randn(batch, d, frames), "g": randn(batch, d, reach // CONV["stride"] + 1)}
        return Case(family, tensors, ((d, 1, KERNEL),), {"kernel_size": KERNEL, **CONV}, CONV)
    raise _without_case(family)


def _without_case(family: str) -> ValueError:
    return ValueError(
        f"family: {family!r} has no case; add its truth to `_layers`, its inputs to `make` and the size of its terms "
        "to `Case.scale`"
    )


def served() -> tuple[str, ...]:
    """The families that the backend under test has: native code, which nothing follows when forced, may lack some."""
    if registry.forced() != "native":
        return FAMILIES
    return tuple(f for f in FAMILIES if registry.function("native", f"{f}_norm_sq") is not None)


def as_lists(cases: Sequence[Case], *, norms: bool) -> dict[str, list[Any]]:
    """The layers as grouped ops take them in lists: one for each tensor and option of any kind."""
    lists: dict[str, list[Any]] = {name: [] for name in ("xs", "gs", "kinds")}
    for case in cases:
        kind = layers.KINDS[case.family]
        tensors = {
            column: case.tensors[name] for name, column in zip(kind.tensors, kind.columns, strict=True)
        }
        options = case.norm_options if norms else case.sum_options
        entry = {"xs": case.tensors["g"], "kinds": case.family} | tensors
        entry |= {f"{name}s": options[name] for name in (kind.all_options if norms else kind.options)}
        for column, value in entry.items():
            lists.setdefault(column, []).append(value)
    return lists


def cancelling(family: str, batch: int, pairs: int, d: int, p: int, epsilon: float = 2.0**-20) -> Case:
    """Float32 frames in pairs that cancel exactly, shuffled, and one small frame: ‖G‖ is 10⁻⁶ of its terms.

    The exact gradient is that of the small frame (its product is a power of two times one pair's). What the
    tests call the truth, autograd in float64, is off by 10⁻¹⁶ of the terms, hence 10⁻¹⁰ of the norm.
    """
    case = make(family, batch, 2 * pairs + 1, d, p)
    order = torch.stack([torch.randperm(2 * pairs + 1) for _ in range(batch)])
    paired = {}
    for name, tensor in case.tensors.items():
        positive = tensor[:, :pairs]
        if name == "ids":
            frames = torch.cat([positive, positive, positive[:, :1]], 1)
        else:
            sign = 1.0 if name in ("x", "x_hat", "h") else -1.0
            small = 1.0 if name in ("x", "x_hat", "h") else epsilon
            frames = torch.cat([positive, sign * positive, small * positive[:, :1]], 1)
        paired[name] = torch.stack([frames[i, order[i]] for i in range(batch)])
    return replace(case, tensors=paired)
