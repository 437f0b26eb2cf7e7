"""LayerNorm and RMSNorm weights composed from PyTorch."""

import torch
from torch import Tensor

from dpkernels.backends.torch_ops.samples import frames_of, live, sample, sum_of_rows, upper_in_float64


def layer_norm_norm_sq(x_hat: Tensor, g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖Σ_t x̂_it ⊙ g_it‖², in float64; see `dpkernels.ops.layer_norm_norm_sq`."""
    frames = frames_of(lengths, g.shape[0], g.shape[1])
    sums = [
        sum_of_rows(sample(x_hat[i, :n], torch.float64) * sample(g[i, :n], torch.float64))
        for i, n in enumerate(frames)
    ]
    return upper_in_float64([s for s, _ in sums], [t for _, t in sums], frames, g)


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
