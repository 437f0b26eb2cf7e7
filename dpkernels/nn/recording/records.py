"""Records: the tensors that one use of a layer leaves behind for its per-sample gradients.

A record belongs to one use of one norm rule. It holds the tensors from which the per-sample gradient of its
parameters *could* be materialised, and computes two results without materialising it: ‖gradient of sample i‖² (rounded
up), and Σ_i c_i · gradient of sample i.

A record holds no lengths: the output gradient of a padded frame is zero, so the frame adds nothing.

Where a sample has many frames and the parameter has few entries, the gradient is smaller than the tensors it is
computed from. `materialised` then computes it once instead of twice (for the norm and for the sum). The tape decides
which records are materialised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.deprecation import warn_renamed
from dpkernels.nn.recording.choice import LayerSizes
from dpkernels.nn.tensors import accumulation_dtype, cat_time, common_dtype, per_sample_product
from dpkernels.ops import GroupedLayer

# Old names that a user's rule may still define.
_OLD_NAMES = {"formed": "materialised", "forms_by_default": "materialises_by_default"}


class Record(ABC):
    """One use of one rule in one backward over `batch_size` samples, for `parameters` of `layer`."""

    layer: str
    g: Tensor
    # names of the fields that hold parameters
    parameter_fields: ClassVar[tuple[str, ...]] = ("weight",)
    # whether to materialise by default where that is smaller: for rules that otherwise repeat work in norm and sum
    materialises_by_default: ClassVar[bool] = False
    # whether layers that read one tensor may have one norm (`sharing_inputs`); the tape clears it where an example may
    # be materialised, since the others' form would then depend on whether one is
    may_share_input = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for old, new in _OLD_NAMES.items():
            if old in vars(cls):
                warn_renamed(f"{cls.__name__}.{old}", new)
                setattr(cls, new, vars(cls)[old])

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The trained parameters whose gradients this record covers."""
        return tuple(getattr(self, name) for name in self.parameter_fields)

    @property
    def batch_size(self) -> int:
        """B, the first dimension of the output gradient."""
        return self.g.shape[0]

    @property
    def output_gradient(self) -> Tensor:
        """[B,*], linear in the losses' gradients, row i for example i: g, unless the layer's rule exchanges x and g."""
        return self.g

    @abstractmethod
    def norm_sq(self) -> Tensor:
        """Σ over the parameters of ‖gradient of sample i‖²: [B] float32, rounded up."""

    @abstractmethod
    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Add Σ_i factors[i] · gradient of sample i to sums[p], in place, for every parameter p.

        factors: [B] float32. sums[p]: float64 (or float32), contiguous, of p's shape.
        """

    def share(self) -> GroupedLayer | None:
        """Its part of one call for many layers, without outs; None where it takes `norm_sq` and `add_weighted_sum`.

        Tensors of different dtypes are left to those: converted copies of all layers at once would be memory that was
        not there before.
        """
        return None

    def outs(self, sums: Mapping[nn.Parameter, Tensor]) -> tuple[Tensor, ...]:
        """The sums that its grouped layer adds to, in the shapes that the op takes."""
        return tuple(sums[parameter] for parameter in self.parameters)

    def held_bytes(self) -> int:
        """Bytes of the tensors that the record keeps alive, for all samples together."""
        tensors = (
            t for t in vars(self).values() if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)
        )
        return sum(t.numel() * t.element_size() for t in tensors)

    def worth_materialising_bytes(self) -> int:
        """The most that materialised gradients may take, for all samples, where the rule materialises by default.

        Half of what the record holds: norm and sum read them once each.
        """
        return self.held_bytes() // 2

    def entries(self) -> int | None:
        """Entries of one sample's gradients, or None if this rule does not materialise them."""
        return None

    def materialised(self) -> tuple[ExpandedRecord, ...]:
        """The same gradients, `[B, *parameter.shape]` in float32 (float64 for float64), one record per parameter.

        Norms and sums are both computed from the materialised values, so their rounding does not affect privacy.
        """
        raise NotImplementedError(f"{type(self).__name__} does not materialise per-sample gradients")

    def chosen_by(self) -> tuple[tuple[LayerSizes, Tensor, Tensor | None], ...]:
        """What decides whether an example's gradient is materialised: sizes, and of frames the output gradients
        `[B,*,p]` and, of a linear layer, the inputs `[B,*,d]`.

        An example must have enough frames in all of them. () if the rule has no such form: `held_bytes` and
        `worth_materialising_bytes` then decide for the whole batch.
        """
        return ()

    def of_rows(self, rows: Tensor | slice) -> Self:
        """The record of some of the examples, with copies of their tensors (rows: [n] int64), or views (a slice)."""
        part = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                setattr(part, name, value[rows])
        return part

    def as_linear(self, dtype: torch.dtype) -> LinearRecord | None:
        """The same gradient as the record of a linear layer, for `merge`; None if the rule has no such form.

        dtype: of the tensors that have to be created for it (an embedding's one-hot ids).
        """
        return None

    def absorb(self, other: Record) -> bool:
        """Add another use of the same parameters to this record, if that takes no additional memory.

        Returns False and changes nothing otherwise: `merge` then gets the other use.
        """
        return False

    def of_units(self, size: int) -> Record:
        """The same record over units: `size` consecutive rows are one unit, whose gradient is the sum of theirs.

        Its `norm_sq` is [B/size], of those sums, and its `add_weighted_sum` takes as many factors. Shares tensors with
        this record wherever a view of them is enough.

        Raises TypeError naming the layer if the rule has no such form.
        """
        raise TypeError(
            f"{self.layer!r} ({type(self).__name__}) has no gradients of several examples together: freeze its "
            "parameters, or use clipping_unit='example', whose noise is max_examples_per_speaker times larger"
        )

    def merge(self, *others: Record) -> Record:
        """One record for several uses of the same parameters (tied or reused): the exact sum, with its cross terms.

        Uses of one rule are stacked once: a layer that is called n times costs n calls' tensors, one norm and one sum.

        Raises TypeError naming two of the layers if their rules cannot be combined.
        """
        materialised = _as_materialised(self)
        if materialised is None or materialised is self:
            raise _not_combined(self, others[0])
        return materialised.merge(*others)


