"""The record of one use of a layer of which some examples' tensors are kept, and the others' gradients materialised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpkernels.nn.recording.records import ExpandedRecord, Record
from dpkernels.nn.tensors import sum_up


@dataclass(eq=False)
class SplitRecord(Record):
    """`kept` has the examples `kept_rows` [n] of a micro-batch, `made` the others, `made_rows` [B − n] (both int64)."""

    layer: str
    kept: Record
    made: tuple[ExpandedRecord, ...]
    kept_rows: Tensor
    made_rows: Tensor

    @classmethod
    def of(cls, record: Record, materialise: Tensor) -> SplitRecord:
        """The record with the gradients of the examples `materialise` [B] (bool) materialised."""
        kept_rows, made_rows = (~materialise).nonzero().flatten(), materialise.nonzero().flatten()
        made = record.of_rows(_without_a_copy(made_rows)).materialised()
        return cls(record.layer, record.of_rows(kept_rows), made, kept_rows, made_rows)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Those of the record that was split."""
        return self.kept.parameters

    @property
    def batch_size(self) -> int:
        """B, of both parts."""
        return len(self.kept_rows) + len(self.made_rows)

    def held_bytes(self) -> int:
        """Bytes of both parts."""
        return self.kept.held_bytes() + sum(part.held_bytes() for part in self.made)

    def norm_sq(self) -> Tensor:
        """Each example's norm from its part."""
        kept, made = self.kept.norm_sq(), sum_up([part.norm_sq() for part in self.made])
        norms = torch.empty(self.batch_size, dtype=kept.dtype, device=kept.device)
        norms[self.kept_rows], norms[self.made_rows] = kept, made
        return norms

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """The sums of both parts."""
        self.kept.add_weighted_sum(factors[self.kept_rows], sums)
        for part in self.made:
            part.add_weighted_sum(factors[self.made_rows], sums)

    def of_units(self, size: int) -> SplitRecord:
        """Both parts by unit; the tape splits no unit."""
        rows = (t[::size] // size for t in (self.kept_rows, self.made_rows))
        made = tuple(part.of_units(size) for part in self.made)
        return SplitRecord(self.layer, self.kept.of_units(size), made, *rows)


def _without_a_copy(rows: Tensor) -> Tensor | slice:
    """The rows as a slice if they follow on one another, as they do in a micro-batch that is sorted by length."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows
