"""GhostGroupNorm and the ghost instance norms: norms over groups of channels of one example.

The gradients of weight and bias are Σ_t x̂_ct g_ct and Σ_t g_ct for channel c. As in the layer norms, the backward sums
them over space in float32 and keeps them as [B,C].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.instancenorm import _InstanceNorm

from dpkernels.nn.recording.module import GhostModule
from dpkernels.nn.recording.records import BiasRecord, NormRecord
from dpkernels.nn.tensors import accumulation_dtype, no_autocast


class GhostGroupNorm(GhostModule, nn.GroupNorm):
    """nn.GroupNorm: same constructor, same state_dict, same results; x [B,C,*].

    The backward computes x̂, its sums and dx in float32 (float64 for float64), whatever the input's dtype.
    """

    ghost_channels_second = True
    ghost_in_graph = True

    def forward(self, input: Tensor) -> Tensor:
        """As nn.GroupNorm's."""
        if not self._ghost_active(self.weight, self.bias):
            return super().forward(input)
        return _GroupNorm.apply(input, self.weight, self.bias, self, self.num_groups)

    def _normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class _GhostInstanceNorm(GhostModule, _InstanceNorm):
    """Base of the three instance norms: an instance norm is a group norm whose groups are the channels."""

    ghost_channels_second = True
    ghost_in_graph = True

    def ghost_refusal(self) -> str | None:
        """Refuse track_running_stats."""
        if self.track_running_stats:
            return (
                "track_running_stats=True keeps means over the batch; build the layer with track_running_stats=False, "
                "or freeze it and leave it in evaluation mode"
            )
        return None

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        """torch's forward calls this with an input that has a batch dimension."""
        if not self._ghost_active(self.weight, self.bias):
            return super()._apply_instance_norm(input)
        return _GroupNorm.apply(input, self.weight, self.bias, self, input.shape[1])

    def _normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.instance_norm(x, None, None, weight, bias, True, 0.0, self.eps)


class GhostInstanceNorm1d(_GhostInstanceNorm, nn.InstanceNorm1d):
    """nn.InstanceNorm1d(affine=True): same constructor, same state_dict, same results; x [B,C,T], or [C,T] for one
    example. track_running_stats is refused.
    """


class GhostInstanceNorm2d(_GhostInstanceNorm, nn.InstanceNorm2d):
    """nn.InstanceNorm2d(affine=True), x [B,C,H,W]; else as GhostInstanceNorm1d."""


class GhostInstanceNorm3d(_GhostInstanceNorm, nn.InstanceNorm3d):
    """nn.InstanceNorm3d(affine=True), x [B,C,D,H,W]; else as GhostInstanceNorm1d."""


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, layer: Any, groups: int
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer, ctx.eps, ctx.groups = layer.ghost_tape, layer.ghost_label(), layer.eps, groups
        ctx.weight, ctx.bias = weight, bias
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_x or needs_weight else None, weight if needs_x else None)
        y: Tensor = layer._normalise(x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 5
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = None
        with no_autocast(g.device.type):
            wide = accumulation_dtype(g)
            g = g.to(wide).contiguous()
            batch, channels = g.shape[:2]
            by_channel = g.view(batch, channels, -1)
            sizes = (batch, channels, by_channel.shape[2], ctx.groups)
            if x is not None:
                # One pass gives x̂, which the weight's gradient needs, and the statistics, which dx needs.
                x_wide = x.to(wide).contiguous()
                x_hat, mean, rstd = torch.native_group_norm(x_wide, None, None, *sizes, ctx.eps)
            if needs_x:
                scale = None if weight is None else weight.to(wide)
                dx, _, _ = torch.ops.aten.native_group_norm_backward(
                    g, x_wide, mean, rstd, scale, *sizes, [True, False, False]
                )
                dx = dx.to(x.dtype)
            if needs_weight:
                total = (x_hat.view(by_channel.shape) * by_channel).sum(2)
                ctx.tape.add(NormRecord(ctx.layer, ctx.weight, total))
            if needs_bias:
                ctx.tape.add(BiasRecord(ctx.layer, ctx.bias, by_channel.sum(2)))
        return dx, None, None, None, None
