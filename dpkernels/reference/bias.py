"""Definition of the bias ops: the gradient of sample i is Σ_t g_it, shape [p]."""

import torch
from torch import Tensor

from dpkernels.reference._definitions import definition
from dpkernels.reference._samples import live, own_frames, round_up


def _gradient(g: Tensor, frames: int) -> Tensor:
    return g[:frames].double().sum(0)


@definition
def bias_norm_sq(g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖Σ_t g_it‖² in float64, rounded up to float32."""
    frames = own_frames(lengths, g.shape[0], g.shape[1])
    return round_up([_gradient(g[i], n).square().sum() for i, n in enumerate(frames)], g)


@definition
def bias_weighted_sum(g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None) -> None:
    """out += Σ_i c_i Σ_t g_it, summed in float64."""
    frames = own_frames(lengths, g.shape[0], g.shape[1])
    total = torch.zeros_like(out, dtype=torch.float64)
    for i, c in live(factors):
        total += c * _gradient(g[i], frames[i])
    out += total
