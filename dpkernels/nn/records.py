"""Records: how a layer tells the engine what one backward saw.

A record is one use of one norm rule. It holds the tensors from which the per-sample gradient of its
parameters *could* be formed, and answers two questions without forming it: ‖gradient of sample i‖² (rounded
up), and Σ_i c_i · gradient of sample i.

The layers put no lengths on a record: a padded frame has a zero output gradient, and adds nothing.

Where a sample has many frames and the parameter few entries, its gradient is smaller than what it is made of, and
`formed` makes it once instead of twice (for the norm and for the sum). Which records are formed is the tape's choice.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import ClassVar

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn.module import accumulation_dtype, no_autocast


@dataclass(frozen=True)
class Share:
    """A record's part of one `ops.total_norm_sq` or `ops.clip_and_noise`: a layer of this kind.

    Attributes:
        kind: of `ops.grouped.KINDS`.
        x, g: as those ops take them.
        options: of its kind, by the names of the ops' lists.
        norm_options: those that only the norm takes: the sum reads them off its out.
    """

    kind: str
    x: Tensor
    g: Tensor
    options: dict[str, object] = field(default_factory=dict)
    norm_options: dict[str, object] = field(default_factory=dict)


class Record(ABC):
    """One use of one rule in one backward over `batch_size` samples, for `parameters` of `layer`."""

    layer: str
    g: Tensor
    # names of the fields that hold parameters
    parameter_fields: ClassVar[tuple[str, ...]] = ("weight",)
    # whether forming is the default where it is smaller, for rules that pay twice for not doing so
    forms_by_default: ClassVar[bool] = False

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The trained parameters that this record speaks for."""
        return tuple(getattr(self, name) for name in self.parameter_fields)

    @property
    def batch_size(self) -> int:
        """B, as the output gradient's first dimension says."""
        return self.g.shape[0]

    @abstractmethod
    def norm_sq(self) -> Tensor:
        """Σ over the parameters of ‖gradient of sample i‖²: [B] float32, rounded up."""

    @abstractmethod
    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Add Σ_i factors[i] · gradient of sample i to sums[p], in place, for every parameter p.

        factors: [B] float32. sums[p]: float64 (or float32), contiguous, of p's shape.
        """

    def share(self) -> Share | None:
        """Its part of one call for many layers; None where it takes `norm_sq` and `add_weighted_sum`.

        Tensors of different dtypes are left to those: converted copies of all layers at once would be memory that was
        not there before.
        """
        return None

    def outs(self, sums: Mapping[nn.Parameter, Tensor]) -> tuple[Tensor, ...]:
        """The sums that a share adds to, in the shapes that the op takes."""
        return tuple(sums[parameter] for parameter in self.parameters)

    def held_bytes(self) -> int:
        """Bytes of the tensors that it keeps alive, over the whole batch."""
        tensors = (
            t for t in vars(self).values() if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)
        )
        return sum(t.numel() * t.element_size() for t in tensors)

    def entries(self) -> int | None:
        """Entries of one sample's gradients, or None where this rule does not form them."""
        return None

    def formed(self) -> tuple[ExpandedRecord, ...]:
        """The same gradients, [B, *parameter.shape] in float32 (float64 for float64), one record a parameter.

        Their norms and sums are those of the formed values, so that how they were rounded is no matter for privacy.
        """
        raise NotImplementedError(f"{type(self).__name__} does not form per-sample gradients")

    def merge(self, other: Record) -> Record:
        """One record for two uses of the same parameters (tied, reused): the exact sum, cross terms too.

        Raises TypeError naming both layers when the two rules cannot be combined.
        """
        if self.parameters == other.parameters and len(self.parameters) == 1:
            first, second = _as_formed(self), _as_formed(other)
            if first is not None and second is not None:
                return first.merge(second)
        raise TypeError(
            f"{self.layer} ({type(self).__name__}) and {other.layer} ({type(other).__name__}) use the same "
            "trained parameter in ways that cannot be combined; untie them or freeze the parameter"
        )