@dataclass(eq=False)
class LinearRecord(Record):
    """Weight [p, d] (or one that reshapes to it) of y = x Wᵀ: x [B,T,d], g [B,T,p].

    `exchanged`: the layer is y = x W, its output gradient is in `x` and its input in `g`.
    """

    layer: str
    weight: nn.Parameter
    x: Tensor
    g: Tensor
    exchanged: bool = False

    @property
    def output_gradient(self) -> Tensor:
        """The layer's output gradient."""
        return self.x if self.exchanged else self.g

    def norm_sq(self) -> Tensor:
        """‖g_iᵀ x_i‖²."""
        x, g = common_dtype(self.x, self.g)
        return ops.linear_norm_sq(x, g)

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Σ_i c_i g_iᵀ x_i."""
        x, g = common_dtype(self.x, self.g)
        ops.linear_weighted_sum(x, g, factors, sums[self.weight].view(g.shape[-1], x.shape[-1]))

    def share(self) -> GroupedLayer | None:
        """A linear layer."""
        return GroupedLayer("linear", (self.x, self.g)) if self.x.dtype == self.g.dtype else None

    def outs(self, sums: Mapping[nn.Parameter, Tensor]) -> tuple[Tensor, ...]:
        """The weight's sum as a matrix."""
        return (sums[self.weight].view(self.g.shape[-1], self.x.shape[-1]),)

    def of_units(self, size: int) -> LinearRecord:
        """The unit's frames are those of its rows, one after the other."""
        return replace(self, x=unit_frames(self.x, size), g=unit_frames(self.g, size))

    def entries(self) -> int:
        """p·d, the size of the weight."""
        return self.weight.numel()

    def chosen_by(self) -> tuple[tuple[LayerSizes, Tensor, Tensor | None], ...]:
        """p, d, and the frames of both factors."""
        return (linear_sizes(self.x, self.g, self.output_gradient),)

    def materialised(self) -> tuple[ExpandedRecord, ...]:
        """g_iᵀ x_i."""
        return (materialised_gradient(self.layer, self.weight, per_sample_product(self.g, self.x)),)

    def merge(self, *others: Record) -> Record:
        """Concatenates the uses along T, the others as records of linear layers."""
        linear = [use for o in others if (use := o.as_linear(self.x.dtype)) and use.weight is self.weight]
        if len(linear) < len(others):
            return super().merge(*others)
        uses = (self, *linear)
        x, g = cat_time(*(use.x for use in uses)), cat_time(*(use.g for use in uses))
        return LinearRecord(join_names(*uses), self.weight, x, g)

    def as_linear(self, dtype: torch.dtype) -> LinearRecord:
        """The record itself."""
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
        """Σ over the ids v of ‖Σ_{t: id_t = v} g_t‖²."""
        return ops.embedding_norm_sq(self.ids, self.g, padding_idx=self.padding_idx)

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Add c_i g_t to row id_t."""
        ops.embedding_weighted_sum(self.ids, self.g, factors, sums[self.weight], padding_idx=self.padding_idx)

    def share(self) -> GroupedLayer | None:
        """An embedding."""
        padding = -1 if self.padding_idx is None else self.padding_idx
        return GroupedLayer("embedding", (self.ids, self.g), {"padding_idx": padding})

    def of_units(self, size: int) -> EmbeddingRecord:
        """The unit's tokens are those of its rows, one after the other."""
        return replace(self, ids=unit_frames(self.ids, size), g=unit_frames(self.g, size))

    def as_linear(self, dtype: torch.dtype) -> LinearRecord:
        """Σ_t onehot(id_t) g_tᵀ, with no row for `padding_idx`."""
        onehot = torch.zeros(*self.ids.shape, self.weight.shape[0], dtype=dtype, device=self.g.device)
        onehot.scatter_(-1, self.ids.unsqueeze(-1), 1)
        if self.padding_idx is not None:
            onehot[..., self.padding_idx] = 0
        return LinearRecord(self.layer, self.weight, x=self.g, g=onehot)

    def merge(self, *others: Record) -> Record:
        """Concatenates the uses along T; as linear records if another is one or has another `padding_idx`."""
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
    """The per-sample gradients themselves, g `[B, *parameter.shape]`, where these take the least memory.

    `unit`: so many consecutive rows of g are one unit, whose gradient is their sum (see `Record.of_units`).
    """

    layer: str
    parameter: nn.Parameter
    g: Tensor
    unit: int = 1
    parameter_fields: ClassVar[tuple[str, ...]] = ("parameter",)
    # whether this record created g, as a sum, and may add to it in place
    _owns_g: bool = field(default=False, init=False, repr=False)

    def _flat(self) -> Tensor:
        """[B, unit, *]: like the frames of a bias, rows are summed by the ops."""
        return self.g.reshape(self.batch_size, self.unit, self.parameter.numel())

    @property
    def batch_size(self) -> int:
        """B, in units."""
        return self.g.shape[0] // self.unit

    def of_units(self, size: int) -> ExpandedRecord:
        """The same gradients, to be summed by unit."""
        return replace(self, unit=size)

    def norm_sq(self) -> Tensor:
        """‖g_i‖²."""
        return ops.bias_norm_sq(self._flat())

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Σ_i c_i g_i."""
        ops.bias_weighted_sum(self._flat(), factors, sums[self.parameter].view(-1))

    def share(self) -> GroupedLayer | None:
        """A bias whose frames are a unit's rows."""
        return GroupedLayer("bias", (self._flat(),))

    def outs(self, sums: Mapping[nn.Parameter, Tensor]) -> tuple[Tensor, ...]:
        """The sum as a vector."""
        return (sums[self.parameter].view(-1),)

    def absorb(self, other: Record) -> bool:
        """Adds g sample by sample, in float32 (float64 for float64), in place from the second addition on."""
        if not isinstance(other, ExpandedRecord) or other.parameter is not self.parameter:
            return False
        dtype = torch.promote_types(accumulation_dtype(self.g), other.g.dtype)
        if self._owns_g and self.g.dtype is dtype:
            self.g += other.g
        else:
            self.g, self._owns_g = self.g.to(dtype) + other.g, True
        self.layer = join_names(self, other)
        return True

    def merge(self, *others: Record) -> Record:
        """Adds the uses sample by sample, and materialises each of the others just before it is added."""
        total = type(self)(self.layer, self.parameter, self.g)
        for other in others:
            materialised = _as_materialised(other)
            if materialised is None or not total.absorb(materialised):
                raise _not_combined(self, other)
        return total


