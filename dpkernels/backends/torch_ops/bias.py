"""Biases composed from PyTorch."""

import torch
from torch import Tensor

from dpkernels.backends.torch_ops.samples import frames_of, live, of_frames, own_frames, upper_of_sums


def bias_norm_sq(g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖Σ_t g_it‖², summed in float64; see `dpkernels.ops.bias_norm_sq`."""
    samples = (g[i, :n] for i, n in enumerate(frames_of(lengths, g.shape[0], g.shape[1])))
    return upper_of_sums((of_frames(own_frames(rows), rows, torch.float64) for rows in samples), g)


def bias_weighted_sum(g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None) -> None:
    """out += Σ_i c_i Σ_t g_it; see `dpkernels.ops.bias_weighted_sum`."""
    frames = frames_of(lengths, g.shape[0], g.shape[1])
    total = torch.zeros_like(out, dtype=torch.float64)
    for i, c in live(factors):
        total.add_(g[i, : frames[i]].sum(0, dtype=torch.float64), alpha=c)
    out += total
