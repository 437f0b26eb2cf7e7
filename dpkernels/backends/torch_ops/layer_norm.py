"""LayerNorm and RMSNorm weights composed from PyTorch."""

import torch
from torch import Tensor

from dpkernels.backends.torch_ops.samples import frames_of, live, of_frames, own_frames, upper_of_sums


def _products(x_hat: Tensor, g: Tensor) -> Tensor:
    """x̂_t ⊙ g_t in the own frames of one sample, float64."""
    own = own_frames(x_hat, g)
    return of_frames(own, x_hat, torch.float64) * of_frames(own, g, torch.float64)


def layer_norm_norm_sq(x_hat: Tensor, g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖Σ_t x̂_it ⊙ g_it‖², in float64; see `dpkernels.ops.layer_norm_norm_sq`."""
    frames = frames_of(lengths, g.shape[0], g.shape[1])
    return upper_of_sums((_products(x_hat[i, :n], g[i, :n]) for i, n in enumerate(frames)), g)


def layer_norm_weighted_sum(
    x_hat: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """out += Σ_i c_i Σ_t x̂_it ⊙ g_it; see `dpkernels.ops.layer_norm_weighted_sum`."""
    frames = frames_of(lengths, g.shape[0], g.shape[1])
    total = torch.zeros_like(out, dtype=torch.float64)
    for i, c in live(factors):
        n = frames[i]
        total.add_((x_hat[i, :n].double() * g[i, :n].double()).sum(0), alpha=c)
    out += total
