"""Norms and weighted sums of layers, native against the reference's float64.

For each case: no norm is below the exact one or far above it, the sum is the exact one to its rounding, what one sample
adds is within the clipping norm, and two threads give the bits of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpkernels import reference
from dpkernels.backends import native, native_ops
from dpkernels.backends.layer import GroupedLayer
from tests.fuzz.draw import Draw
from tests.fuzz.memory import Guarded, same_bits
from tests.ops.tolerances import CLIP_ROUNDING, GRAM_SHARE, NORM_ABOVE, SUM_OFF, TRUTH_ROUNDING

FAMILIES = ("linear", "bias", "lora", "embedding", "layer_norm", "depthwise_conv1d")
WITH_LENGTHS = ("linear", "bias", "lora", "layer_norm")
_AXES = {"linear": 4, "bias": 3, "lora": 5, "embedding": 3, "layer_norm": 3, "depthwise_conv1d": 3}
_SIGNED = ("g", "dh")  # what changes its sign where frames are to cancel
# A norm's bound may be this many times the table's: bounds are taken of 16 or 64 frames at once.
_ROOM = 16.0
_MOST_SAMPLES = 33


@dataclass
class Layer:
    """A batch of one layer.

    Attributes:
        family: of ops.
        tensors: by name, as dense tensors; ids are int64.
        outs: shapes of the weighted sums.
        options: of the norm; `sum_options` of the weighted sum.
        lengths: own frames of each sample, or None.
        benign: whether every number is of an ordinary size.
    """

    family: str
    tensors: dict[str, Tensor]
    outs: tuple[tuple[int, ...], ...]
    options: dict[str, Any]
    sum_options: dict[str, Any]
    lengths: Tensor | None
    benign: bool

    @property
    def batch(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["g"].dtype

    def frames(self, i: int) -> int:
        whole = self.tensors["g"].shape[1]
        return whole if self.lengths is None else int(self.lengths[i])

    def extra(self) -> dict[str, Any]:
        return {} if self.lengths is None else {"lengths": self.lengths}

    def gradients(self, i: int) -> list[Tensor]:
        """Sample i's gradients in float64, one a parameter."""
        outs = [torch.zeros(shape, dtype=torch.float64) for shape in self.outs]
        only = (torch.arange(self.batch) == i).float()
        function = getattr(reference, f"{self.family}_weighted_sum")
        function(*self.tensors.values(), only, *outs, **self.sum_options, **self.extra())
        return outs

    def scales(self, i: int) -> list[float]:
        """The size of the terms of each parameter's gradient before they cancel: Σ_t‖x_t‖‖g_t‖."""
        n = self.frames(i)
        if self.family == "depthwise_conv1d":
            x, g = (_norms(self.tensors[name][i]) for name in ("x", "g"))
            with np.errstate(all="ignore"):
                return [float(np.sqrt(((x * g) ** 2).sum())) * self.options["kernel_size"]]
        rows = {name: t[i, :n] for name, t in self.tensors.items()}
        if self.family == "linear":
            return [_dot(rows["x"], rows["g"])]
        if self.family == "lora":
            scaling = abs(self.options["scaling"])
            return [_dot(rows["x"], rows["dh"]), scaling * _dot(rows["h"], rows["g"])]
        if self.family == "layer_norm":
            return [float(_norms(rows["x_hat"].double() * rows["g"].double()).sum())]
        return [float(_norms(rows["g"]).sum())]


def _norms(rows: Tensor) -> np.ndarray[Any, Any]:
    """‖row‖ of each row, in a range wider than float64's."""
    with np.errstate(all="ignore"):
        squares = rows.double().numpy().astype(np.longdouble) ** 2
        return np.sqrt(squares.sum(-1))


def _dot(a: Tensor, b: Tensor) -> float:
    with np.errstate(all="ignore"):
        return float((_norms(a) * _norms(b)).sum())


def drawn(draw: Draw, *, filled: bool = False) -> Layer:
    """A layer of any family, sizes (`filled`: none of them 0), element type and values."""
    family = draw.note("family", draw.one_of(FAMILIES))
    dtype = draw.note("dtype", draw.dtype())
    most = 3_000_000 if draw.chance(0.1) else 60_000
    sizes = draw.sizes(_AXES[family], most)
    sizes = (min(sizes[0], _MOST_SAMPLES), *sizes[1:])
    sizes = draw.note("sizes", tuple(max(1, size) for size in sizes) if filled else sizes)
    make: Callable[..., Layer] = _depthwise if family == "depthwise_conv1d" else _of_frames
    layer = make(draw, family, dtype, sizes)
    if family in WITH_LENGTHS and draw.chance(0.4):
        frames = layer.tensors["g"].shape[1]
        lengths = [draw.integer(0, frames) for _ in range(layer.batch)]
        layer.lengths = torch.tensor(draw.note("lengths", lengths), dtype=torch.int64)
    return layer


