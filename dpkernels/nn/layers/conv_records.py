"""The records of convolutions: depthwise ones by their own ops, general ones as linear layers on unfolded windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn.recording.choice import LayerSizes
from dpkernels.nn.recording.records import (
    ExpandedRecord,
    LinearRecord,
    Record,
    join_names,
    materialised_gradient,
    unit_frames,
)
from dpkernels.nn.tensors import common_dtype, per_sample_product, sum_up
from dpkernels.ops import GroupedLayer

WINDOW_BYTES = 2**28
"""Largest memory of the unfolded windows of a convolution that are held at a time, on a GPU."""

CPU_WINDOW_BYTES = 2**23
"""The same on a CPU: windows that are multiplied while they are in its cache take half the time."""


@dataclass(eq=False)
class DepthwiseConv1dRecord(Record):
    """Weight [C,1,k] of a depthwise convolution: x [B,C,T], g [B,C,T'].

    `exchanged`: the layer is a transposed one, its output gradient is in `x` and its input in `g`.
    """

    layer: str
    weight: nn.Parameter
    x: Tensor
    g: Tensor
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    exchanged: bool = False

    @property
    def output_gradient(self) -> Tensor:
        """The layer's output gradient."""
        return self.x if self.exchanged else self.g

    def norm_sq(self) -> Tensor:
        """Σ over channels c and taps j of (Σ_t g_tc x_{t+j,c})²."""
        x, g = common_dtype(self.x, self.g)
        return ops.depthwise_conv1d_norm_sq(
            x,
            g,
            kernel_size=self.weight.shape[-1],
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Add Σ_i c_i Σ_t g_tc x_{t+j,c} at channel c and tap j."""
        x, g = common_dtype(self.x, self.g)
        ops.depthwise_conv1d_weighted_sum(
            x,
            g,
            factors,
            sums[self.weight],
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )

    def share(self) -> GroupedLayer | None:
        """A depthwise convolution."""
        if self.x.dtype != self.g.dtype:
            return None
        options = {
            "kernel_size": self.weight.shape[-1],
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
        }
        return GroupedLayer("depthwise_conv1d", (self.x, self.g), options)

    def of_units(self, size: int) -> DepthwiseConv1dRecord:
        """The unit's frames are those of its rows, with gaps in which g is 0, so that no window reads the next row."""
        use = self._padded()
        windows = -(-use.x.shape[2] // self.stride)  # the next row's first window comes after this many
        x, g = _pad_end(use.x, windows * self.stride), _pad_end(use.g, windows)
        last = (size - 1) * windows
        x = _rows_in_time(x, size)[..., : last * self.stride + use.x.shape[2]]
        return replace(use, x=x, g=_rows_in_time(g, size)[..., : last + use.g.shape[2]])

    def merge(self, *others: Record) -> Record:
        """Concatenates the uses along T, with gaps in which g is 0, so that no window of one use reads the next."""
        uses = [self._padded()]
        for other in others:
            if (
                not isinstance(other, DepthwiseConv1dRecord)
                or other.weight is not self.weight
                or (other.stride, other.dilation) != (self.stride, self.dilation)
            ):
                return super().merge(other)
            uses.append(other._padded())
        xs, gs = [], []
        for use in uses[:-1]:
            windows = -(-use.x.shape[2] // self.stride)  # the next use's first window comes after this many
            xs.append(_pad_end(use.x, windows * self.stride))
            gs.append(_pad_end(use.g, windows))
        x, g = (torch.cat(common_dtype(*parts), 2) for parts in ((*xs, uses[-1].x), (*gs, uses[-1].g)))
        return DepthwiseConv1dRecord(join_names(*uses), self.weight, x, g, self.stride, 0, self.dilation)

    def _padded(self) -> DepthwiseConv1dRecord:
        return replace(self, x=nn.functional.pad(self.x, (self.padding, self.padding)), padding=0)


@dataclass(eq=False)
class ConvRecord(Record):
    """Weight `[p, d/groups, *k]` of a general convolution: x `[B, d, *space]`, g `[B, p, *space']`.

    It is a linear layer on unfolded windows. The windows are ∏k times larger than x. So they are unfolded when needed,
    for as many samples at a time as `WINDOW_BYTES` (`CPU_WINDOW_BYTES`) allows, and not kept: once to materialise the
    gradients, or twice for norm and sum. Where a sample's gradient is no larger than its windows (p/groups ≤ ∏space'),
    to materialise it and to read it twice is less work than to unfold again.

    `exchanged`: the layer is a transposed one, its output gradient is in `x` and its input in `g`.
    """

    materialises_by_default: ClassVar[bool] = True

    layer: str
    weight: nn.Parameter
    x: Tensor
    g: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    exchanged: bool = False
    unit: int = 1

    @property
    def batch_size(self) -> int:
        """B, in units (see `Record.of_units`)."""
        return self.g.shape[0] // self.unit

    def of_units(self, size: int) -> ConvRecord:
        """The unit's windows are those of its rows, one after the other."""
        return replace(self, unit=size)

    @property
    def output_gradient(self) -> Tensor:
        """The layer's output gradient."""
        return self.x if self.exchanged else self.g

    def _group(self, index: int, samples: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """(x [B,T',∏k·d/groups], g [B,T',p/groups]) of one group of some units, in one dtype; T' = unit·∏space'."""
        first, end, _ = samples.indices(self.batch_size)
        samples = slice(first * self.unit, end * self.unit)
        x, g = (t[samples].chunk(self.groups, 1)[index] for t in (self.x, self.g))
        x = nn.functional.pad(x, [n for size in reversed(self.padding) for n in (size, size)])
        windows = unfold(x, self.weight.shape[2:], self.stride, self.dilation, g.shape[2:])
        windows, g = common_dtype(windows.transpose(1, 2), g.flatten(2).transpose(1, 2))
        return unit_frames(windows, self.unit), unit_frames(g, self.unit)

    def _window_bytes(self) -> int:
        """Bytes of one sample's windows of one group."""
        return math.prod(self.g.shape[2:]) * self.weight[0].numel() * self.x.element_size()

    def _parts(self) -> list[slice]:
        """Ranges of units whose windows of one group take at most WINDOW_BYTES, or of one unit."""
        limit = CPU_WINDOW_BYTES if self.x.device.type == "cpu" else WINDOW_BYTES
        step = max(1, limit // max(self.unit * self._window_bytes(), 1))
        return [slice(first, first + step) for first in range(0, max(self.batch_size, 1), step)]

    def norm_sq(self) -> Tensor:
        """Σ over groups of ‖gᵀ windows‖²."""
        return torch.cat([self._norm_sq(part) for part in self._parts()])

    def _norm_sq(self, part: slice) -> Tensor:
        return sum_up([ops.linear_norm_sq(*self._group(i, part)) for i in range(self.groups)])

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Σ_i c_i gᵀ windows, group by group."""
        rows = sums[self.weight].view(self.groups, self.weight.shape[0] // self.groups, -1)
        for part in self._parts():
            for i in range(self.groups):
                x, g = self._group(i, part)
                ops.linear_weighted_sum(x, g, factors[part], rows[i])

    def entries(self) -> int:
        """p·d/groups·∏k, the size of the weight."""
        return self.weight.numel()

    def chosen_by(self) -> tuple[tuple[LayerSizes, Tensor, Tensor | None], ...]:
        """The sizes for one position of the output gradient, and these positions."""
        gradient = self.output_gradient
        channels, of_gradient = (
            self.x.shape[1] * self.x.element_size(),
            self.g.shape[1] * self.g.element_size(),
        )
        window_bytes = self.groups * self.weight[0].numel() * self.x.element_size()
        steps = math.prod(self.stride)
        if self.exchanged:  # there are ∏stride output positions for each position that has a window
            held = channels + of_gradient // steps
            window_bytes, of_gradient = window_bytes // steps, channels
        else:
            held = channels * steps + of_gradient
        outputs, inputs = self.weight.shape[0] // self.groups, self.weight[0].numel()
        sizes = LayerSizes(
            outputs, inputs, self.entries(), held, of_gradient, window_bytes=max(window_bytes, 1)
        )
        return ((sizes, gradient.movedim(1, -1), None),)

    def materialised(self) -> tuple[ExpandedRecord, ...]:
        """gᵀ windows, with the groups concatenated."""
        gradients = torch.cat([self._gradients(part) for part in self._parts()])
        return (materialised_gradient(self.layer, self.weight, gradients),)

    def _gradients(self, part: slice) -> Tensor:
        groups = [per_sample_product(g, x) for x, g in (self._group(i, part) for i in range(self.groups))]
        return torch.cat(groups, 1)

    def as_linear(self, dtype: torch.dtype) -> LinearRecord | None:
        """The linear layer on the windows; None if groups > 1."""
        return LinearRecord(self.layer, self.weight, *self._group(0)) if self.groups == 1 else None

    def merge(self, *others: Record) -> Record:
        """Merges the uses as linear records on unfolded windows, or materialises them if groups > 1."""
        known = all(isinstance(other, LinearRecord | ConvRecord) for other in others)
        linear = self.as_linear(self.x.dtype) if known else None
        return super().merge(*others) if linear is None else linear.merge(*others)


@dataclass(eq=False)
class Conv1dRecord(ConvRecord):
    """Weight [p, d/groups, k]: x [B,d,T], g [B,p,T']."""

    stride: tuple[int, ...] = (1,)
    padding: tuple[int, ...] = (0,)
    dilation: tuple[int, ...] = (1,)


@dataclass(eq=False)
class Conv2dRecord(ConvRecord):
    """Weight [p, d/groups, kh, kw]: x [B,d,H,W], g [B,p,H',W']."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)


@dataclass(eq=False)
class Conv3dRecord(ConvRecord):
    """Weight [p, d/groups, kd, kh, kw]: x [B,d,D,H,W], g [B,p,D',H',W']."""

    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0)
    dilation: tuple[int, ...] = (1, 1, 1)


def unfold(
    x: Tensor, kernel: torch.Size, stride: tuple[int, ...], dilation: tuple[int, ...], output: torch.Size
) -> Tensor:
    """Windows of x [B,C,*space] as [B, C·∏kernel, ∏output], the first in the order of a convolution weight's entries.

    The windows are a strided view first (no copy), then one copy lays them out. Its last dimension is the last of the
    output, which is consecutive in memory in both (with stride 1): windows of one position each side by side take
    three times as long to copy.
    """
    batch, channels = x.shape[:2]
    strides = x.stride()
    steps = [s * n for s, n in zip(strides[2:], stride, strict=True)]
    taps = [s * n for s, n in zip(strides[2:], dilation, strict=True)]
    view = x.as_strided(
        (batch, channels, *kernel, *output), (*strides[:2], *taps, *steps), x.storage_offset()
    )
    return view.reshape(batch, channels * math.prod(kernel), math.prod(output))


def _rows_in_time(t: Tensor, size: int) -> Tensor:
    """[B,C,T] -> [B/size, C, size·T]."""
    return t.unflatten(0, (-1, size)).transpose(1, 2).flatten(2)


def _pad_end(t: Tensor, length: int) -> Tensor:
    return nn.functional.pad(t, (0, length - t.shape[2]))
