"""GhostLayerNorm and GhostRMSNorm.

The gradients of a norm's weight and bias are vectors: Σ_t x̂_t ⊙ g_t and Σ_t g_t. The backward sums them over time
in float32 and keeps them as [B,d]. This takes T times less memory than x̂ and g, which need not be kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpkernels.nn.recording.module import GhostModule
from dpkernels.nn.recording.records import BiasRecord, NormRecord
from dpkernels.nn.tensors import accumulation_dtype, batch_first, no_autocast


class GhostLayerNorm(GhostModule, nn.LayerNorm):
    """nn.LayerNorm: same constructor, same state_dict, same results; x [B,*,normalized_shape].

    The backward computes x̂, its sums and dx in float32 (float64 for float64), whatever the input's dtype.
    """

    ghost_forms = ("weight", "bias")

    ghost_in_graph = True

    def forward(self, input: Tensor) -> Tensor:
        """As nn.LayerNorm's."""
        weight, bias = self.weight, self.bias  # once: nn.Module looks them up last
        if not self._ghost_active(weight, bias):
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        return _LayerNorm.apply(input, weight, bias, self)


class GhostRMSNorm(GhostModule, nn.RMSNorm):
    """nn.RMSNorm: same constructor, same state_dict, same results; x [B,*,normalized_shape]."""

    ghost_covers = ghost_forms = ("weight",)
    ghost_in_graph = True

    def forward(self, x: Tensor) -> Tensor:
        """As nn.RMSNorm's."""
        if not self._ghost_active(self.weight):
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self)


def _by_sample(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[B,*,shape] -> [B,T,∏shape]; an input without batch dimension is one sample."""
    t = t.flatten(-len(shape))
    return t.reshape(1, 1, -1) if t.dim() == 1 else t.unsqueeze(1) if t.dim() == 2 else t.flatten(1, -2)


def _record_affine(
    ctx: Any,
    x_hat: Tensor | None,
    g: Tensor,
    shape: tuple[int, ...],
    weight: nn.Parameter,
    bias: nn.Parameter | None,
) -> None:
    """Record the per-sample gradients of a layer or RMS norm; g and x_hat are in the accumulation dtype."""
    trained = tuple(p for p in (weight if x_hat is not None else None, bias) if p is not None)
    if not trained:
        return
    axis = ctx.tape.batch_axis(trained, g, len(shape))
    (g,) = batch_first(axis, g)
    g = _by_sample(g, shape)
    if x_hat is not None:
        (x_hat,) = batch_first(axis, x_hat)
        ctx.tape.add(NormRecord(ctx.layer, weight, (_by_sample(x_hat, shape) * g).sum(1)))
    if bias is not None:
        ctx.tape.add(BiasRecord(ctx.layer, bias, g.sum(1)))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: GhostLayerNorm) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer = layer.ghost_tape, layer.ghost_label()
        ctx.shape, ctx.eps, ctx.weight, ctx.bias = layer.normalized_shape, layer.eps, weight, bias
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_x or needs_weight else None, weight if needs_x else None)
        return F.layer_norm(x, ctx.shape, weight, bias, ctx.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 4
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = x_hat = None
        with no_autocast(g.device.type):
            wide = accumulation_dtype(g)
            g = g.to(wide)
            if x is not None:
                # One pass gives x̂, which the weight's gradient needs, and the statistics, which dx needs.
                x_wide = x.to(wide)
                x_hat, mean, rstd = torch.native_layer_norm(x_wide, ctx.shape, None, None, ctx.eps)
            if needs_x:
                dx, _, _ = torch.ops.aten.native_layer_norm_backward(
                    g, x_wide, ctx.shape, mean, rstd, weight.to(wide), None, [True, False, False]
                )
                dx = dx.to(x.dtype)
            _record_affine(
                ctx,
                x_hat if needs_weight else None,
                g,
                ctx.shape,
                ctx.weight,
                ctx.bias if needs_bias else None,
            )
        return dx, None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: GhostRMSNorm) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer, ctx.shape, ctx.weight = (
            layer.ghost_tape,
            layer.ghost_label(),
            layer.normalized_shape,
            weight,
        )
        # torch's default is the machine ε of the dtype it computes in, not of x's. Passed, so that both agree.
        ctx.eps = torch.finfo(accumulation_dtype(x)).eps if layer.eps is None else layer.eps
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        return F.rms_norm(x, layer.normalized_shape, weight, ctx.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 3
        x, weight = ctx.saved_tensors
        dx = None
        with no_autocast(g.device.type):
            wide = accumulation_dtype(g)
            axes = tuple(range(-len(ctx.shape), 0))
            g, x_wide = g.to(wide), x.to(wide)
            scale = torch.rsqrt(x_wide.square().mean(axes, keepdim=True) + ctx.eps)
            x_hat = x_wide * scale
            if ctx.needs_input_grad[0]:
                gw = g * weight.to(wide)
                dx = (scale * (gw - x_hat * (gw * x_hat).mean(axes, keepdim=True))).to(x.dtype)
            _record_affine(ctx, x_hat, g, ctx.shape, ctx.weight, None)
        return dx, None, None
