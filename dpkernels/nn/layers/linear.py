"""GhostLinear: nn.Linear that records x and the output gradient g instead of filling `.grad`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpkernels.nn.recording.module import GhostModule
from dpkernels.nn.recording.records import BiasRecord, LinearRecord
from dpkernels.nn.tensors import (
    as_rows,
    as_tokens,
    autocast_dtype,
    batch_first,
    maybe_cast,
    no_autocast,
    not_a_view,
    sum_over_time,
)


class GhostLinear(GhostModule, nn.Linear):
    """nn.Linear: same constructor, same state_dict, same results.

    Privately: y = x Wᵀ + b with x [B,*,d], [B,d] or [T,B,d] (`Tape.batch_axis`). The backward returns dx = g W. It
    records x and g [B,T,p] if W is trained, and Σ_t g if b is trained. dtypes are nn.Linear's, autocast included.
    """

    ghost_in_graph = True

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear's."""
        weight, bias = self.weight, self.bias  # once: nn.Module looks them up last
        if not self._ghost_active(weight, bias):
            return F.linear(input, weight, bias)
        return ghost_linear(self, input, weight, bias)


def ghost_linear(
    layer: GhostModule,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """F.linear(x, weight, bias) that records on `layer`'s tape.

    `transposed`: the weight is [d,p], y = x W + b. `dtype`: of the computation (None: x's, or autocast's).
    """
    dtype = autocast_dtype(x) or dtype
    # x is cast outside of the function, so that autograd casts dx back as it does for the torch layer.
    y: Tensor = _Linear.apply(maybe_cast(x, dtype), weight, bias, layer, transposed, dtype)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: GhostModule,
        transposed: bool,
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer, ctx.transposed = layer.ghost_tape, layer.ghost_label(), transposed
        ctx.weight, ctx.bias = weight, bias
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        with no_autocast(x.device.type):
            matrix, vector = maybe_cast(weight, dtype), maybe_cast(bias, dtype)
            if not transposed:
                return not_a_view(F.linear(x, matrix, vector))
            rows = as_rows(x)
            y = torch.mm(rows, matrix) if vector is None else torch.addmm(vector, rows, matrix)
            return not_a_view(y.view(*x.shape[:-1], y.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 6
        x, weight = ctx.saved_tensors
        dx = None
        with no_autocast(g.device.type):
            if ctx.needs_input_grad[0]:
                matrix = weight.to(g.dtype)
                dx = torch.mm(as_rows(g), matrix.t() if ctx.transposed else matrix)
                dx = dx.view(*g.shape[:-1], dx.shape[1])
            trained = (ctx.weight if ctx.needs_input_grad[1] else ctx.bias,)
            axis = ctx.tape.batch_axis(trained, g)
            (g,) = batch_first(axis, g)
            if ctx.needs_input_grad[1]:
                (x,) = batch_first(axis, x)
                pair = (as_tokens(g), as_tokens(x)) if ctx.transposed else (as_tokens(x), as_tokens(g))
                ctx.tape.add(LinearRecord(ctx.layer, ctx.weight, *pair, exchanged=ctx.transposed))
            if ctx.bias is not None and ctx.needs_input_grad[2]:
                ctx.tape.add(BiasRecord(ctx.layer, ctx.bias, sum_over_time(g)))
        return dx, None, None, None, None, None