@dataclass(eq=False)
class LinearRecord(Record):
    """Weight [p, d] (or one that reshapes to it) of y = x Wᵀ: x [B,T,d], g [B,T,p]."""

    layer: str
    weight: nn.Parameter
    x: Tensor
    g: Tensor

    def norm_sq(self) -> Tensor:
        """‖g_iᵀ x_i‖²."""
        x, g = common_dtype(self.x, self.g)
        return ops.linear_norm_sq(x, g)

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Σ_i c_i g_iᵀ x_i."""
        x, g = common_dtype(self.x, self.g)
        ops.linear_weighted_sum(x, g, factors, sums[self.weight].view(g.shape[-1], x.shape[-1]))

    def share(self) -> Share | None:
        """A linear layer."""
        return Share("linear", self.x, self.g) if self.x.dtype == self.g.dtype else None

    def outs(self, sums: Mapping[nn.Parameter, Tensor]) -> tuple[Tensor, ...]:
        """The weight's sum as a matrix."""
        return (sums[self.weight].view(self.g.shape[-1], self.x.shape[-1]),)

    def entries(self) -> int:
        """P·d."""
        return self.weight.numel()

    def formed(self) -> tuple[ExpandedRecord, ...]:
        """g_iᵀ x_i."""
        return (formed_gradient(self.layer, self.weight, per_sample_product(self.g, self.x)),)

    def merge(self, other: Record) -> Record:
        """Concatenated along T; an embedding's ids become one-hot, a convolution's windows are unfolded."""
        if isinstance(other, EmbeddingRecord):
            other = other.as_linear(self.x.dtype)
        elif isinstance(other, Conv1dRecord) and other.groups == 1:
            other = other.as_linear()
        if not isinstance(other, LinearRecord) or other.weight is not self.weight:
            return super().merge(other)
        x, g = cat_time(self.x, other.x), cat_time(self.g, other.g)
        return LinearRecord(join_names(self, other), self.weight, x, g)


@dataclass(eq=False)
class EmbeddingRecord(Record):
    """Table [V, d] looked up at ids [B,T] (int64): g [B,T,d]. Row `padding_idx` gets no gradient."""

    layer: str
    weight: nn.Parameter
    ids: Tensor
    g: Tensor
    padding_idx: int | None = None

    def norm_sq(self) -> Tensor:
        """Σ over the ids of ‖Σ of g where that id stands‖²."""
        return ops.embedding_norm_sq(self.ids, self.g, padding_idx=self.padding_idx)

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Add c_i g_t to row id_t."""
        ops.embedding_weighted_sum(self.ids, self.g, factors, sums[self.weight], padding_idx=self.padding_idx)

    def share(self) -> Share | None:
        """An embedding."""
        padding = -1 if self.padding_idx is None else self.padding_idx
        return Share("embedding", self.ids, self.g, {"padding_idxs": padding})

    def as_linear(self, dtype: torch.dtype) -> LinearRecord:
        """The same gradient as a linear layer's: Σ_t onehot(id_t) g_tᵀ, with no row for `padding_idx`."""
        onehot = torch.zeros(*self.ids.shape, self.weight.shape[0], dtype=dtype, device=self.g.device)
        onehot.scatter_(-1, self.ids.unsqueeze(-1), 1)
        if self.padding_idx is not None:
            onehot[..., self.padding_idx] = 0
        return LinearRecord(self.layer, self.weight, x=self.g, g=onehot)

    def merge(self, other: Record) -> Record:
        """Concatenated along T; as linear records where the other is one, or pads differently."""
        if isinstance(other, LinearRecord):
            return self.as_linear(other.g.dtype).merge(other)
        if not isinstance(other, EmbeddingRecord) or other.weight is not self.weight:
            return super().merge(other)
        if other.padding_idx != self.padding_idx:
            return self.as_linear(self.g.dtype).merge(other.as_linear(self.g.dtype))
        ids, g = torch.cat((self.ids, other.ids), 1), cat_time(self.g, other.g)
        return EmbeddingRecord(join_names(self, other), self.weight, ids, g, self.padding_idx)


