"""GhostEmbeddingBag: nn.EmbeddingBag that records (ids, g) instead of filling `.grad`.

A bag's output is Σ_t w_t table[id_t], so row id_t of the table gets w_t times the output gradient, as in an embedding
of the bag's ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpkernels.nn.recording.module import GhostModule
from dpkernels.nn.recording.records import EmbeddingRecord
from dpkernels.nn.tensors import accumulation_dtype, no_autocast


class GhostEmbeddingBag(GhostModule, nn.EmbeddingBag):
    """nn.EmbeddingBag: same constructor, same state_dict, same results; a bag is one example.

    ids [B,T], or ids [N] with offsets [B] (`include_last_offset`: [B+1]); `mode` "sum" (also with `per_sample_weights`,
    which get their gradient) and "mean"; `padding_idx` is honoured. The record pads the bags to the longest one, and
    holds B·T·d entries of g.

    `coverage` lists mode="max", `max_norm`, `sparse` and `scale_grad_by_freq` as refused. Raises ValueError for
    offsets that do not begin with 0, decrease, or leave ids out, which then belong to no bag; TypeError for nested
    tensors.
    """

    ghost_covers = ("weight",)
    ghost_in_graph = True

    def ghost_refusal(self) -> str | None:
        """Refuse mode="max", max_norm, sparse and scale_grad_by_freq."""
        if self.mode == "max":
            return 'mode="max" has no norm rule; use "sum" or "mean", or freeze it'
        for name in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(self, name):
                return (
                    f"{name}={getattr(self, name)} has no norm rule; build the layer without it, or freeze it"
                )
        return None

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """As nn.EmbeddingBag's."""
        if not self._ghost_active(self.weight):
            return super().forward(input, offsets, per_sample_weights)
        if input.is_nested:
            raise TypeError(
                f"{self.ghost_label()!r}: got nested ids; give ids [B,T], or ids [N] with offsets [B]"
            )
        bags = None if offsets is None else _bags(self, offsets, len(input))
        return _EmbeddingBag.apply(input, offsets, per_sample_weights, self.weight, self, bags)


@dataclass(frozen=True, eq=False)
class _Bags:
    """The places in [B,T] of the N ids of ragged bags: the bag of each id and its place in the bag, [N] each."""

    bag: Tensor
    place: Tensor
    shape: tuple[int, int]

    def padded(self, values: Tensor) -> Tensor:
        """[N] -> [B,T], with zeros after the shorter bags."""
        rows = values.new_zeros(self.shape)
        rows[self.bag, self.place] = values
        return rows

    def flat(self, rows: Tensor) -> Tensor:
        """[B,T] -> [N]."""
        return rows[self.bag, self.place]


def _bags(layer: GhostEmbeddingBag, offsets: Tensor, count: int) -> _Bags:
    last = offsets.new_tensor([count])
    bounds = (offsets if layer.include_last_offset else torch.cat((offsets, last))).long()
    lengths = bounds.diff()
    if len(bounds) == 0 or bool((bounds[0] != 0) | (bounds[-1] != count) | (lengths < 0).any()):
        raise ValueError(
            f"{layer.ghost_label()!r}: offsets must begin with 0, not decrease, and assign each of the {count} ids to "
            f"a bag (include_last_offset={layer.include_last_offset}); got {len(offsets)}: {offsets[:5].tolist()}, …"
        )
    bag = torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)
    place = torch.arange(count, device=offsets.device) - bounds[bag]
    return _Bags(bag, place, (len(lengths), int(lengths.max()) if len(lengths) else 0))


class _EmbeddingBag(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        table: Tensor,
        layer: GhostEmbeddingBag,
        bags: _Bags | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer, ctx.table, ctx.bags = layer.ghost_tape, layer.ghost_label(), table, bags
        ctx.mean, ctx.padding_idx = layer.mode == "mean", layer.padding_idx
        ctx.save_for_backward(ids, weights, table if ctx.needs_input_grad[2] else None)
        return F.embedding_bag(
            ids,
            table,
            offsets,
            mode=layer.mode,
            per_sample_weights=weights,
            include_last_offset=layer.include_last_offset,
            padding_idx=layer.padding_idx,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 6
        ids, weights, table = ctx.saved_tensors
        dweights = None
        with no_autocast(g.device.type):
            rows = ids.long() if ctx.bags is None else ctx.bags.padded(ids.long())
            bag_weights = _bag_weights(ctx, ids, rows, weights, accumulation_dtype(g))
            token_g = g.unsqueeze(1).expand(-1, rows.shape[1], -1)
            if table is not None:
                along = (F.embedding(rows, table) * token_g).sum(2, dtype=accumulation_dtype(g))
                if ctx.padding_idx is not None:
                    along = along.masked_fill(rows == ctx.padding_idx, 0)
                dweights = (along if ctx.bags is None else ctx.bags.flat(along)).to(weights.dtype)
            if ctx.needs_input_grad[3]:
                token_g = token_g if bag_weights is None else token_g * bag_weights.unsqueeze(2)
                ctx.tape.add(EmbeddingRecord(ctx.layer, ctx.table, rows, token_g, ctx.padding_idx))
        return None, None, dweights, None, None, None


def _bag_weights(
    ctx: Any, ids: Tensor, rows: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """The weight w [B,T] of each id in its bag, 0 at padding; None if all weights are 1."""
    if weights is None and ctx.bags is None and not ctx.mean:
        return None
    given = torch.ones_like(ids, dtype=dtype) if weights is None else weights.to(dtype)
    bag_weights = given if ctx.bags is None else ctx.bags.padded(given)
    if not ctx.mean:
        return bag_weights
    if ctx.padding_idx is not None:
        bag_weights = bag_weights * (rows != ctx.padding_idx)  # torch does not count padding
    return bag_weights / bag_weights.sum(1, keepdim=True).clamp(min=1)
