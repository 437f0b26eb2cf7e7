"""Norms and weighted sums of many layers, one after the other, each by its family's backend; then the noise."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpkernels.backends import registry
from dpkernels.backends.bounds import round_up


class Layer(NamedTuple):
    """One layer: its weighted sum is family_weighted_sum(*tensors, factors, *outs, **options), its norm likewise."""

    family: str
    tensors: tuple[Tensor, ...]
    outs: tuple[Tensor, ...]
    options: dict[str, Any]

    @property
    def sum_op(self) -> str:
        """The op of its weighted sum."""
        return f"{self.family}_weighted_sum"


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
        yield Layer(kind, tensors, mine, options)


def norm_layers(
    xs: Sequence[Tensor],
    gs: Sequence[Tensor],
    kinds: Sequence[str],
    hs: Sequence[Tensor],
    dhs: Sequence[Tensor],
    scalings: Sequence[float],
    padding_idxs: Sequence[int],
    kernel_sizes: Sequence[int],
    strides: Sequence[int],
    paddings: Sequence[int],
    dilations: Sequence[int],
) -> Iterator[Layer]:
    """The arguments of `dpkernels.ops.total_norm_sq`, layer by layer, without outs."""
    none = [xs[0]] * (2 * len(kinds)) if kinds else []
    sizes = iter(kernel_sizes)
    for layer in layers(xs, gs, kinds, none, hs, dhs, scalings, padding_idxs, strides, paddings, dilations):
        size = {"kernel_size": next(sizes)} if layer.family == "depthwise_conv1d" else {}
        yield Layer(layer.family, layer.tensors, (), layer.options | size)


def of_layer(layer: Layer) -> tuple[Tensor, ...]:
    """A layer's squared norms [B], one a parameter, by the backend of its family."""
    op = f"{layer.family}_norm_sq"
    function = registry.implementation(op, layer.tensors[-1].device.type)
    found = function(*layer.tensors, **layer.options)
    return found if isinstance(found, tuple) else (found,)


def total_norm_sq(
    xs: list[Tensor],
    gs: list[Tensor],
    kinds: list[str],
    hs: list[Tensor],
    dhs: list[Tensor],
    scalings: list[float],
    padding_idxs: list[int],
    kernel_sizes: list[int],
    strides: list[int],
    paddings: list[int],
    dilations: list[int],
) -> Tensor:
    """Σ over layers of ‖g_iᵀx_i‖² and its like, rounded up; see `dpkernels.ops.total_norm_sq`."""
    total = torch.zeros(len(gs[0]), dtype=torch.float64, device=gs[0].device)
    parts = 0
    for layer in norm_layers(
        xs, gs, kinds, hs, dhs, scalings, padding_idxs, kernel_sizes, strides, paddings, dilations
    ):
        for part in of_layer(layer):
            total += part.double()
            parts += 1
    # each addition loses at most 2⁻⁵³ of the sum
    return round_up(total * (1 + (parts + 1) * 2.0**-52))


def add_layer(layer: Layer, factors: Tensor) -> None:
    """By the backend of the layer's family: the norm's bound is on what that one adds."""
    function = registry.implementation(layer.sum_op, factors.device.type)
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
    """out += Σ_i c_i g_iᵀx_i for every layer, then noise; see `dpkernels.ops.clip_and_noise`."""
    for layer in layers(xs, gs, kinds, outs, hs, dhs, scalings, padding_idxs, strides, paddings, dilations):
        add_layer(layer, factors)
    epilogue(outs, key, nonces, noise_scale, grid, divisor)


def epilogue(
    outs: Sequence[Tensor], key: Tensor, nonces: Tensor, noise_scale: float, grid: float, divisor: float
) -> None:
    """Noise, grid and division of every out, where there is a key."""
    if not key.numel():
        return
    normal = registry.implementation("chacha20_normal", outs[0].device.type)
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