class BiasRecord(ExpandedRecord):
    """A bias [p]: g [B,p] = Σ_t of the output gradient.

    The backward sums over time, which makes g T times smaller than the output gradient. The output gradient is then
    read once rather than twice, and need not be kept for the bias (the only trained parameters of BitFit).
    """


class NormRecord(ExpandedRecord):
    """The weight [d] of a LayerNorm, RMSNorm or frozen BatchNorm: g [B,d] = Σ_t x̂_t ⊙ g_t, summed in the backward."""


def _as_materialised(record: Record) -> ExpandedRecord | None:
    """The record of one parameter's per-sample gradients, or None if its rule does not materialise them."""
    if isinstance(record, ExpandedRecord):
        return record
    return None if record.entries() is None or len(record.parameters) > 1 else record.materialised()[0]


def _not_combined(first: Record, second: Record) -> TypeError:
    return TypeError(
        f"{first.layer!r} ({type(first).__name__}) and {second.layer!r} ({type(second).__name__}) use the same "
        "trained parameter in ways that cannot be combined; untie them, or freeze it (requires_grad_(False))"
    )


def linear_sizes(x: Tensor, g: Tensor, output_gradient: Tensor) -> tuple[LayerSizes, Tensor, Tensor]:
    """An entry of `Record.chosen_by` for a linear layer: x [B,T,d], g [B,T,p], and which of them is the gradient."""
    x_bytes, g_bytes, gradient_bytes = (t.shape[2] * t.element_size() for t in (x, g, output_gradient))
    outputs, inputs = g.shape[2], x.shape[2]
    sizes = LayerSizes(outputs, inputs, outputs * inputs, x_bytes + g_bytes, gradient_bytes)
    return sizes, output_gradient, g if output_gradient is x else x


def unit_frames(t: Tensor, size: int) -> Tensor:
    """[B,T,*] -> [B/size, size·T, *], a view if the rows follow on one another in memory."""
    return t.reshape(t.shape[0] // size, size * t.shape[1], *t.shape[2:])


def materialised_gradient(layer: str, parameter: nn.Parameter, gradients: Tensor) -> ExpandedRecord:
    """The record of per-sample gradients [B, ...], reshaped to the parameter's shape."""
    return ExpandedRecord(layer, parameter, gradients.view(len(gradients), *parameter.shape))


def join_names(*records: Record) -> str:
    """The name of a merged record: each layer's name once."""
    return " + ".join(dict.fromkeys(name for record in records for name in record.layer.split(" + ")))
