"""torch's convolutions and transposed convolutions of 1 to 3 dimensions, which record instead of filling `.grad`.

A 1×1 convolution is a linear layer on the transposed layout; a depthwise one has a rule of its own; any
other is a linear layer on unfolded windows, group by group.

A transposed convolution computes the input gradient of a convolution with the same weight. So the gradient of its
weight is that convolution's, with x and g exchanged: the transposed one's input serves as output gradient, and its
output gradient as input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dpkernels.nn.layers.conv_records import (
    Conv1dRecord,
    Conv2dRecord,
    Conv3dRecord,
    ConvRecord,
    DepthwiseConv1dRecord,
)
from dpkernels.nn.recording.module import GhostModule
from dpkernels.nn.recording.records import BiasRecord, ExpandedRecord, LinearRecord, Record
from dpkernels.nn.tensors import accumulation_dtype, autocast_dtype, maybe_cast, no_autocast, not_a_view


class _GhostConv(GhostModule, _ConvNd):
    """Base of the three convolutions; each defines `forward` itself, next to its torch class."""

    ghost_channels_second = True
    ghost_in_graph = True

    def _ghost_forward(self, x: Tensor) -> Tensor:
        n = len(self.kernel_size)
        if x.dim() == n + 1:
            return self._ghost_forward(x.unsqueeze(0)).squeeze(0)
        x, padding = zero_padding(self, x)
        dtype = autocast_dtype(x)
        return _Conv.apply(maybe_cast(x, dtype), self.weight, self.bias, self, padding, None, dtype)


class GhostConv1d(_GhostConv, nn.Conv1d):
    """nn.Conv1d: same constructor, same state_dict, same results; x [B,C,T], the first dimension is the
    batch.

    All strides, paddings, padding modes, dilations and groups are covered. Privately the backward returns dx. It
    records x and g [B,p,T'] if the weight is trained, and Σ_t g if the bias is trained.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Conv1d's."""
        weight, bias = self.weight, self.bias  # once: nn.Module looks them up last
        if not self._ghost_active(weight, bias):
            return self._conv_forward(input, weight, bias)
        return self._ghost_forward(input)


class GhostConv2d(_GhostConv, nn.Conv2d):
    """nn.Conv2d: same constructor, same state_dict, same results; x [B,C,H,W]; else as GhostConv1d."""

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Conv2d's."""
        weight, bias = self.weight, self.bias  # once: nn.Module looks them up last
        if not self._ghost_active(weight, bias):
            return self._conv_forward(input, weight, bias)
        return self._ghost_forward(input)


class GhostConv3d(_GhostConv, nn.Conv3d):
    """nn.Conv3d: same constructor, same state_dict, same results; x [B,C,D,H,W]; else as GhostConv1d."""

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Conv3d's."""
        weight, bias = self.weight, self.bias  # once: nn.Module looks them up last
        if not self._ghost_active(weight, bias):
            return self._conv_forward(input, weight, bias)
        return self._ghost_forward(input)


class _GhostConvTranspose(GhostModule, _ConvTransposeNd):
    """Base of the three transposed convolutions; each defines `forward` itself, next to its torch class."""

    ghost_channels_second = True
    ghost_in_graph = True

    def _ghost_forward(self, x: Tensor, output_size: list[int] | None) -> Tensor:
        n = len(self.kernel_size)
        geometry: Any = (self.stride, self.padding, self.kernel_size, n, self.dilation)
        more = tuple(self._output_padding(x, output_size, *geometry))
        single = x.dim() == n + 1
        x = x.unsqueeze(0) if single else x
        dtype = autocast_dtype(x)
        y = _Conv.apply(maybe_cast(x, dtype), self.weight, self.bias, self, self.padding, more, dtype)
        return y.squeeze(0) if single else y


class GhostConvTranspose1d(_GhostConvTranspose, nn.ConvTranspose1d):
    """nn.ConvTranspose1d: same constructor, same state_dict, same results; x [B,C,T], the first dimension is the batch.

    All strides, paddings, output paddings (`output_size` too), dilations and groups are covered. Privately the backward
    returns dx. It records g [B,p,T'] and x, exchanged, if the weight is trained, and Σ_t g if the bias is trained.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As nn.ConvTranspose1d's."""
        if not self._ghost_active(self.weight, self.bias):
            return super().forward(input, output_size)
        return self._ghost_forward(input, output_size)


class GhostConvTranspose2d(_GhostConvTranspose, nn.ConvTranspose2d):
    """nn.ConvTranspose2d: same constructor, same state_dict, same results; x [B,C,H,W]; as GhostConvTranspose1d."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As nn.ConvTranspose2d's."""
        if not self._ghost_active(self.weight, self.bias):
            return super().forward(input, output_size)
        return self._ghost_forward(input, output_size)


class GhostConvTranspose3d(_GhostConvTranspose, nn.ConvTranspose3d):
    """nn.ConvTranspose3d: same constructor, same state_dict, same results; x [B,C,D,H,W]; as GhostConvTranspose1d."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As nn.ConvTranspose3d's."""
        if not self._ghost_active(self.weight, self.bias):
            return super().forward(input, output_size)
        return self._ghost_forward(input, output_size)


class _Conv(torch.autograd.Function):
    """A convolution, or a transposed one if `output_padding` is given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: Any,
        padding: tuple[int, ...],
        output_padding: tuple[int, ...] | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer, ctx.padding, ctx.output_padding = (
            layer.ghost_tape,
            layer,
            padding,
            output_padding,
        )
        transposed = output_padding is not None
        zeros = (0,) * len(padding)
        ctx.geometry = (
            layer.stride,
            padding,
            layer.dilation,
            transposed,
            output_padding or zeros,
            layer.groups,
        )
        ctx.bias, ctx.shape = bias, x.shape
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        with no_autocast(x.device.type):
            matrix, vector = maybe_cast(weight, dtype), maybe_cast(bias, dtype)
            return not_a_view(torch.convolution(x, matrix, vector, *ctx.geometry))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        x, weight = ctx.saved_tensors
        layer, dx = ctx.layer, None
        with no_autocast(g.device.type):
            if ctx.needs_input_grad[0]:
                # dx depends on the shape of the input only.
                like = g.new_empty(1).expand(ctx.shape) if x is None else x
                dx, _, _ = torch.ops.aten.convolution_backward(
                    g, like, weight.to(g.dtype), None, *ctx.geometry, [True, False, False]
                )
            if ctx.needs_input_grad[1]:
                operands, exchanged = (x, g, ctx.padding), ctx.output_padding is not None
                if exchanged:
                    operands = _exchanged_operands(x, g, ctx.padding, ctx.output_padding)
                ctx.tape.add(weight_record(layer, layer.ghost_label(), *operands, exchanged=exchanged))
            if ctx.bias is not None and ctx.needs_input_grad[2]:
                total = g.flatten(2).sum(2, dtype=accumulation_dtype(g))
                ctx.tape.add(BiasRecord(layer.ghost_label(), ctx.bias, total))
        return dx, None, None, None, None, None, None


def _exchanged_operands(
    x: Tensor, g: Tensor, padding: tuple[int, ...], output_padding: tuple[int, ...]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(input, output gradient, padding) of the convolution whose weight a transposed convolution shares.

    The input is g. Output padding π' lengthens g at its end, so only π − π' zeros are appended there. If that number is
    negative, no window reads so many frames at the end, and they are cut off.
    """
    if not any(output_padding):
        return g, x, padding
    ends = [(before, before - more) for before, more in zip(padding, output_padding, strict=True)]
    return F.pad(g, [n for pair in reversed(ends) for n in pair]), x, (0,) * len(padding)


def zero_padding(layer: _ConvNd, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(x, π): x [B,C,*] with all padding of the layer except π zeros on both sides of each dimension."""
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


def weight_record(
    layer: Any, name: str, x: Tensor, g: Tensor, padding: tuple[int, ...], exchanged: bool = False
) -> Record:
    """The weight's record for x [B,C,*], padded by `padding` zeros, and output gradient g [B,p,*].

    `exchanged`: the layer is a transposed convolution, and x and g are those of `_exchanged_operands`.
    """
    groups, weight = layer.groups, layer.weight
    ones = (1,) * len(padding)
    if layer.kernel_size == layer.stride == ones and groups == 1 and not any(padding):
        return LinearRecord(name, weight, _as_sequence(x), _as_sequence(g), exchanged)
    if groups == x.shape[1] and (groups > 1 or g.shape[1] == 1):
        if x.dim() == 3 and g.shape[1] == groups:
            geometry = (layer.stride[0], padding[0], layer.dilation[0])
            return DepthwiseConv1dRecord(name, weight, x, g, *geometry, exchanged)
        return ExpandedRecord(name, weight, _depthwise_gradients(layer, x, g, padding))
    return _RECORDS[x.dim()](name, weight, x, g, layer.stride, padding, layer.dilation, groups, exchanged)


_RECORDS: dict[int, type[ConvRecord]] = {3: Conv1dRecord, 4: Conv2dRecord, 5: Conv3dRecord}


def _as_sequence(t: Tensor) -> Tensor:
    """[B,C,*] -> [B,T,C]; no copy."""
    return t.flatten(2).transpose(1, 2)


def _depthwise_gradients(layer: Any, x: Tensor, g: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Per-sample gradients [B, *weight.shape] of a depthwise weight, accumulated in float32.

    Σ_t g[b,c,t] x[b,c, t·stride + tap·dilation], with p·∏k entries per sample, far fewer than x and g. Every channel
    is a separate group, so the samples of a batch can be further channels of one convolution. Its weight gradient
    holds theirs side by side, and costs as much as the plain weight gradient of the batch.
    """
    dtype, batch = accumulation_dtype(g), g.shape[0]
    shape = layer.weight.shape
    if 0 in (*x.shape, *g.shape):
        return g.new_zeros(batch, *shape, dtype=dtype)
    x, g = (t.to(dtype).reshape(1, -1, *t.shape[2:]) for t in (x, g))
    like = g.new_empty(1).expand(batch * shape[0], *shape[1:])  # only the shape of the weight is read
    zeros = [0] * len(padding)
    geometry = (layer.stride, padding, layer.dilation, False, zeros, batch * layer.groups)
    _, gradients, _ = torch.ops.aten.convolution_backward(g, x, like, None, *geometry, [False, True, False])
    return gradients.view(batch, *shape)
