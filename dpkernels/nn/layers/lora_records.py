"""The record of a low-rank update: the gradients of both factors from one pair of tensors each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn.recording.records import ExpandedRecord, Record, Share, join_names
from dpkernels.nn.tensors import cat_time, common_dtype, sum_up


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

    def materialised(self) -> tuple[ExpandedRecord, ...]:
        """dh_iᵀ x_i of A and s·g_iᵀ h_i of B."""
        x, h, g, dh = common_dtype(self.x, self.h, self.g, self.dh)
        of_a, of_b = ops.lora_gradients(x, h, g, dh, scaling=self.scaling)
        return ExpandedRecord(self.layer, self.a, of_a), ExpandedRecord(self.layer, self.b, of_b)

    def merge(self, *others: Record) -> Record:
        """Concatenated along T."""
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
        x, h, g, dh = (cat_time(*each) for each in tensors)
        return LoRARecord(join_names(*uses), self.a, self.b, x, h, g, dh, self.scaling)