def _of_frames(draw: Draw, family: str, dtype: torch.dtype, sizes: Sequence[int]) -> Layer:
    batch, frames, p, *rest = sizes
    widths = {
        "linear": lambda: {"x": rest[0], "g": p},
        "bias": lambda: {"g": p},
        "lora": lambda: {"x": rest[0], "h": rest[1], "g": p, "dh": rest[1]},
        "embedding": lambda: {"g": p},
        "layer_norm": lambda: {"x_hat": p, "g": p},
    }[family]()
    values = {name: draw.values((batch, frames, width), dtype) for name, width in widths.items()}
    draw.note("values", [one.kind for one in values.values()])
    tensors = {name: one.tensor for name, one in values.items()}
    half = frames // 2
    if half and draw.note("cancelling", draw.chance(0.15)):
        for name, tensor in tensors.items():
            sign = -1.0 - draw.one_of((0.0, 1e-6, 1e-3)) if name in _SIGNED else 1.0
            tensor[:, half : 2 * half] = sign * tensor[:, :half]
    benign = all(one.kind in ("normal", "zero") for one in values.values())
    options: dict[str, Any] = {}
    if family == "lora":
        options = {"scaling": draw.note("scaling", draw.one_of((1.0, 0.75, 2.5, -3.0, 1e-8, 1e5)))}
        outs: tuple[tuple[int, ...], ...] = ((rest[1], rest[0]), (p, rest[1]))
    elif family == "embedding":
        rows = draw.one_of((1, 2, 7, 300))
        tensors = {"ids": torch.from_numpy(draw.rng.integers(0, rows, (batch, frames))), **tensors}
        options = {"padding_idx": draw.note("padding_idx", draw.one_of((None, -1, 0, rows - 1)))}
        outs = ((rows, p),)
    else:
        outs = ((p, rest[0]),) if family == "linear" else ((p,),)
    return Layer(family, tensors, outs, options, dict(options), None, benign)


