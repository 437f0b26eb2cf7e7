"""GhostMultiheadAttention: nn.MultiheadAttention that records instead of filling `.grad`.

torch's layer is one function that reads the weights of the projections itself. Here the projection of q, k and v (one
packed weight, one record) and `out_proj` are linear layers. The arithmetic between them repeats torch's, call by call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dpkernels.nn.layers.attention_records import PackedLinearRecord, RowBlock
from dpkernels.nn.layers.expanded import _Expand
from dpkernels.nn.layers.linear import GhostLinear
from dpkernels.nn.recording.module import GhostModule
from dpkernels.nn.recording.records import BiasRecord, LinearRecord
from dpkernels.nn.tensors import (
    accumulation_dtype,
    as_rows,
    autocast_dtype,
    maybe_cast,
    no_autocast,
    not_a_view,
    sum_over_time,
)

_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class GhostOutProjection(GhostLinear, NonDynamicallyQuantizableLinear):
    """`nn.MultiheadAttention.out_proj`, a subclass of nn.Linear that computes the same."""


class GhostMultiheadAttention(GhostModule, nn.MultiheadAttention):
    """nn.MultiheadAttention: same constructor, same state_dict, same arguments and results.

    query [B,T,E], key [B,S,kdim], value [B,S,vdim] (batch_first), or [T,B,E] and so on, or without a batch [T,E], which
    is one sample. All of torch's options are covered: `kdim`, `vdim`, `bias`, `add_bias_kv`, `add_zero_attn`,
    `dropout`, and in the forward key_padding_mask [B,S], attn_mask [T,S] or [B·heads,T,S], `is_causal`, `need_weights`
    and `average_attn_weights`. Attention is a softmax if `need_weights`, else `scaled_dot_product_attention`.

    Privately a packed weight has one record: of one linear layer if query, key and value are the same tensor, else of
    its blocks of rows (PackedLinearRecord). Separate weights (`kdim`, `vdim`) have a record each. `out_proj` records as
    a linear layer and runs no hooks, as in torch. Dropout draws the same masks as torch's layer.

    Raises ValueError for different batch sizes, TypeError for nested tensors, and torch's errors for masks.
    """

    ghost_covers = (*_PROJECTIONS, "in_proj_weight", "in_proj_bias", "bias_k", "bias_v")
    ghost_in_graph = True
    ghost_reads_output = True  # the weights

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's."""
        if not self._private():
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if query.is_nested or key.is_nested or value.is_nested:
            raise TypeError(
                f"{self.ghost_label()!r}: got nested tensors, which cannot be trained privately; give padded tensors "
                "and key_padding_mask (in an nn.TransformerEncoder: enable_nested_tensor=False)"
            )
        masks = (key_padding_mask, attn_mask)
        batched = F._mha_shape_check(query, key, value, *masks, self.num_heads)  # type: ignore[attr-defined]
        axis = None if not batched else 0 if self.batch_first else 1
        query, key, value = _batch_first((query, key, value), axis)
        if axis is None and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        self._check_shapes(query, key, value)
        causal = is_causal and attn_mask is not None and key_padding_mask is None and not need_weights
        # torch then uses the hint in place of the mask
        mask = None if causal else self._mask(query, key, attn_mask, key_padding_mask, is_causal)
        q, k, v = self._project(query, key, value)
        k, v = self._with_added_frames(k, "bias_k"), self._with_added_frames(v, "bias_v")
        y, weights = self._attend(q, k, v, mask, causal, need_weights)
        y = self.out_proj.forward(y)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if axis is None:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        # contiguous like torch's output, so that the caller can view it
        return y if axis == 0 else y.transpose(0, 1).contiguous(), weights

    def ghost_result(self, tensors: list[Tensor]) -> Any:
        """Output, and weights or None."""
        return tensors[0], tensors[1] if len(tensors) > 1 else None

    def ghost_shapes(self, tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As GhostModule's; torch's own forward might take a fused path, which is not traced."""
        return self._empty(*args, **kwargs)

    def _empty(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        y = query.new_empty(query.shape, dtype=autocast_dtype(query) or query.dtype)
        if not need_weights:
            return y, None
        *batch, frames, source = (
            (query.shape[0], key.shape[0])
            if query.dim() == 2
            else (query.shape[0], query.shape[1], key.shape[1])
            if self.batch_first
            else (query.shape[1], query.shape[0], key.shape[0])
        )
        source += (self.bias_k is not None) + self.add_zero_attn
        heads = () if average_attn_weights else (self.num_heads,)
        return y, F.softmax(y.new_empty((*batch, *heads, frames, source)), -1)

    def _private(self) -> bool:
        active = self._ghost_active(*(getattr(self, name) for name in self.ghost_covers))
        out = self.out_proj  # counts its use itself
        return active or (isinstance(out, GhostModule) and bool(out._ghost_trained(*out.parameters())))

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Check torch's own conditions; otherwise a key of batch size 1, for example, would be broadcast."""
        packed = self.in_proj_weight is not None
        alike = key.shape == value.shape if packed else key.shape[:2] == value.shape[:2]
        if not alike or query.shape[0] != key.shape[0]:
            raise ValueError(
                f"{self.ghost_label()!r}: query {tuple(query.shape)}, key {tuple(key.shape)} and value "
                f"{tuple(value.shape)} (batch first) do not fit: give all three the same batch, and key and value the "
                f"same length{' and width' if packed else ''}"
            )

    def _mask(
        self,
        query: Tensor,
        key: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor | None:
        """Both masks as one to add to the scores, [B or 1, heads or 1, T or 1, S + added keys]."""
        if is_causal and attn_mask is None:
            raise RuntimeError(
                f"{self.ghost_label()!r}: is_causal is a hint about attn_mask; pass attn_mask, too"
            )
        batch, frames, source = *query.shape[:2], key.shape[1]
        masks: list[Tensor] = []
        canonical: Any = F._canonical_mask
        if key_padding_mask is not None:
            other = None if attn_mask is None else attn_mask.dtype
            _check_mask(self, "key_padding_mask", key_padding_mask, (batch, source))
            padding = canonical(key_padding_mask, "key_padding_mask", other, "attn_mask", query.dtype)
            masks.append(padding.view(batch, 1, 1, source))
        if attn_mask is not None:
            shared = attn_mask.dim() == 2
            heads = 1 if shared else self.num_heads
            lead = () if shared else (batch * heads,)
            _check_mask(self, "attn_mask", attn_mask, (*lead, frames, source))
            attn_mask = canonical(attn_mask, "attn_mask", None, "", query.dtype, False)
            masks.append(attn_mask.view(1 if shared else batch, heads, frames, source))
        added = (self.bias_k is not None) + self.add_zero_attn
        masks = [F.pad(mask, (0, added)) if added else mask for mask in masks]
        return None if not masks else masks[0] if len(masks) == 1 else masks[1] + masks[0]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q [B,T,E], k and v [B,S,E]."""
        e, weights = self.embed_dim, [self.in_proj_weight]
        inputs: tuple[Tensor, ...] = (query, key, value)
        sizes: tuple[int, ...] = (e, e, e)
        if self.in_proj_weight is None:
            weights = [getattr(self, name) for name in _PROJECTIONS]
        elif key is value:
            inputs, sizes = ((query,), (3 * e,)) if query is key else ((query, key), (e, 2 * e))
        dtype = autocast_dtype(query)
        # The inputs are cast outside of the function, so that autograd casts dx back as it does for the torch layer.
        cast = [maybe_cast(x, dtype) for x in inputs]
        projected = _Projections.apply(self, sizes, dtype, self.in_proj_bias, *cast, *weights)
        return [part for y in projected for part in y.split(e, 2)]

    def _with_added_frames(self, t: Tensor, name: str) -> Tensor:
        """Keys or values [B,S,E], followed by the trained frame (add_bias_kv) and the zero frame (add_zero_attn)."""
        row: Tensor | None = getattr(self, name)
        if row is not None:
            batch = t.shape[0]
            if self._ghost_trained(row):
                row = _Expand.apply(row, batch, self.ghost_tape, f"{self.ghost_label()}.{name}")
            t = torch.cat((t, row.reshape(-1, 1, self.embed_dim).expand(batch, -1, -1)), 1)
        return F.pad(t, (0, 0, 0, 1)) if self.add_zero_attn else t

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Context [B,T,E], and if `need_weights` the weights [B,heads,T,S]."""
        heads, dropout = self.num_heads, self.dropout if self.training else 0.0
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        if not need_weights:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
            return y.transpose(1, 2).flatten(2), None
        batch = q.shape[0]
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        q = q * math.sqrt(1.0 / self.head_dim)
        if mask is None:
            scores = torch.bmm(q, k.transpose(1, 2))
        else:
            scores = torch.baddbmm(mask.expand(batch, heads, -1, -1).flatten(0, 1), q, k.transpose(1, 2))
        weights = F.softmax(scores, -1)
        if dropout > 0:
            weights = F.dropout(weights, dropout)
        y = torch.bmm(weights, v).unflatten(0, (batch, heads))
        return y.transpose(1, 2).flatten(2), weights.unflatten(0, (batch, heads))


def attention_refusal(module: nn.Module) -> str | None:
    """Why no part of an attention layer can be trained privately: it has its own forward, or a replaced out_proj."""
    if not isinstance(module, nn.MultiheadAttention) or type(module) is nn.MultiheadAttention:
        return None
    name = type(module).__name__
    if not isinstance(module, GhostMultiheadAttention):
        return (
            f"{name} is a subclass of nn.MultiheadAttention with its own forward. If that calls super().forward and "
            f"reads no parameter itself, call dpkernels.nn.register_swap({name}, dpkernels.nn.ghost_subclass({name}, "
            "dpkernels.nn.GhostMultiheadAttention)); else freeze it"
        )
    out = module.out_proj
    if type(out) is not GhostOutProjection:
        return (
            f"its out_proj is a {type(out).__name__}, but nn.MultiheadAttention reads the weight of out_proj without "
            "calling it; leave out_proj as nn.MultiheadAttention builds it, or freeze the whole layer"
        )
    return None


def _batch_first(inputs: tuple[Tensor, ...], axis: int | None) -> list[Tensor]:
    """Each input as [B,T,*]; equal inputs stay one tensor. axis: the batch's axis, or None without a batch."""
    views: dict[int, Tensor] = {}
    for t in inputs:
        if id(t) not in views:
            views[id(t)] = t.unsqueeze(0) if axis is None else t.transpose(0, axis) if axis else t
    return [views[id(t)] for t in inputs]


def _check_mask(layer: GhostModule, name: str, mask: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(mask.shape) != expected:
        raise RuntimeError(
            f"{layer.ghost_label()!r}: {name} has shape {tuple(mask.shape)}, but should have {expected}"
        )


class _Projections(torch.autograd.Function):
    """y_i = x_i W_iᵀ + b_i. The W_i are separate weights, or blocks of `sizes` rows of one weight. Likewise the b_i."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: GhostModule,
        sizes: tuple[int, ...],
        dtype: torch.dtype | None,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        n = len(sizes)
        inputs, weights = tensors[:n], tensors[n:]
        ctx.tape, ctx.layer, ctx.sizes = layer.ghost_tape, layer.ghost_label(), sizes
        ctx.bias, ctx.weights = bias, weights
        needs_inputs, ctx.needs_weights = ctx.needs_input_grad[4 : 4 + n], ctx.needs_input_grad[4 + n :]
        kept = [x if any(ctx.needs_weights) else None for x in inputs]
        ctx.save_for_backward(*kept, *(weights if any(needs_inputs) else [None] * len(weights)))
        with no_autocast(inputs[0].device.type):
            matrices = _blocks([maybe_cast(w, dtype) for w in weights], sizes)
            vectors = [None] * n if bias is None else maybe_cast(bias, dtype).split(sizes)
            return tuple(
                not_a_view(_linear(x, w, b)) for x, w, b in zip(inputs, matrices, vectors, strict=True)
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(ctx.sizes)
        dxs: list[Tensor | None] = [None] * n
        given = [(i, g) for i, g in enumerate(gs) if g is not None]
        saved = ctx.saved_tensors  # read only once: a checkpoint returns each tensor once
        inputs, weights = saved[:n], saved[n:]
        if given:
            with no_autocast(given[0][1].device.type):
                if weights[0] is not None:
                    matrices = _blocks(weights, ctx.sizes)
                    for i, g in given:
                        if ctx.needs_input_grad[4 + i]:
                            dxs[i] = torch.mm(as_rows(g), matrices[i].to(g.dtype)).view(*g.shape[:2], -1)
                _record_projections(ctx, inputs, given)
        return (None, None, None, None, *dxs, *[None] * len(ctx.weights))


def _record_projections(ctx: Any, inputs: tuple[Tensor, ...], given: list[tuple[int, Tensor]]) -> None:
    if len(ctx.weights) == len(ctx.sizes):
        for i, g in given:
            if ctx.needs_weights[i]:
                ctx.tape.add(LinearRecord(ctx.layer, ctx.weights[i], inputs[i], g))
    elif ctx.needs_weights[0]:
        blocks = tuple(RowBlock(sum(ctx.sizes[:i]), inputs[i], g) for i, g in given)
        ctx.tape.add(PackedLinearRecord(ctx.layer, ctx.weights[0], blocks))
    if ctx.bias is not None and ctx.needs_input_grad[3]:
        g = given[0][1]
        totals = [g.new_zeros(g.shape[0], n, dtype=accumulation_dtype(g)) for n in ctx.sizes]
        for i, g in given:
            totals[i] = sum_over_time(g)
        ctx.tape.add(BiasRecord(ctx.layer, ctx.bias, torch.cat(totals, 1)))


def _blocks(weights: Any, sizes: tuple[int, ...]) -> Any:
    """One weight for each projection: the given weights, or the blocks of a single one."""
    return weights if len(weights) == len(sizes) else weights[0].split(sizes)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x [B,T,d]; a view of a contiguous [T,B,d] is not copied."""
    if x.is_contiguous() or not x.transpose(0, 1).is_contiguous():
        return F.linear(x, weight, bias)
    return F.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
