"""GhostLoRALinear: a linear layer with a low-rank update, y = x Wᵀ + b + s·(dropout(x) Aᵀ)Bᵀ.

`ghost_lora` is the private path of this layer and of PEFT's (dpkernels.interop.peft). It accumulates the
update into the base product (`addmm` on the output), and in the backward into dx, so the adapter needs no [B,T,p] or
[B,T,d] temporary.
"""

from __future__ import annotations

import math
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpkernels.nn.layers.lora_records import LoRARecord
from dpkernels.nn.recording.module import GhostModule
from dpkernels.nn.recording.records import BiasRecord, LinearRecord
from dpkernels.nn.tensors import (
    as_rows,
    as_tokens,
    autocast_dtype,
    maybe_cast,
    no_autocast,
    not_a_view,
    sum_over_time,
)


class GhostLoRALinear(GhostModule, nn.Linear):
    """nn.Linear with a frozen weight and bias, and a trained update of rank r.

    y = x Wᵀ + b + s·(dropout(x) Aᵀ)Bᵀ with s = alpha / r; x [B,*,d] or [B,d]. A is initialised as
    nn.Linear's weight and B to zeros, so a new layer computes the same as its base layer.

    state_dict: `weight` [p,d] and `bias` [p] as nn.Linear's (a linear layer's state loads with
    strict=False), `lora_A` [r,d], `lora_B` [p,r]. Freezing `lora_A` gives DP-RP; `bias.requires_grad_()`
    trains the bias too.

    Raises ValueError for r < 1 or a dropout outside [0, 1).
    """

    ghost_covers = ("weight", "bias", "lora_A", "lora_B")
    ghost_in_graph = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if r < 1:
            raise ValueError(f"GhostLoRALinear: r must be at least 1, got {r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"GhostLoRALinear: dropout must be in [0, 1), got {dropout}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.r, self.alpha, self.dropout = r, float(alpha), float(dropout)
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int = 8, alpha: float = 8.0, dropout: float = 0.0
    ) -> GhostLoRALinear:
        """An adapted layer to replace `linear`, without PEFT: `model.proj = GhostLoRALinear.from_linear(model.proj)`.

        Args:
            linear: W [p,d] and bias [p], which the new layer shares and freezes; A and B get their dtype and device.
            r, alpha, dropout: as the constructor's.

        Returns:
            A layer that computes the same as `linear` until B is trained; `merged` converts it to an nn.Linear.

        Raises:
            ValueError: r < 1, or a dropout outside [0, 1).
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            r,
            alpha,
            dropout,
            bias=False,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        return layer

    @property
    def scaling(self) -> float:
        """The factor s = alpha / r."""
        return self.alpha / self.r

    def merged(self) -> nn.Linear:
        """An ordinary nn.Linear with weight W + s·B A, computed in float32 or wider."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            update = self.lora_B.to(wide) @ self.lora_A.to(wide)
            linear.weight.copy_(self.weight.to(wide) + self.scaling * update)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    def forward(self, input: Tensor) -> Tensor:
        """input [B,*,d] -> [B,*,p], in the dtype of nn.Linear's output."""
        dropped = self.training and self.dropout > 0
        adapter_input = F.dropout(input, self.dropout) if dropped else None
        parameters = (self.weight, self.bias, self.lora_A, self.lora_B)
        if self._ghost_active(*parameters):
            return ghost_lora(self, input, adapter_input, *parameters, self.scaling)
        y = F.linear(input, self.weight, self.bias)
        x = (input if adapter_input is None else adapter_input).to(self.lora_A.dtype)
        return (y + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling).to(y.dtype)

    def extra_repr(self) -> str:
        """As nn.Linear's, with the rank, alpha and dropout."""
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def ghost_lora(
    layer: GhostModule,
    x: Tensor,
    adapter_input: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
) -> Tensor:
    """x Wᵀ + bias + scaling·(adapter_input Aᵀ)Bᵀ, with a record on `layer`'s tape for the trained ones of W, bias, A
    and B.

    `adapter_input` None means x itself (no dropout). Outside autocast the adapter is computed in A's dtype, and the
    result has the dtype of the base product, as in PEFT.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, adapter_input = maybe_cast(x, dtype), maybe_cast(adapter_input, dtype)
    return _LoRA.apply(x, adapter_input, weight, bias, a, b, scaling, layer, dtype)


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        adapter_input: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        layer: GhostModule,
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer, ctx.scaling, ctx.dtype = layer.ghost_tape, layer.ghost_label(), scaling, dtype
        ctx.weight, ctx.bias, ctx.a, ctx.b = weight, bias, a, b
        ctx.shared = adapter_input is None
        source = x if adapter_input is None else adapter_input
        needs_x, needs_source, needs_weight, _, needs_a, needs_b = ctx.needs_input_grad[:6]
        needs_source = needs_x if ctx.shared else needs_source
        with no_autocast(x.device.type):
            compute = a.dtype if dtype is None else dtype
            y = F.linear(x, maybe_cast(weight, dtype), maybe_cast(bias, dtype))
            h = F.linear(maybe_cast(as_rows(source), compute), maybe_cast(a, compute))
            rows, up = as_rows(y), maybe_cast(b, compute).t()
            if compute == y.dtype:
                rows.addmm_(h, up, alpha=scaling)
            else:
                wide = torch.promote_types(compute, y.dtype)
                update = torch.addmm(rows.to(wide), h.to(wide), up.to(wide), alpha=scaling)
                y = update.to(y.dtype).view(y.shape)
        ctx.save_for_backward(
            x if needs_weight else None,
            source if needs_a else None,
            h.view(*source.shape[:-1], -1) if needs_b else None,
            weight if needs_x else None,
            a if needs_source else None,
            b if needs_source or needs_a else None,
        )
        return not_a_view(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 9
        x, source, h, weight, a, b = ctx.saved_tensors
        needs_x, needs_source = ctx.needs_input_grad[:2]
        dx = d_source = None
        dh: Any = None  # a tensor wherever it is read
        with no_autocast(g.device.type):
            compute = ctx.a.dtype if ctx.dtype is None else ctx.dtype
            rows = as_rows(g)
            if b is not None:
                # scaled within the product, which saves a launch and a rounding
                dh = rows.new_empty(rows.shape[0], b.shape[1], dtype=compute)
                dh.addmm_(maybe_cast(rows, compute), maybe_cast(b, compute), beta=0, alpha=ctx.scaling)
            if needs_x:
                dx = torch.mm(rows, maybe_cast(weight, g.dtype))
                if ctx.shared:
                    dx = _add_product(dx, dh, maybe_cast(a, compute))
                dx = dx.view(*g.shape[:-1], -1)
            if needs_source:
                d_source = torch.mm(dh, a.to(compute)).to(g.dtype).view(*g.shape[:-1], -1)
            _record(ctx, x, source, h, g, dh)
        return dx, d_source, *(None,) * 7


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in total's dtype; in place if the dtypes agree."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    wide = torch.promote_types(total.dtype, left.dtype)
    return torch.addmm(total.to(wide), left.to(wide), right.to(wide)).to(total.dtype)


def _record(
    ctx: Any, x: Tensor | None, source: Tensor | None, h: Tensor | None, g: Tensor, dh: Tensor | None
) -> None:
    tape, layer = ctx.tape, ctx.layer
    if dh is not None:
        dh = dh.view(*g.shape[:-1], -1)
    used = tuple(compress((ctx.weight, ctx.bias, ctx.a, ctx.b), ctx.needs_input_grad[2:6]))
    if used and (axis := tape.batch_axis(used, g)):
        x, source, h, dh = (None if t is None else t.transpose(0, axis) for t in (x, source, h, dh))
        g = g.transpose(0, axis)
    tokens = as_tokens(g)
    if x is not None:
        tape.add(LinearRecord(layer, ctx.weight, as_tokens(x), tokens))
    if ctx.bias is not None and ctx.needs_input_grad[3]:
        tape.add(BiasRecord(layer, ctx.bias, sum_over_time(g)))
    if source is not None:
        assert dh is not None
        dh, source = as_tokens(dh), as_tokens(source)
        if h is not None:
            tape.add(LoRARecord(layer, ctx.a, ctx.b, source, as_tokens(h), tokens, dh, ctx.scaling))
        else:
            tape.add(LinearRecord(layer, ctx.a, source, dh))
    elif h is not None:
        tape.add(LinearRecord(layer, ctx.b, as_tokens(h) * ctx.scaling, tokens))
