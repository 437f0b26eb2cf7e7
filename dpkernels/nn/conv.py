"""GhostConv1d and GhostConv2d: torch's convolutions that record instead of filling `.grad`.

A 1×1 convolution is a linear layer on the transposed layout; a depthwise one has a rule of its own; any
other is a linear layer on unfolded windows, group by group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd

from dpkernels.nn.conv_records import Conv1dRecord, Conv2dRecord, DepthwiseConv1dRecord
from dpkernels.nn.module import (
    GhostModule,
    accumulation_dtype,
    autocast_dtype,
    maybe_cast,
    no_autocast,
    not_a_view,
)
from dpkernels.nn.records import BiasRecord, ExpandedRecord, LinearRecord, Record


class _GhostConv(GhostModule, _ConvNd):
    """What the two share; `forward` is in the layers, next to their torch class."""

    def _ghost_forward(self, x: Tensor) -> Tensor:
        n = len(self.kernel_size)
        if x.dim() == n + 1:
            return self._ghost_forward(x.unsqueeze(0)).squeeze(0)
        x, padding = zero_padding(self, x)
        dtype = autocast_dtype(x)
        return _Conv.apply(maybe_cast(x, dtype), self.weight, self.bias, self, padding, dtype)


class GhostConv1d(_GhostConv, nn.Conv1d):
    """nn.Conv1d: same constructor, same state_dict, same results; x [B,C,T], the first dimension is the
    batch.

    All strides, paddings (padding modes too), dilations and groups. Privately the backward returns dx and
    records x and g [B,p,T'] for the weight, Σ_t g for the bias, where these are trained.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Conv1d's."""
        if not self._ghost_active(self.weight, self.bias):
            return self._conv_forward(input, self.weight, self.bias)
        return self._ghost_forward(input)


class GhostConv2d(_GhostConv, nn.Conv2d):
    """nn.Conv2d: same constructor, same state_dict, same results; x [B,C,H,W]; else as GhostConv1d."""

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Conv2d's."""
        if not self._ghost_active(self.weight, self.bias):
            return self._conv_forward(input, self.weight, self.bias)
        return self._ghost_forward(input)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: _GhostConv,
        padding: tuple[int, ...],
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer, ctx.padding = layer.ghost_tape, layer, padding
        ctx.bias, ctx.shape = bias, x.shape
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        convolve = F.conv1d if x.dim() == 3 else F.conv2d
        geometry = (layer.stride, padding, layer.dilation, layer.groups)
        with no_autocast(x.device.type):
            return not_a_view(convolve(x, maybe_cast(weight, dtype), maybe_cast(bias, dtype), *geometry))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 6
        x, weight = ctx.saved_tensors
        layer, dx = ctx.layer, None
        with no_autocast(g.device.type):
            if ctx.needs_input_grad[0]:
                # Only the shape of the input matters for dx.
                like = g.new_empty(1).expand(ctx.shape) if x is None else x
                zeros = [0] * len(ctx.padding)
                geometry = (layer.stride, ctx.padding, layer.dilation, False, zeros, layer.groups)
                dx, _, _ = torch.ops.aten.convolution_backward(
                    g, like, weight.to(g.dtype), None, *geometry, [True, False, False]
                )
            if ctx.needs_input_grad[1]:
                ctx.tape.add(weight_record(layer, layer.ghost_label(), x, g, ctx.padding))
            if ctx.bias is not None and ctx.needs_input_grad[2]:
                total = g.flatten(2).sum(2, dtype=accumulation_dtype(g))
                ctx.tape.add(BiasRecord(layer.ghost_label(), ctx.bias, total))
        return dx, None, None, None, None, None


def zero_padding(layer: _ConvNd, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(x, π): what the layer pads beyond π zeros on both sides of each dimension of x [B,C,*] is put on x."""
    n = len(layer.kernel_size)
    none = (0,) * n
    if layer.padding_mode != "zeros":
        return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), none
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if all(total % 2 == 0 for total in totals):
            return x, tuple(total // 2 for total in totals)
        return F.pad(x, layer._reversed_padding_repeated_twice), none
    return x, none if isinstance(layer.padding, str) else tuple(layer.padding)


def weight_record(layer: _ConvNd, name: str, x: Tensor, g: Tensor, padding: tuple[int, ...]) -> Record:
    """The weight's record for x [B,C,*], padded by `padding` zeros, and output gradient g [B,p,*]."""
    groups = layer.groups
    weight: Any = layer.weight
    ones = (1,) * len(padding)
    if layer.kernel_size == layer.stride == ones and groups == 1 and not any(padding):
        return LinearRecord(name, weight, _as_sequence(x), _as_sequence(g))
    if groups == layer.in_channels and (groups > 1 or layer.out_channels == 1):
        if x.dim() == 3 and layer.out_channels == groups:
            geometry = (layer.stride[0], padding[0], layer.dilation[0])
            return DepthwiseConv1dRecord(name, weight, x, g, *geometry)
        return ExpandedRecord(name, weight, _depthwise_gradients(layer, x, g, padding))
    kind = Conv1dRecord if x.dim() == 3 else Conv2dRecord
    return kind(name, weight, x, g, layer.stride, padding, layer.dilation, groups)


def _as_sequence(t: Tensor) -> Tensor:
    """[B,C,*] -> [B,T,C]; no copy."""
    return t.flatten(2).transpose(1, 2)


def _depthwise_gradients(layer: _ConvNd, x: Tensor, g: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Per-sample gradients [B, *weight.shape] of a depthwise weight, accumulated in float32.

    Σ_t g[b,c,t] x[b,c, t·stride + tap·dilation]; they have p·∏k entries a sample, far fewer than x and g. Every
    channel is a group of its own, so the samples of a batch are more channels of one convolution: its weight
    gradient holds theirs side by side, at the price of the batch's own weight gradient.
    """
    dtype, batch = accumulation_dtype(g), g.shape[0]
    shape = layer.weight.shape
    if 0 in (*x.shape, *g.shape):
        return g.new_zeros(batch, *shape, dtype=dtype)
    x, g = (t.to(dtype).reshape(1, -1, *t.shape[2:]) for t in (x, g))
    like = g.new_empty(1).expand(batch * shape[0], *shape[1:])  # only the shape of the weight matters
    zeros = [0] * len(padding)
    geometry = (layer.stride, padding, layer.dilation, False, zeros, batch * layer.groups)
    _, gradients, _ = torch.ops.aten.convolution_backward(g, x, like, None, *geometry, [False, True, False])
    return gradients.view(batch, *shape)
