"""Definition of the ops on many layers: the sum of their norms; their weighted sums, then noise and division."""

import torch
from torch import Tensor

from dpkernels.reference._samples import round_up
from dpkernels.reference.bias import bias_norm_sq, bias_weighted_sum
from dpkernels.reference.chacha20 import chacha20_normal
from dpkernels.reference.conv import depthwise_conv1d_norm_sq, depthwise_conv1d_weighted_sum
from dpkernels.reference.embedding import embedding_norm_sq, embedding_weighted_sum
from dpkernels.reference.linear import linear_norm_sq, linear_weighted_sum
from dpkernels.reference.lora import lora_norm_sq, lora_weighted_sum
from dpkernels.reference.norm import layer_norm_norm_sq, layer_norm_weighted_sum


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
    """Σ_i c_i g_iᵀx_i into every layer's out; then out = round((out + noise_scale·z)/grid)·grid/divisor."""
    rest = iter(outs)
    lora = zip(hs, dhs, scalings, strict=True)
    embedding = iter(padding_idxs)
    conv = zip(strides, paddings, dilations, strict=True)
    for x, g, kind in zip(xs, gs, kinds, strict=True):
        if kind == "linear":
            linear_weighted_sum(x, g, factors, next(rest))
        elif kind == "bias":
            bias_weighted_sum(g, factors, next(rest))
        elif kind == "lora":
            h, dh, scaling = next(lora)
            lora_weighted_sum(x, h, g, dh, factors, next(rest), next(rest), scaling=scaling)
        elif kind == "embedding":
            embedding_weighted_sum(x, g, factors, next(rest), padding_idx=next(embedding))
        elif kind == "layer_norm":
            layer_norm_weighted_sum(x, g, factors, next(rest))
        else:
            stride, padding, dilation = next(conv)
            depthwise_conv1d_weighted_sum(
                x, g, factors, next(rest), stride=stride, padding=padding, dilation=dilation
            )
    if not key.numel():
        return
    secret, streams = bytes(key.tolist()), bytes(nonces.tolist())
    for i, out in enumerate(outs):
        noised = out.clone()
        if noise_scale > 0:
            z = chacha20_normal(out.numel(), key=secret, nonce=streams[12 * i : 12 * (i + 1)])
            noised += noise_scale * z.view(out.shape)
        if grid:
            noised = (noised / grid).round() * grid
        out.copy_(noised / divisor)


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
    """Σ over layers of their squared norms, in float64, rounded up to float32."""
    total = torch.zeros(len(gs[0]), dtype=torch.float64, device=gs[0].device)
    lora = zip(hs, dhs, scalings, strict=True)
    embedding = iter(padding_idxs)
    conv = zip(kernel_sizes, strides, paddings, dilations, strict=True)
    for x, g, kind in zip(xs, gs, kinds, strict=True):
        if kind == "linear":
            total += linear_norm_sq(x, g)
        elif kind == "bias":
            total += bias_norm_sq(g)
        elif kind == "lora":
            h, dh, scaling = next(lora)
            total += sum(norm.double() for norm in lora_norm_sq(x, h, g, dh, scaling=scaling))
        elif kind == "embedding":
            total += embedding_norm_sq(x, g, padding_idx=next(embedding))
        elif kind == "layer_norm":
            total += layer_norm_norm_sq(x, g)
        else:
            size, stride, padding, dilation = next(conv)
            total += depthwise_conv1d_norm_sq(
                x, g, kernel_size=size, stride=stride, padding=padding, dilation=dilation
            )
    return round_up(list(total), gs[0])