@dataclass(eq=False)
class LoRARecord(Record):
    """A [r, d] and B [p, r] of y += s·(x Aᵀ)Bᵀ: x [B,T,d], h = x Aᵀ [B,T,r], g [B,T,p], dh = s·g B."""

    layer: str
    a: nn.Parameter
    b: nn.Parameter
    x: Tensor
    h: Tensor
    g: Tensor
    dh: Tensor
    scaling: float = 1.0
    parameter_fields: ClassVar[tuple[str, ...]] = ("a", "b")

    def norm_sq(self) -> Tensor:
        """‖dh_iᵀ x_i‖² + s²‖g_iᵀ h_i‖²."""
        x, h, g, dh = common_dtype(self.x, self.h, self.g, self.dh)
        return sum_up(ops.lora_norm_sq(x, h, g, dh, scaling=self.scaling))

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Σ_i c_i dh_iᵀ x_i for A, Σ_i c_i s g_iᵀ h_i for B."""
        x, h, g, dh = common_dtype(self.x, self.h, self.g, self.dh)
        ops.lora_weighted_sum(x, h, g, dh, factors, sums[self.a], sums[self.b], scaling=self.scaling)

    def share(self) -> Share | None:
        """A LoRA layer."""
        if len({t.dtype for t in (self.x, self.h, self.g, self.dh)}) > 1:
            return None
        options: dict[str, object] = {"hs": self.h, "dhs": self.dh, "scalings": self.scaling}
        return Share("lora", self.x, self.g, options)

    def entries(self) -> int:
        """r·(d + p)."""
        return self.a.numel() + self.b.numel()

    def formed(self) -> tuple[ExpandedRecord, ...]:
        """dh_iᵀ x_i of A and s·g_iᵀ h_i of B."""
        x, h, g, dh = common_dtype(self.x, self.h, self.g, self.dh)
        of_a, of_b = ops.lora_gradients(x, h, g, dh, scaling=self.scaling)
        return ExpandedRecord(self.layer, self.a, of_a), ExpandedRecord(self.layer, self.b, of_b)

    def merge(self, other: Record) -> Record:
        """Concatenated along T."""
        if (
            not isinstance(other, LoRARecord)
            or (other.a is not self.a or other.b is not self.b)
            or other.scaling != self.scaling
        ):
            return super().merge(other)
        pairs = ((self.x, other.x), (self.h, other.h), (self.g, other.g), (self.dh, other.dh))
        x, h, g, dh = (cat_time(*pair) for pair in pairs)
        return LoRARecord(join_names(self, other), self.a, self.b, x, h, g, dh, self.scaling)


@dataclass(eq=False)
class ExpandedRecord(Record):
    """The per-sample gradients themselves, g [B, *parameter.shape], where these are the least memory."""

    layer: str
    parameter: nn.Parameter
    g: Tensor
    parameter_fields: ClassVar[tuple[str, ...]] = ("parameter",)

    def _flat(self) -> Tensor:
        return self.g.reshape(self.g.shape[0], 1, self.parameter.numel())

    def norm_sq(self) -> Tensor:
        """‖g_i‖²."""
        return ops.bias_norm_sq(self._flat())

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Σ_i c_i g_i."""
        ops.bias_weighted_sum(self._flat(), factors, sums[self.parameter].view(-1))

    def share(self) -> Share | None:
        """A bias of one frame."""
        flat = self._flat()
        return Share("bias", flat, flat)

    def outs(self, sums: Mapping[nn.Parameter, Tensor]) -> tuple[Tensor, ...]:
        """The sum as a vector."""
        return (sums[self.parameter].view(-1),)

    def merge(self, other: Record) -> Record:
        """Added, sample by sample."""
        if not isinstance(other, ExpandedRecord) or other.parameter is not self.parameter:
            return super().merge(other)
        first, second = common_dtype(self.g, other.g)
        return type(self)(join_names(self, other), self.parameter, first + second)


