"""Weighted sums of many layers, one after the other, each by the backend that its family has; then the noise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpkernels.backends import registry


@dataclass(frozen=True)
class Layer:
    """One layer's weighted sum: `op`(*tensors, factors, *outs, **options)."""

    op: str
    tensors: tuple[Tensor, ...]
    outs: tuple[Tensor, ...]
    options: dict[str, Any]


def layers(
    xs: Sequence[Tensor],
    gs: Sequence[Tensor],
    kinds: Sequence[str],
    outs: Sequence[Tensor],
    hs: Sequence[Tensor],
    dhs: Sequence[Tensor],
    scalings: Sequence[float],
    padding_idxs: Sequence[int],
    strides: Sequence[int],
    paddings: Sequence[int],
    dilations: Sequence[int],
) -> Iterator[Layer]:
    """The arguments of `dpkernels.ops.clip_and_noise`, layer by layer."""
    rest = iter(outs)
    lora = zip(hs, dhs, scalings, strict=True)
    embedding = iter(padding_idxs)
    conv = zip(strides, paddings, dilations, strict=True)
    for x, g, kind in zip(xs, gs, kinds, strict=True):
        options: dict[str, Any] = {}
        tensors: tuple[Tensor, ...] = (x, g)
        mine: tuple[Tensor, ...] = (next(rest),)
        if kind == "bias":
            tensors = (g,)
        elif kind == "lora":
            h, dh, scaling = next(lora)
            tensors, mine, options = (x, h, g, dh), (*mine, next(rest)), {"scaling": scaling}
        elif kind == "embedding":
            options = {"padding_idx": next(embedding)}
        elif kind == "depthwise_conv1d":
            options = dict(zip(("stride", "padding", "dilation"), next(conv), strict=True))
        yield Layer(f"{kind}_weighted_sum", tensors, mine, options)


def add_layer(layer: Layer, factors: Tensor) -> None:
    """By the backend of the layer's family: the norm's bound is on what that one adds."""
    function = registry.implementation(layer.op, factors.device.type)
    function(*layer.tensors, factors, *layer.outs, **layer.options)


def clip_and_noise(
    xs: list[Tensor],
    gs: list[Tensor],
    kinds: list[str],
    factors: Tensor,
    outs: list[Tensor],
    hs: list[Tensor],
    dhs: list[Tensor],
    scalings: list[float],
    padding_idxs: list[int],
    strides: list[int],
    paddings: list[int],
    dilations: list[int],
    key: Tensor,
    nonces: Tensor,
    noise_scale: float,
    grid: float,
    divisor: float,
) -> None:
    """Out += Σ_i c_i g_iᵀx_i for every layer, then noise; see `dpkernels.ops.clip_and_noise`."""
    for layer in layers(xs, gs, kinds, outs, hs, dhs, scalings, padding_idxs, strides, paddings, dilations):
        add_layer(layer, factors)
    if not key.numel():
        return
    normal = registry.implementation("chacha20_normal", factors.device.type)
    secret, streams, unit = bytes(key.tolist()), bytes(nonces.tolist()), grid or 1.0
    for i, out in enumerate(outs):
        if noise_scale > 0:
            z = normal(out.numel(), key=secret, nonce=streams[12 * i : 12 * (i + 1)], device=out.device)
            out.div_(unit).add_(z.view(out.shape).mul_(noise_scale / unit))
        else:
            out.div_(unit)
        if grid:
            out.round_()
        out.mul_(unit / divisor)
