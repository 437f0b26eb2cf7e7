"""The record of a table that is held the other way round: [d, V], as PEFT's lora_embedding_A is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn.recording.records import EmbeddingRecord, LinearRecord, Record, Share, join_names
from dpkernels.nn.tensors import cat_time


@dataclass(eq=False)
class TransposedEmbeddingRecord(EmbeddingRecord):
    """Table [d, V] whose columns were looked up at ids [B,T] (int64): g [B,T,d]. Column `padding_idx` gets none."""

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Add c_i g_t to column id_t."""
        total = sums[self.weight]
        rows = torch.zeros_like(total.t(), memory_format=torch.contiguous_format)
        ops.embedding_weighted_sum(self.ids, self.g, factors, rows, padding_idx=self.padding_idx)
        total += rows.t()

    def share(self) -> Share | None:
        """None: the grouped ops add to rows."""
        return None

    def as_linear(self, dtype: torch.dtype) -> LinearRecord:
        """Σ_t g_t onehot(id_t)ᵀ, with no column for `padding_idx`."""
        onehot = torch.zeros(*self.ids.shape, self.weight.shape[1], dtype=dtype, device=self.g.device)
        onehot.scatter_(-1, self.ids.unsqueeze(-1), 1)
        if self.padding_idx is not None:
            onehot[..., self.padding_idx] = 0
        return LinearRecord(self.layer, self.weight, x=onehot, g=self.g)

    def merge(self, *others: Record) -> Record:
        """Concatenated along T; as linear records where one of the others is one, or pads differently."""
        lookups = [o for o in others if isinstance(o, TransposedEmbeddingRecord) and o.weight is self.weight]
        lookups = [o for o in lookups if o.padding_idx == self.padding_idx]
        if len(lookups) < len(others):
            return self.as_linear(self.g.dtype).merge(*others)
        uses = (self, *lookups)
        ids, g = torch.cat([use.ids for use in uses], 1), cat_time(*(use.g for use in uses))
        return TransposedEmbeddingRecord(join_names(*uses), self.weight, ids, g, self.padding_idx)
