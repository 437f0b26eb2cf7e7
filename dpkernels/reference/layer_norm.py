"""Definition of the LayerNorm and RMSNorm weight ops: sample i's gradient is Σ_t x̂_it ⊙ g_it [d]."""

import torch
from torch import Tensor

from dpkernels.reference._definitions import definition
from dpkernels.reference._samples import live, own_frames, round_up


def _gradient(x_hat: Tensor, g: Tensor, frames: int) -> Tensor:
    return (x_hat[:frames].double() * g[:frames].double()).sum(0)


@definition
def layer_norm_norm_sq(x_hat: Tensor, g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖Σ_t x̂_it ⊙ g_it‖² in float64, rounded up to float32."""
    frames = own_frames(lengths, g.shape[0], g.shape[1])
    return round_up([_gradient(x_hat[i], g[i], n).square().sum() for i, n in enumerate(frames)], g)


@definition
def layer_norm_weighted_sum(
    x_hat: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """out += Σ_i c_i Σ_t x̂_it ⊙ g_it, summed in float64."""
    frames = own_frames(lengths, g.shape[0], g.shape[1])
    total = torch.zeros_like(out, dtype=torch.float64)
    for i, c in live(factors):
        total += c * _gradient(x_hat[i], g[i], frames[i])
    out += total
