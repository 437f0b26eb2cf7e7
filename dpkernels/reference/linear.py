"""Definition of the linear ops: the gradient of sample i is G_i = Σ_t g_it x_itᵀ, shape [p, d]."""

import torch
from torch import Tensor

from dpkernels.reference._definitions import definition
from dpkernels.reference._samples import live, own_frames, round_up


def _gradient(x: Tensor, g: Tensor, frames: int) -> Tensor:
    return g[:frames].double().T @ x[:frames].double()


@definition
def linear_norm_sq(x: Tensor, g: Tensor, *, lengths: Tensor | None = None, method: str = "auto") -> Tensor:
    """‖G_i‖² in float64, rounded up to float32. `method` has no effect here."""
    frames = own_frames(lengths, x.shape[0], x.shape[1])
    return round_up([_gradient(x[i], g[i], n).square().sum() for i, n in enumerate(frames)], x)


@definition
def linear_weighted_sum(
    x: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """out += Σ_i c_i G_i, summed in float64."""
    frames = own_frames(lengths, x.shape[0], x.shape[1])
    total = torch.zeros_like(out, dtype=torch.float64)
    for i, c in live(factors):
        total += c * _gradient(x[i], g[i], frames[i])
    out += total
