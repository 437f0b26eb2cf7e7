"""Records: how a layer tells the engine what one backward saw.

A record is one use of one norm rule. It holds the tensors from which the per-sample gradient of its
parameters *could* be materialised, and answers two questions without materialising it: ‖gradient of sample i‖² (rounded
up), and Σ_i c_i · gradient of sample i.

The layers put no lengths on a record: a padded frame has a zero output gradient, and adds nothing.

Where a sample has many frames and the parameter few entries, its gradient is smaller than what it is made of, and
`materialised` makes it once instead of twice (for the norm and for the sum). Which records are materialised is the
tape's choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.deprecation import warn_renamed
from dpkernels.nn.tensors import (
    accumulation_dtype,
    cat_time,
    common_dtype,
    per_sample_product,
)


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


# Names that a rule of one's own may still define.
_OLD_NAMES = {"formed": "materialised", "forms_by_default": "materialises_by_default"}


class Record(ABC):
    """One use of one rule in one backward over `batch_size` samples, for `parameters` of `layer`."""

    layer: str
    g: Tensor
    # names of the fields that hold parameters
    parameter_fields: ClassVar[tuple[str, ...]] = ("weight",)
    # whether materialising is the default where it is smaller, for rules that pay twice for not doing so
    materialises_by_default: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for old, new in _OLD_NAMES.items():
            if old in vars(cls):
                warn_renamed(f"{cls.__name__}.{old}", new)
                setattr(cls, new, vars(cls)[old])

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The trained parameters that this record speaks for."""
        return tuple(getattr(self, name) for name in self.parameter_fields)

    @property
    def batch_size(self) -> int:
        """B, as the output gradient's first dimension says."""
        return self.g.shape[0]

    @property
    def output_gradient(self) -> Tensor:
        """[B,*], linear in the losses' gradients, example by example: g, unless a layer's rule exchanges it with x."""
        return self.g

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

    def materialised(self) -> tuple[ExpandedRecord, ...]:
        """The same gradients, `[B, *parameter.shape]` in float32 (float64 for float64), one record a parameter.

        Their norms and sums are those of the materialised values, so that how they were rounded is no matter for
        privacy.
        """
        raise NotImplementedError(f"{type(self).__name__} does not form per-sample gradients")

    def as_linear(self, dtype: torch.dtype) -> LinearRecord | None:
        """The same gradient as a linear layer's, for `merge`; None where it is none.

        dtype: of what has to be made up for it (an embedding's one-hot ids).
        """
        return None

    def absorb(self, other: Record) -> bool:
        """Take in another use of the same parameters as it comes, where no more is held for it.

        False, and nothing changed, where more would be: that use is then kept for `merge`.
        """
        return False

    def merge(self, *others: Record) -> Record:
        """One record for several uses of the same parameters (tied, reused): the exact sum, cross terms too.

        Uses of one rule are stacked once: a layer that is called n times costs n calls' tensors, one norm and one sum.

        Raises TypeError naming two of the layers when their rules cannot be combined.
        """
        materialised = _as_materialised(self)
        if materialised is None or materialised is self:
            raise _not_combined(self, others[0])
        return materialised.merge(*others)


