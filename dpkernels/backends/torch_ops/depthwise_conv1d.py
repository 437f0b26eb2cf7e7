"""Depthwise conv1d composed from PyTorch."""

import math

import torch
from torch import Tensor

from dpkernels.backends.bounds import row_norms
from dpkernels.backends.torch_ops.samples import live, sample, upper_in_float64


def _taps(x: Tensor, g: Tensor, kernel_size: int, stride: int, padding: int, dilation: int) -> Tensor:
    """Σ_t g_ct x_c(t·stride + j·dilation − padding) of float64 x [C, T] and g [C, T']: [C, k]."""
    padded = torch.nn.functional.pad(x, (padding, padding))
    reach = stride * (g.shape[1] - 1) + 1 if g.shape[1] else 0
    taps = [(padded[:, j * dilation : j * dilation + reach : stride] * g).sum(1) for j in range(kernel_size)]
    return torch.stack(taps, 1)


def depthwise_conv1d_norm_sq(
    x: Tensor, g: Tensor, *, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    """‖Σ_t g_ct x_ct'‖² over c and j, in float64; see `dpkernels.ops.depthwise_conv1d_norm_sq`."""
    values, terms = [], []
    for i in range(len(x)):
        wide_x, wide_g = sample(x[i], torch.float64), sample(g[i], torch.float64)
        values.append(_taps(wide_x, wide_g, kernel_size, stride, padding, dilation))
        # the error of one tap of one channel is at most γ‖x_c‖‖g_c‖
        terms.append(torch.linalg.vector_norm(row_norms(wide_x) * row_norms(wide_g)) * math.sqrt(kernel_size))
    return upper_in_float64(values, terms, [g.shape[2]] * len(x), x)


def depthwise_conv1d_weighted_sum(
    x: Tensor,
    g: Tensor,
    factors: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> None:
    """out[c, 0, j] += Σ_i c_i Σ_t g_ict x_ict'; see `dpkernels.ops.depthwise_conv1d_weighted_sum`."""
    total = torch.zeros_like(out, dtype=torch.float64)
    for i, c in live(factors):
        total[:, 0].add_(
            _taps(x[i].double(), g[i].double(), out.shape[2], stride, padding, dilation), alpha=c
        )
    out += total
