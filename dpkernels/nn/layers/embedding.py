"""GhostEmbedding: nn.Embedding that records (ids, g) instead of filling `.grad`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpkernels.nn.batch.batch_axis import Site
from dpkernels.nn.batch.shared import SharedTensor
from dpkernels.nn.layers.embedding_records import TransposedEmbeddingRecord
from dpkernels.nn.recording.module import GhostModule
from dpkernels.nn.recording.records import EmbeddingRecord
from dpkernels.nn.tensors import as_tokens, batch_first


class GhostEmbedding(GhostModule, nn.Embedding):
    """nn.Embedding: same constructor, same state_dict, same results; ids [B,*] int64 or int32, batch first.

    `padding_idx` is honoured. A table with `max_norm`, `sparse` or `scale_grad_by_freq` cannot be trained privately,
    and `uncovered` lists it: the first option changes the table in the forward, the others change a sample's gradient.

    Privately, ids that all examples share (positions [1,T] or [T], relative positions [T,T]) are looked up once per
    example. The result is a SharedTensor with the shape and values of the plain lookup, in which each example keeps
    its own gradient.
    """

    ghost_covers = ("weight",)
    ghost_asks_axes = True
    ghost_in_graph = True

    def ghost_refusal(self) -> str | None:
        """Refuse max_norm, sparse and scale_grad_by_freq."""
        for name in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(self, name):
                return (
                    f"{name}={getattr(self, name)} has no norm rule; build the layer without it, or freeze it"
                )
        return None

    def forward(self, input: Tensor) -> Any:
        """As nn.Embedding's."""
        if not self._ghost_active(self.weight):
            return super().forward(input)
        return ghost_embedding(self, input, self.weight, self.padding_idx)


def ghost_embedding(
    layer: GhostModule,
    ids: Tensor,
    table: Tensor,
    padding_idx: int | None = None,
    *,
    transposed: bool = False,
) -> Any:
    """F.embedding(ids, table, padding_idx), recorded on `layer`'s tape. `transposed`: the table is [d,V].

    Ids that all examples share ([1,T], [T], [T,T]) are looked up once per example. The result is then a SharedTensor.
    """
    if padding_idx is not None and padding_idx < 0:  # counted from the end, as F.embedding reads it
        padding_idx += table.shape[0]
    tape, label = layer.ghost_tape, layer.ghost_label()
    size = tape.examples if tape is not None else None
    if tape is None or size is None or ids.dim() == 0:
        return _Embedding.apply(ids, table, layer, padding_idx, transposed)
    site = Site(label, "its ids", tape.axes.next_call(label))
    if tape.axes.of(site, ids.shape, size) is None:
        rows = _Embedding.apply(ids.expand(size, *ids.shape), table, layer, padding_idx, transposed)
        return SharedTensor(rows, label, tape.axes)
    return _Embedding.apply(ids, table, layer, padding_idx, transposed)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, table: Tensor, layer: GhostModule, padding_idx: int | None, transposed: bool
    ) -> Tensor:
        ctx.record = TransposedEmbeddingRecord if transposed else EmbeddingRecord
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer, ctx.table, ctx.padding_idx = (
            layer.ghost_tape,
            layer.ghost_label(),
            table,
            padding_idx,
        )
        ctx.save_for_backward(ids)
        return F.embedding(ids, table.t() if transposed else table, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[None, ...]:
        if g is not None:
            (ids,) = ctx.saved_tensors
            ids, g = batch_first(ctx.tape.batch_axis((ctx.table,), g), ids, g)
            record = ctx.record(ctx.layer, ctx.table, _ids_as_tokens(ids), as_tokens(g), ctx.padding_idx)
            ctx.tape.add(record)
        return (None,) * 5


def _ids_as_tokens(ids: Tensor) -> Tensor:
    """[B,*] -> [B,T] int64, as `as_tokens` reshapes g: [B] has T = 1; a scalar id is one sample of one token."""
    return ids.long().flatten(1) if ids.dim() > 1 else ids.long().view(-1, 1)