@dataclass(eq=False)
class LinearRecord(Record):
    """Weight [p, d] (or one that reshapes to it) of y = x Wᵀ: x [B,T,d], g [B,T,p].

    `exchanged`: of y = x W, whose output gradient stands in x, and input in g.
    """

    layer: str
    weight: nn.Parameter
    x: Tensor
    g: Tensor
    exchanged: bool = False

    @property
    def output_gradient(self) -> Tensor:
        """Of the layer."""
        return self.x if self.exchanged else self.g

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
        """The weight's, p·d."""
        return self.weight.numel()

    def materialised(self) -> tuple[ExpandedRecord, ...]:
        """g_iᵀ x_i."""
        return (materialised_gradient(self.layer, self.weight, per_sample_product(self.g, self.x)),)

    def merge(self, *others: Record) -> Record:
        """Concatenated along T, the others as linear layers'."""
        linear = [use for o in others if (use := o.as_linear(self.x.dtype)) and use.weight is self.weight]
        if len(linear) < len(others):
            return super().merge(*others)
        uses = (self, *linear)
        x, g = cat_time(*(use.x for use in uses)), cat_time(*(use.g for use in uses))
        return LinearRecord(join_names(*uses), self.weight, x, g)

    def as_linear(self, dtype: torch.dtype) -> LinearRecord:
        """Itself."""
        return self


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
        """Σ_t onehot(id_t) g_tᵀ, with no row for `padding_idx`."""
        onehot = torch.zeros(*self.ids.shape, self.weight.shape[0], dtype=dtype, device=self.g.device)
        onehot.scatter_(-1, self.ids.unsqueeze(-1), 1)
        if self.padding_idx is not None:
            onehot[..., self.padding_idx] = 0
        return LinearRecord(self.layer, self.weight, x=self.g, g=onehot)

    def merge(self, *others: Record) -> Record:
        """Concatenated along T; as linear records where one of the others is one, or pads differently."""
        known = [
            o for o in others if isinstance(o, EmbeddingRecord | LinearRecord) and o.weight is self.weight
        ]
        if len(known) < len(others):
            return super().merge(*others)
        lookups = [o for o in known if isinstance(o, EmbeddingRecord) and o.padding_idx == self.padding_idx]
        if len(lookups) < len(others):
            return self.as_linear(self.g.dtype).merge(*others)
        uses = (self, *lookups)
        ids, g = torch.cat([use.ids for use in uses], 1), cat_time(*(use.g for use in uses))
        return EmbeddingRecord(join_names(*uses), self.weight, ids, g, self.padding_idx)


@dataclass(eq=False)
class ExpandedRecord(Record):
    """The per-sample gradients themselves, g `[B, *parameter.shape]`, where these are the least memory."""

    layer: str
    parameter: nn.Parameter
    g: Tensor
    parameter_fields: ClassVar[tuple[str, ...]] = ("parameter",)
    # whether g is a sum that this record made, and may add to in place
    _own: bool = field(default=False, init=False, repr=False)

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

    def absorb(self, other: Record) -> bool:
        """Added, sample by sample, in float32 (float64 for float64): in place from the second on."""
        if not isinstance(other, ExpandedRecord) or other.parameter is not self.parameter:
            return False
        dtype = torch.promote_types(accumulation_dtype(self.g), other.g.dtype)
        if self._own and self.g.dtype is dtype:
            self.g += other.g
        else:
            self.g, self._own = self.g.to(dtype) + other.g, True
        self.layer = join_names(self, other)
        return True

    def merge(self, *others: Record) -> Record:
        """Added, sample by sample, each of the others materialised when its turn comes."""
        total = type(self)(self.layer, self.parameter, self.g)
        for other in others:
            materialised = _as_materialised(other)
            if materialised is None or not total.absorb(materialised):
                raise _not_combined(self, other)
        return total


class BiasRecord(ExpandedRecord):
    """A bias [p]: g [B,p] = Σ_t of the output gradient.

    The sum over time is taken when the record is made: it is T times smaller than the output gradient, which
    then need not be kept for the bias's sake (all that BitFit trains), and is read once rather than twice.
    """


class NormRecord(ExpandedRecord):
    """The weight [d] of a LayerNorm, RMSNorm or frozen BatchNorm: g [B,d] = Σ_t x̂_t ⊙ g_t, summed at once."""


def _as_materialised(record: Record) -> ExpandedRecord | None:
    """The record of one parameter's per-sample gradients, or None where its rule does not form them."""
    if isinstance(record, ExpandedRecord):
        return record
    return None if record.entries() is None or len(record.parameters) > 1 else record.materialised()[0]


def _not_combined(first: Record, second: Record) -> TypeError:
    return TypeError(
        f"{first.layer!r} ({type(first).__name__}) and {second.layer!r} ({type(second).__name__}) use the same "
        "trained parameter in ways that cannot be combined; untie them or freeze the parameter"
    )


def materialised_gradient(layer: str, parameter: nn.Parameter, gradients: Tensor) -> ExpandedRecord:
    """A record of per-sample gradients [B, ...] of a parameter's number of entries."""
    return ExpandedRecord(layer, parameter, gradients.view(len(gradients), *parameter.shape))


def join_names(*records: Record) -> str:
    """The name of a merged record: each layer's, once."""
    return " + ".join(dict.fromkeys(name for record in records for name in record.layer.split(" + ")))