class BiasRecord(ExpandedRecord):
    """A bias [p]: g [B,p] = Σ_t of the output gradient.

    The sum over time is taken when the record is made: it is T times smaller than the output gradient, which
    then need not be kept for the bias's sake (all that BitFit trains), and is read once rather than twice.
    """


class NormRecord(ExpandedRecord):
    """The weight [d] of a LayerNorm, RMSNorm or frozen BatchNorm: g [B,d] = Σ_t x̂_t ⊙ g_t, summed at once."""


@dataclass(eq=False)
class DepthwiseConv1dRecord(Record):
    """Weight [C,1,k] of a depthwise convolution: x [B,C,T], g [B,C,T']."""

    layer: str
    weight: nn.Parameter
    x: Tensor
    g: Tensor
    stride: int = 1
    padding: int = 0
    dilation: int = 1

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

    def share(self) -> Share | None:
        """A depthwise convolution."""
        if self.x.dtype != self.g.dtype:
            return None
        options: dict[str, object] = {
            "strides": self.stride,
            "paddings": self.padding,
            "dilations": self.dilation,
        }
        size: dict[str, object] = {"kernel_sizes": self.weight.shape[-1]}
        return Share("depthwise_conv1d", self.x, self.g, options, size)

    def merge(self, other: Record) -> Record:
        """One after the other, with a gap in which g is 0: no window of one reads the other."""
        if (
            not isinstance(other, DepthwiseConv1dRecord)
            or other.weight is not self.weight
            or (other.stride, other.dilation) != (self.stride, self.dilation)
        ):
            return super().merge(other)
        first, second = self._padded(), other._padded()
        starts_at = -(-first.x.shape[2] // self.stride)  # the first window of the second
        x = torch.cat(common_dtype(_pad_end(first.x, starts_at * self.stride), second.x), 2)
        g = torch.cat(common_dtype(_pad_end(first.g, starts_at), second.g), 2)
        return DepthwiseConv1dRecord(
            join_names(self, other), self.weight, x, g, self.stride, 0, self.dilation
        )

    def _padded(self) -> DepthwiseConv1dRecord:
        return replace(self, x=nn.functional.pad(self.x, (self.padding, self.padding)), padding=0)


@dataclass(eq=False)
class Conv1dRecord(Record):
    """Weight [p, d/groups, k] of a general convolution: x [B,d,T], g [B,p,T'].

    It is a linear layer on unfolded windows. They are k times larger than x, so they are made when asked for
    and not kept: once where the gradients are formed, twice where norm and sum each ask.
    """

    forms_by_default: ClassVar[bool] = True

    layer: str
    weight: nn.Parameter
    x: Tensor
    g: Tensor
    stride: tuple[int, ...] = (1,)
    padding: tuple[int, ...] = (0,)
    dilation: tuple[int, ...] = (1,)
    groups: int = 1

    def _group(self, index: int) -> tuple[Tensor, Tensor]:
        """(x [B,T',k·d/groups], g [B,T',p/groups]) of one group, in one dtype."""
        x, g = self.x.chunk(self.groups, 1)[index], self.g.chunk(self.groups, 1)[index]
        x = nn.functional.pad(x, [n for size in reversed(self.padding) for n in (size, size)])
        windows = unfold(x, self.weight.shape[2:], self.stride, self.dilation, g.shape[2:])
        windows, g = common_dtype(windows, g.flatten(2).transpose(1, 2))
        return windows, g

    def norm_sq(self) -> Tensor:
        """Σ over groups of ‖gᵀ windows‖²."""
        return sum_up([ops.linear_norm_sq(*self._group(i)) for i in range(self.groups)])

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Σ_i c_i gᵀ windows, group by group."""
        rows = sums[self.weight].view(self.groups, self.weight.shape[0] // self.groups, -1)
        for i in range(self.groups):
            x, g = self._group(i)
            ops.linear_weighted_sum(x, g, factors, rows[i])

    def entries(self) -> int:
        """p·d/groups·k."""
        return self.weight.numel()

    def formed(self) -> tuple[ExpandedRecord, ...]:
        """gᵀ windows, the groups one after the other."""
        groups = [per_sample_product(g, x) for x, g in (self._group(i) for i in range(self.groups))]
        return (formed_gradient(self.layer, self.weight, torch.cat(groups, 1)),)

    def as_linear(self) -> LinearRecord:
        """The unfolded record; for groups == 1."""
        return LinearRecord(self.layer, self.weight, *self._group(0))

    def merge(self, other: Record) -> Record:
        """As linear records, unfolded; grouped ones formed."""
        if self.groups == 1 and isinstance(other, LinearRecord | Conv1dRecord):
            return self.as_linear().merge(other)
        return super().merge(other)


class Conv2dRecord(Conv1dRecord):
    """Weight [p, d/groups, kh, kw]: x [B,d,H,W], g [B,p,H',W']; else as Conv1dRecord."""


def unfold(
    x: Tensor, kernel: torch.Size, stride: tuple[int, ...], dilation: tuple[int, ...], output: torch.Size
) -> Tensor:
    """Windows of x [B,C,*space] as [B, ∏output, C·∏kernel], in the order of a convolution weight's entries.

    A strided view is taken first (no copy), then one copy lays the windows out.
    """
    batch, channels = x.shape[:2]
    strides = x.stride()
    sizes = (batch, channels, *output, *kernel)
    steps = [s * n for s, n in zip(strides[2:], stride, strict=True)]
    taps = [s * n for s, n in zip(strides[2:], dilation, strict=True)]
    view = x.as_strided(sizes, (*strides[:2], *steps, *taps), x.storage_offset())
    n = len(output)
    order = (0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))
    return view.permute(order).reshape(batch, math.prod(output), channels * math.prod(kernel))


def _as_formed(record: Record) -> ExpandedRecord | None:
    """The record of one parameter's per-sample gradients, or None where its rule does not form them."""
    if isinstance(record, ExpandedRecord):
        return record
    return None if record.entries() is None else record.formed()[0]


def per_sample_product(g: Tensor, x: Tensor) -> Tensor:
    """g_iᵀ x_i of g [B,T,p] and x [B,T,d]: [B,p,d], accumulated in float32 (float64 for float64)."""
    x, g = common_dtype(x, g)
    dtype = accumulation_dtype(x)
    with no_autocast(x.device.type):
        return torch.bmm(g.transpose(1, 2).to(dtype), x.to(dtype))


def formed_gradient(layer: str, parameter: nn.Parameter, gradients: Tensor) -> ExpandedRecord:
    """A record of per-sample gradients [B, ...] of a parameter's number of entries."""
    return ExpandedRecord(layer, parameter, gradients.view(len(gradients), *parameter.shape))


def common_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the narrowest dtype that holds all of them exactly (the ops want one dtype a call)."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def sum_up(parts: Sequence[Tensor]) -> Tensor:
    """Σ of [B] float32 upper bounds, itself an upper bound: in float64, then rounded up to float32."""
    total = torch.stack([part.double() for part in parts]).sum(0) * (1 + len(parts) * 2.0**-52)
    rounded = total.float()
    above = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    return torch.where(rounded.double() < total, above, rounded)


def cat_time(first: Tensor, second: Tensor) -> Tensor:
    """[B,T1,n] and [B,T2,n] -> [B,T1+T2,n] in their common dtype."""
    return torch.cat(common_dtype(first, second), 1)


def join_names(first: Record, second: Record) -> str:
    """The name of a merged record."""
    return first.layer if first.layer == second.layer else f"{first.layer} + {second.layer}"


def _pad_end(t: Tensor, length: int) -> Tensor:
    return nn.functional.pad(t, (0, length - t.shape[2]))
