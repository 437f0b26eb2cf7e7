"""The record of a low-rank update: a pair of tensors for the gradient of each factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn.recording.choice import LayerSizes
from dpkernels.nn.recording.records import ExpandedRecord, Record, join_names, unit_frames
from dpkernels.nn.tensors import cat_time, common_dtype, sum_up
from dpkernels.ops import GroupedLayer


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

    def share(self) -> GroupedLayer | None:
        """A LoRA layer."""
        if len({t.dtype for t in (self.x, self.h, self.g, self.dh)}) > 1:
            return None
        return GroupedLayer("lora", (self.x, self.h, self.g, self.dh), {"scaling": self.scaling})

    def entries(self) -> int:
        """r·(d + p), the size of A and B."""
        return self.a.numel() + self.b.numel()

    def chosen_by(self) -> tuple[tuple[LayerSizes, Tensor, Tensor | None], ...]:
        """p, d and r, and the frames of the output gradient."""
        x, h, g, dh = self.x, self.h, self.g, self.dh
        outputs, inputs, rank = g.shape[2], x.shape[2], h.shape[2]
        gradient_bytes = outputs * g.element_size()
        held = gradient_bytes + inputs * x.element_size() + rank * (h.element_size() + dh.element_size())
        return ((LayerSizes(outputs, inputs, rank * (inputs + outputs), held, gradient_bytes, rank), g, x),)

    def materialised(self) -> tuple[ExpandedRecord, ...]:
        """dh_iᵀ x_i for A and s·g_iᵀ h_i for B."""
        x, h, g, dh = common_dtype(self.x, self.h, self.g, self.dh)
        of_a, of_b = ops.lora_gradients(x, h, g, dh, scaling=self.scaling)
        return ExpandedRecord(self.layer, self.a, of_a), ExpandedRecord(self.layer, self.b, of_b)

    def of_units(self, size: int) -> LoRARecord:
        """The unit's frames are those of its rows, one after the other."""
        x, h, g, dh = (unit_frames(t, size) for t in (self.x, self.h, self.g, self.dh))
        return replace(self, x=x, h=h, g=g, dh=dh)

    def merge(self, *others: Record) -> Record:
        """Concatenates the uses along T."""
        uses = [self]
        for other in others:
            if (
                not isinstance(other, LoRARecord)
                or (other.a is not self.a or other.b is not self.b)
                or other.scaling != self.scaling
            ):
                return super().merge(other)
            uses.append(other)
        tensors = zip(*((use.x, use.h, use.g, use.dh) for use in uses), strict=True)
        x, h, g, dh = (cat_time(*parts) for parts in tensors)
        return LoRARecord(join_names(*uses), self.a, self.b, x, h, g, dh, self.scaling)