def _depthwise(draw: Draw, family: str, dtype: torch.dtype, sizes: Sequence[int]) -> Layer:
    batch, channels, frames = sizes
    taps, stride, dilation = draw.integer(1, 20), draw.one_of((1, 1, 2, 3, 5)), draw.one_of((1, 1, 2, 7))
    options = {"stride": stride, "padding": draw.integer(0, 12), "dilation": dilation}
    draw.note("options", {"kernel_size": taps, **options})
    reach = frames + 2 * options["padding"] - dilation * (taps - 1) - 1
    x = draw.values((batch, channels, frames), dtype)
    g = draw.values((batch, channels, max(0, reach // stride + 1)), dtype)
    draw.note("values", [x.kind, g.kind])
    benign = {x.kind, g.kind} <= {"normal", "zero"}
    tensors = {"x": x.tensor, "g": g.tensor}
    return Layer(
        family, tensors, ((channels, 1, taps),), {"kernel_size": taps, **options}, options, None, benign
    )


def check(draw: Draw) -> None:
    """One case; raises AssertionError with what is wrong."""
    layer = drawn(draw)
    given = [t if name == "ids" else draw.layout(t) for name, t in layer.tensors.items()]
    options = dict(layer.options)
    if layer.family == "linear":
        options["method"] = draw.note("method", draw.one_of(("auto", "gram", "direct")))
    norms = both_threads(lambda: _norms_of(layer, given, options))
    truths = [layer.gradients(i) for i in range(layer.batch)]
    scales = [layer.scales(i) for i in range(layer.batch)]
    share = GRAM_SHARE if options.get("method") in ("auto", "gram") else 0.0
    for parameter, norm_sq in enumerate(norms):
        assert norm_sq.shape == (layer.batch,), f"shape {norm_sq.shape}"
        assert norm_sq.dtype == torch.float32, f"dtype {norm_sq.dtype}"
        for i in range(layer.batch):
            _check_norm(layer, float(norm_sq[i]), truths[i][parameter], scales[i][parameter], share, i)
    _check_sums(draw, layer, given, truths, scales)
    if layer.family == "lora" and layer.lengths is None:
        _check_gradients(layer, given, truths, scales)
    _check_share(draw, layer, given, norms)


def both_threads(compute: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What a computation returns with one thread, which two must return too, bit by bit."""
    results = []
    threads = native.threads
    for count in (1, 2):
        native.threads = lambda count=count: count  # type: ignore[misc]
        try:
            results.append(compute())
        finally:
            native.threads = threads
    for one, two in zip(*results, strict=True):
        assert same_bits(one, two), "two threads give other bits than one"
    return results[0]


def _norms_of(layer: Layer, given: Sequence[Any], options: dict[str, Any]) -> list[Tensor]:
    with Guarded().outputs():
        result = getattr(native_ops, f"{layer.family}_norm_sq")(*given, **options, **layer.extra())
    return list(result) if isinstance(result, tuple) else [result]


def _check_norm(layer: Layer, norm_sq: float, gradient: Tensor, scale: float, share: float, i: int) -> None:
    exact = float(_norms(gradient.flatten()[None])[0])
    if not math.isfinite(exact):
        # An infinity may be float64's own range, which a float64 sum in another order does not leave.
        range_left = layer.dtype == torch.float64 and _all_finite(layer, i)
        assert range_left or not math.isfinite(norm_sq), (
            f"sample {i}: {norm_sq} of a gradient that is not finite"
        )
        return
    if not math.isfinite(norm_sq):
        assert not layer.benign, f"sample {i}: {norm_sq}, and exact is {exact}"
        return
    # What is not finite is in a place that this gradient does not read, if its scale is not a number.
    least = exact - (TRUTH_ROUNDING * min(scale, 1e300) if scale == scale else 0.0)
    assert math.sqrt(norm_sq) * (1 + 2.0**-50) >= least, f"sample {i}: √{norm_sq} < {exact}"
    if layer.benign:
        most = exact * math.sqrt(1 + share) + _ROOM * NORM_ABOVE[layer.dtype] * scale
        allowed = most * (1 + 2.0**-20) + 1e-18
        assert math.sqrt(norm_sq) <= allowed, f"sample {i}: √{norm_sq} > {allowed}, exact {exact}"


def _all_finite(layer: Layer, i: int) -> bool:
    return all(bool(t[i].isfinite().all()) for t in layer.tensors.values())


def _check_sums(
    draw: Draw,
    layer: Layer,
    given: Sequence[Any],
    truths: Sequence[list[Tensor]],
    scales: Sequence[list[float]],
) -> None:
    """out += Σ c_i G_i, of samples whose gradients are of a size that float32 products have."""
    factors = torch.from_numpy(draw.rng.random(layer.batch)).float()
    usable = [
        _usable(layer, scales[i]) and all(t.isfinite().all() for t in truths[i]) for i in range(layer.batch)
    ]
    factors *= torch.tensor([fits and not draw.chance(0.2) for fits in usable], dtype=torch.float32)
    dtype = draw.note("out", draw.one_of((torch.float64, torch.float64, torch.float32)))
    start = draw.one_of((0.0, 1.0, -1e3))
    strided_out = draw.chance(0.2)

    def compute() -> list[Tensor]:
        guarded = Guarded()
        outs = [
            guarded.empty(shape[::-1] if strided_out else shape, dtype).fill_(start) for shape in layer.outs
        ]
        outs = [out.permute(*reversed(range(out.dim()))) if strided_out else out for out in outs]
        _sum(layer, given, factors, outs)
        guarded.check()
        return outs

    for parameter, out in enumerate(both_threads(compute)):
        truth = torch.full_like(out, start, dtype=torch.float64)
        allowed = TRUTH_ROUNDING * (1 + abs(start)) * max(1.0, math.sqrt(out.numel()))
        for i, factor in enumerate(factors.tolist()):
            if factor:
                truth += factor * truths[i][parameter]
                allowed += factor * scales[i][parameter] * SUM_OFF[layer.dtype]
        if dtype == torch.float32:
            allowed += 2.0**-23 * float(truth.norm())
            if bool((truth.abs() > torch.finfo(dtype).max / 2).any()):
                continue
        off = float((out.double() - truth).norm())
        assert off <= allowed * (1 + 1e-9), f"parameter {parameter}: the sum is off by {off} > {allowed}"
    _check_grouped(draw, layer, given, factors)


def _usable(layer: Layer, scales: Sequence[float]) -> bool:
    """Whether float32 products (float64 ones of float64 inputs) of this size neither over- nor underflow."""
    least, most = (1e-120, 1e120) if layer.dtype == torch.float64 else (1e-25, 1e30)
    extreme = any(bool((t.double().abs() > most).any()) for t in layer.tensors.values())
    return not extreme and all(scale == 0.0 or least < scale < most for scale in scales)


def _sum(layer: Layer, given: Sequence[Any], factors: Tensor, outs: Sequence[Tensor]) -> None:
    function = getattr(native_ops, f"{layer.family}_weighted_sum")
    function(*given, factors, *outs, **layer.sum_options, **layer.extra())


def _check_grouped(draw: Draw, layer: Layer, given: Sequence[Any], factors: Tensor) -> None:
    """The call for many layers has the bits of the layer's own."""
    options = {name: value for name, value in layer.sum_options.items() if value is not None}
    if layer.lengths is not None or len(options) < len(layer.sum_options) or draw.chance(0.5):
        return
    guarded = Guarded()
    alone = [torch.zeros(shape, dtype=torch.float64) for shape in layer.outs]
    _sum(layer, given, factors, alone)
    layers, together = [], []
    for _ in range(draw.integer(1, 3)):
        outs = tuple(guarded.empty(shape, torch.float64).zero_() for shape in layer.outs)
        together.append(outs)
        layers.append(GroupedLayer(layer.family, tuple(given), options, outs))
    native_ops.weighted_sums(layers, factors)
    guarded.check()
    norms = getattr(native_ops, f"{layer.family}_norm_sq")(*given, **layer.options)
    of_layer = torch.stack(norms if isinstance(norms, tuple) else (norms,)).double().sum(0)
    one = GroupedLayer(layer.family, tuple(given), layer.options)
    total = native_ops.total_norm_sq([one] * len(layers)).double()
    expected = of_layer * len(layers)
    known = expected < torch.finfo(torch.float32).max  # beyond it the norm is infinite
    assert bool((total >= expected * (1 - 2.0**-50))[known].all()), "the grouped norm is too small"
    assert bool((total <= expected * (1 + 2.0**-22) + 2.0**-148)[known].all()), (
        "the grouped norm is too large"
    )
    for outs in together:
        for one, other in zip(alone, outs, strict=True):
            assert same_bits(one, other), "the grouped sum has other bits"


def _check_gradients(
    layer: Layer, given: Sequence[Any], truths: Sequence[list[Tensor]], scales: Sequence[list[float]]
) -> None:
    """Each sample's gradients of an adapter's two matrices, to their rounding."""

    def compute() -> list[Tensor]:
        with Guarded().outputs():
            return list(native_ops.lora_gradients(*given, **layer.sum_options))

    for parameter, gradients in enumerate(both_threads(compute)):
        for i in range(layer.batch):
            if _usable(layer, scales[i]) and bool(truths[i][parameter].isfinite().all()):
                off = float((gradients[i].double() - truths[i][parameter]).norm())
                allowed = scales[i][parameter] * SUM_OFF[layer.dtype] + TRUTH_ROUNDING
                assert off <= allowed, f"sample {i}: the gradient is off by {off} > {allowed}"


def _check_share(draw: Draw, layer: Layer, given: Sequence[Any], norms: Sequence[Tensor]) -> None:
    """What a sample adds, clipped by its norm, is within the clipping norm; a norm that is not finite drops it."""
    if not layer.batch:
        return
    i = draw.integer(0, layer.batch - 1)
    square = torch.stack([norm_sq.double() for norm_sq in norms]).sum(0)
    limit = draw.note("limit", 10.0 ** draw.rng.uniform(-3, 3))
    factors = native_ops.clip_factors(square, limit)
    factors = torch.where(torch.arange(layer.batch) == i, factors, torch.zeros_like(factors))
    if not math.isfinite(float(square[i])):
        assert float(factors[i]) == 0.0, f"sample {i}: a factor of {float(factors[i])}"
        return
    outs = [torch.zeros(shape, dtype=torch.float64) for shape in layer.outs]
    _sum(layer, given, factors, outs)
    added = float(_norms(torch.cat([out.flatten() for out in outs])[None])[0])
    assert added <= limit * CLIP_ROUNDING, f"sample {i} adds {added}, the clipping norm is {limit}"
