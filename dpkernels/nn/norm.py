"""GhostLayerNorm, GhostRMSNorm and the frozen batch norms.

The gradients of a norm's weight and bias are vectors: Σ_t x̂_t ⊙ g_t and Σ_t g_t. They are summed over time
in float32 when the backward runs, and kept as [B,d]: T times less than x̂ and g, which need not be held for
them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dpkernels.nn.module import (
    GhostModule,
    accumulation_dtype,
    batch_first,
    named_modules,
    no_autocast,
)
from dpkernels.nn.records import BiasRecord, NormRecord


class GhostLayerNorm(GhostModule, nn.LayerNorm):
    """nn.LayerNorm: same constructor, same state_dict, same results; x [B,*,normalized_shape].

    The backward computes x̂, its sums and dx in float32 (float64 for float64), whatever the input's dtype.
    """

    ghost_forms = ("weight", "bias")

    def forward(self, input: Tensor) -> Tensor:
        """As nn.LayerNorm's."""
        if not self._ghost_active(self.weight, self.bias):
            return super().forward(input)
        return _LayerNorm.apply(input, self.weight, self.bias, self)


class GhostRMSNorm(GhostModule, nn.RMSNorm):
    """nn.RMSNorm: same constructor, same state_dict, same results; x [B,*,normalized_shape]."""

    ghost_covers = ghost_forms = ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        """As nn.RMSNorm's."""
        if not self._ghost_active(self.weight):
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self)


class FrozenBatchNorm(GhostModule, _BatchNorm):
    """Batch norm that always normalises with its running statistics, in training mode too, and never
    updates them.

    y = (x − mean)/√(var + ε)·weight + bias, so that one sample's output does not depend on its batch-mates.
    The weight and bias can be trained. Same state_dict as the batch norm that it replaces; made by
    `freeze_batch_norm`.

    Raises ValueError at the forward when there are no running statistics (track_running_stats=False).
    """

    ghost_channels_second = True

    ghost_forms = ("weight", "bias")

    def forward(self, input: Tensor) -> Tensor:
        """input [B,C,*] (or [B,C]) -> the same shape."""
        if self.running_mean is None or self.running_var is None:
            raise ValueError(
                f"{self.ghost_label()}: a batch norm without running statistics cannot be frozen; "
                "use track_running_stats=True, or another norm"
            )
        self._check_input_dim(input)
        if self._ghost_active(self.weight, self.bias):
            return _FrozenBatchNorm.apply(input, self.weight, self.bias, self)
        return self._normalise(input, self.weight, self.bias)

    def _normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)


class FrozenBatchNorm1d(FrozenBatchNorm, nn.BatchNorm1d):
    """FrozenBatchNorm for [B,C] and [B,C,T]."""


class FrozenBatchNorm2d(FrozenBatchNorm, nn.BatchNorm2d):
    """FrozenBatchNorm for [B,C,H,W]."""


class FrozenBatchNorm3d(FrozenBatchNorm, nn.BatchNorm3d):
    """FrozenBatchNorm for [B,C,D,H,W]."""


_FROZEN: dict[type[nn.Module], type[FrozenBatchNorm]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
}


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """BatchNorm1d/2d/3d -> FrozenBatchNorm1d/2d/3d, in place; returns `model`.

    Raises ValueError naming a batch norm that cannot be frozen: no running statistics, or a class of its own
    (SyncBatchNorm: convert it first; it has no meaning with frozen statistics).
    """
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, FrozenBatchNorm):
            continue
        reason = freezing_refusal(module)
        if reason is not None:
            raise ValueError(f"freeze_batch_norm: {name} ({type(module).__name__}): {reason}")
        module.__class__ = _FROZEN[type(module)]
    return model


def freezing_refusal(module: _BatchNorm) -> str | None:
    """Why this batch norm cannot be frozen, with the fix; None where it can."""
    if type(module) not in _FROZEN:
        return "a class of its own; replace it by nn.BatchNorm*d"
    if module.running_mean is None:
        return "no running statistics (track_running_stats=False); use track_running_stats=True"
    return None


def batch_norms_in_training(model: nn.Module) -> list[str]:
    """Names of the batch norms that mix the samples of a batch: in training mode, or without statistics."""
    return [name for name, module in named_modules(model) if mixes_samples(module)]


def mixes_samples(module: nn.Module) -> bool:
    """Whether it is a batch norm in training mode, or without statistics."""
    return (
        isinstance(module, _BatchNorm)
        and not isinstance(module, FrozenBatchNorm)
        and (module.training or module.running_mean is None)
    )


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
    """Put a layer or RMS norm's per-sample gradients on the tape; g and x_hat in the accumulation dtype."""
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
        # torch's default is the machine ε of the type it computes in, not of x's; given, so that the two agree
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


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: FrozenBatchNorm) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer, ctx.weight, ctx.bias = layer.ghost_tape, layer, weight, bias
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )
        return layer._normalise(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 4
        x, weight = ctx.saved_tensors
        layer, dx = ctx.layer, None
        with no_autocast(g.device.type):
            wide = accumulation_dtype(g)
            channels = (1, -1, *(1,) * (g.dim() - 2))
            scale = torch.rsqrt(layer.running_var.to(wide) + layer.eps)
            if ctx.needs_input_grad[0]:
                dx = (g * (scale * weight.to(wide)).view(channels)).to(g.dtype)
            over_time = g.to(wide).flatten(2) if g.dim() > 2 else g.to(wide).unsqueeze(2)
            if x is not None:
                x_hat = (x.to(wide) - layer.running_mean.to(wide).view(channels)) * scale.view(channels)
                total = (x_hat.view(over_time.shape) * over_time).sum(2)
                ctx.tape.add(NormRecord(layer.ghost_label(), ctx.weight, total))
            if ctx.bias is not None and ctx.needs_input_grad[2]:
                ctx.tape.add(BiasRecord(layer.ghost_label(), ctx.bias, over_time.sum(2)))
        return dx, None, None, None
