"""The record of a transducer's output layer, which sees T·(U+1) cells of each utterance and keeps none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn.recording.records import (
    BiasRecord,
    ExpandedRecord,
    Record,
    materialised_gradient,
    unit_frames,
)
from dpkernels.nn.tensors import accumulation_dtype, factors_within, no_autocast, sum_up

CELLS_BYTES = 1 << 28
"""Memory for cells: 256 MiB are 7,600 cells of Parakeet's widths (640 and 8,198) in float32, enough for full speed."""

GRADIENTS_BYTES = 1 << 31
"""Memory for per-sample gradients between norm and sum: 2 GiB are 102 utterances of these widths."""


@dataclass(eq=False)
class JointRecord(Record):
    """Weight [p, H] and bias [p] of a transducer's output layer, p = V + D: z_tu = act(encoder_t + predictor_u) in,
    logits out, in C = T·(U+1) cells.

    The record keeps the states, and of each cell 2 + D flows and 1 or 2 log-sum-exps, not H + p numbers. From these
    `ops.transducer_cells` computes x [B,C,H] and g [B,C,p] again, for at most `CELLS_BYTES` of cells at a time, of as
    many utterances as fit; of a longer utterance, frames by frames.

    **Each utterance's gradient g_iᵀx_i is materialised from its cells.** It has H·p entries, its cells C·(H+p): 21 MB
    and 339 MB of float32 at T = 188, U = 50, H = 640, p = 8,198. With it, norm and sum together take 4·C·H·p operations
    (one product for the logits, one for the gradient). Without it, each of the two needs both products, 8·C·H·p. A Gram
    matrix of the cells, C²·(H+p) operations, is cheaper than the second product only for C below 2·H·p/(H+p), 1,187
    here, where all of this is small. Where the gradients of all B utterances exceed `GRADIENTS_BYTES`, they are not
    kept for the sum but made again.

    **Rounding.** Norm and sum read the same materialised values. Where these are made twice, their second norm is
    taken too, and an utterance's factor is reduced if it is the larger one, so that the bound does not rest on a
    product that repeats its bits.

    Attributes:
        layer, weight, bias: as in a linear layer; at least one of the two is trained.
        encoder [B,T,H], predictor [B,U+1,H], targets [B,U], frame_lengths [B], target_lengths [B], options: see
            `ops.transducer_loss`.
        normalizers, flows: see `ops.transducer_scores`, `ops.transducer_lattice`.
        g: [B], the gradients of the losses.
        unit: so many consecutive utterances are one unit; see `Record.of_units`.
    """

    layer: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    encoder: Tensor
    predictor: Tensor
    targets: Tensor
    frame_lengths: Tensor
    target_lengths: Tensor
    normalizers: Tensor
    flows: Tensor
    g: Tensor
    options: dict[str, Any]
    trained: tuple[nn.Parameter, ...]
    unit: int = 1
    # of the groups of units, in order: what the norm left for the sum
    _kept: list[tuple[ExpandedRecord, ...]] = field(default_factory=list, init=False, repr=False)
    _norm_sq: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Those of weight and bias that are trained."""
        return self.trained

    @property
    def batch_size(self) -> int:
        """B, in units (see `Record.of_units`)."""
        return self.g.shape[0] // self.unit

    def of_units(self, size: int) -> JointRecord:
        """The unit's cells are those of its rows, one after the other."""
        return replace(self, unit=size)

    def entries(self) -> int:
        """H·p for the weight, p for the bias."""
        return sum(parameter.numel() for parameter in self.trained)

    def norm_sq(self) -> Tensor:
        """‖g_iᵀx_i‖² + ‖Σ_c g_ic‖², of materialised gradients."""
        keeps = self.batch_size * self._sample_bytes() <= GRADIENTS_BYTES
        self._kept = []
        norms = []
        for units in self._groups():
            parts = self._gradients(units)
            norms.append(_norm_sq_of(parts))
            if keeps:
                self._kept.append(parts)
        self._norm_sq = torch.cat(norms) if norms else self.g.new_zeros(0, dtype=torch.float32)
        return self._norm_sq

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Σ_i c_i g_iᵀx_i and Σ_i c_i Σ_c g_ic; c_i is reduced where a second product gave a larger gradient."""
        for index, units in enumerate(self._groups()):
            own = factors[units]
            if self._kept:
                parts = self._kept[index]
            else:
                parts = self._gradients(units)
                if self._norm_sq is not None:
                    own = factors_within(own, self._norm_sq[units].double(), _norm_sq_of(parts).double())
            for part in parts:
                part.add_weighted_sum(own, sums)

    def materialised(self) -> tuple[ExpandedRecord, ...]:
        """g_iᵀx_i and Σ_c g_ic of all units at once."""
        return self._gradients(slice(0, self.batch_size))

    def _sample_bytes(self) -> int:
        return self.entries() * accumulation_dtype(self.encoder).itemsize

    def _cell_bytes(self) -> int:
        """Bytes of one cell's x and g, with their copies in the dtype of the sum."""
        own, wide = self.encoder.element_size(), accumulation_dtype(self.encoder).itemsize
        return sum(self.weight.shape) * (own if own == wide else own + wide)

    def _groups(self) -> Iterator[slice]:
        """The units whose gradients are made together."""
        cells = max(1, self.unit * self.encoder.shape[1] * self.predictor.shape[1])
        together = min(CELLS_BYTES // (cells * self._cell_bytes()), GRADIENTS_BYTES // self._sample_bytes())
        for i in range(0, self.batch_size, max(1, together)):
            yield slice(i, min(i + max(1, together), self.batch_size))

    def _gradients(self, units: slice) -> tuple[ExpandedRecord, ...]:
        """The gradients of some units, in float32 (float64 for float64), one record per trained parameter."""
        count, wide = units.stop - units.start, accumulation_dtype(self.encoder)
        needs_weight = any(self.weight is parameter for parameter in self.trained)
        of_weight = self.g.new_zeros(count if needs_weight else 0, *self.weight.shape, dtype=wide)
        of_bias = self.g.new_zeros(count, self.weight.shape[0], dtype=wide)
        with torch.no_grad(), no_autocast(self.g.device.type):
            for cells in self._cells(slice(units.start * self.unit, units.stop * self.unit)):
                x, g = (unit_frames(t, self.unit) for t in cells)
                if needs_weight:
                    of_weight.baddbmm_(g.transpose(1, 2).to(wide), x.to(wide))
                of_bias += g.sum(1, dtype=wide)
        parts: list[ExpandedRecord] = []
        if needs_weight:
            parts.append(materialised_gradient(self.layer, self.weight, of_weight))
        if any(self.bias is parameter for parameter in self.trained):
            parts.append(BiasRecord(self.layer, cast(nn.Parameter, self.bias), of_bias))
        return tuple(parts)

    def _cells(self, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, g) of some utterances, all of their frames or as many at a time as `CELLS_BYTES` allows."""
        dtype = self.encoder.dtype
        weight = self.weight.detach().to(dtype)
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        per_frame = (rows.stop - rows.start) * self.predictor.shape[1] * self._cell_bytes()
        step = max(1, CELLS_BYTES // max(1, per_frame))
        for t in range(0, self.encoder.shape[1], step):
            frames = slice(t, t + step)
            encoder = self.encoder[rows, frames]
            yield ops.transducer_cells(
                encoder,
                self.predictor[rows],
                weight,
                bias,
                self.targets[rows],
                (self.frame_lengths[rows] - t).clamp(0, encoder.shape[1]),
                self.target_lengths[rows],
                self.normalizers[rows, frames],
                self.flows[rows, frames],
                self.g[rows],
                **self.options,
            )


def _norm_sq_of(parts: tuple[ExpandedRecord, ...]) -> Tensor:
    return sum_up([part.norm_sq() for part in parts])
