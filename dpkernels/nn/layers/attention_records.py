"""The record of a weight that several linear layers share row by row: attention's packed q, k and v projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn.recording.choice import LayerSizes
from dpkernels.nn.recording.records import (
    ExpandedRecord,
    LinearRecord,
    Record,
    join_names,
    linear_sizes,
    materialised_gradient,
    unit_frames,
)
from dpkernels.nn.tensors import accumulation_dtype, cat_time, common_dtype, per_sample_product, sum_up


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Rows [first, first + n) of a weight [p, d], used as y = x Wᵀ with those rows: x [B,T,d], g [B,T,n]."""

    first: int
    x: Tensor
    g: Tensor

    @property
    def rows(self) -> slice:
        """The rows of the weight."""
        return slice(self.first, self.first + self.g.shape[2])


@dataclass(eq=False)
class PackedLinearRecord(Record):
    """Weight [p, d] with blocks of rows that are linear layers with different inputs.

    The blocks are disjoint, so the squared norm is the sum of theirs. Rows outside of all blocks have no gradient. T
    may differ between blocks: in cross-attention q reads the target, k and v read the source.
    """

    layer: str
    weight: nn.Parameter
    blocks: tuple[RowBlock, ...]

    @property
    def batch_size(self) -> int:
        """B, the first dimension of the blocks' output gradients."""
        (size,) = {block.g.shape[0] for block in self.blocks}
        return size

    @property
    def output_gradient(self) -> Tensor:
        """[B, Σ T·n]: the blocks' output gradients side by side."""
        return torch.cat([block.g.flatten(1) for block in self.blocks], 1)

    @property
    def rows(self) -> list[slice]:
        """The blocks' rows of the weight."""
        return [block.rows for block in self.blocks]

    def norm_sq(self) -> Tensor:
        """Σ over blocks of ‖g_iᵀ x_i‖²."""
        return sum_up([ops.linear_norm_sq(*common_dtype(block.x, block.g)) for block in self.blocks])

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Σ_i c_i g_iᵀ x_i at the block's rows."""
        for block in self.blocks:
            x, g = common_dtype(block.x, block.g)
            ops.linear_weighted_sum(x, g, factors, sums[self.weight][block.rows])

    def held_bytes(self) -> int:
        """Bytes of the blocks' tensors."""
        return sum(t.numel() * t.element_size() for block in self.blocks for t in (block.x, block.g))

    def entries(self) -> int:
        """p·d, the size of the weight."""
        return self.weight.numel()

    def chosen_by(self) -> tuple[tuple[LayerSizes, Tensor, Tensor | None], ...]:
        """Those of the blocks, each as a linear layer."""
        return tuple(linear_sizes(block.x, block.g, block.g) for block in self.blocks)

    def of_rows(self, rows: Tensor | slice) -> PackedLinearRecord:
        """The blocks' tensors of some of the examples."""
        blocks = tuple(replace(block, x=block.x[rows], g=block.g[rows]) for block in self.blocks)
        return replace(self, blocks=blocks)

    def materialised(self) -> tuple[ExpandedRecord, ...]:
        """g_iᵀ x_i of each block at the block's rows, zeros elsewhere."""
        dtype = accumulation_dtype(self.blocks[0].g)
        gradients = self.blocks[0].g.new_zeros(self.batch_size, *self.weight.shape, dtype=dtype)
        for block in self.blocks:
            gradients[:, block.rows] = per_sample_product(block.g, block.x)
        return (materialised_gradient(self.layer, self.weight, gradients),)

    def of_units(self, size: int) -> PackedLinearRecord:
        """Each block's frames are those of the unit's rows, one after the other."""
        blocks = tuple(
            replace(block, x=unit_frames(block.x, size), g=unit_frames(block.g, size))
            for block in self.blocks
        )
        return replace(self, blocks=blocks)

    def as_linear(self, dtype: torch.dtype) -> LinearRecord:
        """One linear layer over the concatenated frames of the blocks, with g = 0 in the rows of other blocks."""
        gs = [_at_rows(block, self.weight.shape[0]) for block in self.blocks]
        return LinearRecord(
            self.layer, self.weight, cat_time(*(block.x for block in self.blocks)), cat_time(*gs)
        )

    def merge(self, *others: Record) -> Record:
        """Concatenates each block along T if all uses have the same blocks, else merges them as linear records."""
        alike = [o for o in others if isinstance(o, PackedLinearRecord) and o.weight is self.weight]
        alike = [o for o in alike if o.rows == self.rows]
        if len(alike) < len(others):
            return self.as_linear(self.blocks[0].x.dtype).merge(*others)
        uses = (self, *alike)
        blocks = [
            RowBlock(same[0].first, cat_time(*(b.x for b in same)), cat_time(*(b.g for b in same)))
            for same in zip(*(use.blocks for use in uses), strict=True)
        ]
        return PackedLinearRecord(join_names(*uses), self.weight, tuple(blocks))


def _at_rows(block: RowBlock, rows: int) -> Tensor:
    """The block's g [B,T,n] as [B,T,rows], with zeros outside of the block's rows."""
    return nn.functional.pad(block.g, (block.first, rows - block.rows.stop))
