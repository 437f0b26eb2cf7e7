"""Definition of the depthwise conv1d ops: the gradient is Σ_t g_ict x_ic(t·stride + j·dilation − padding)."""

import torch
from torch import Tensor

from dpkernels.reference._definitions import definition
from dpkernels.reference._samples import live, round_up


def _gradient(x: Tensor, g: Tensor, kernel_size: int, stride: int, padding: int, dilation: int) -> Tensor:
    """[C, k]; frames outside x are zeros."""
    padded = torch.nn.functional.pad(x.double(), (padding, padding))
    reach = stride * (g.shape[1] - 1) + 1 if g.shape[1] else 0
    taps = [padded[:, j * dilation : j * dilation + reach : stride] * g.double() for j in range(kernel_size)]
    return torch.stack(taps, 1).sum(-1)


@definition
def depthwise_conv1d_norm_sq(
    x: Tensor, g: Tensor, *, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    """Σ_cj of the gradient's squares in float64, rounded up to float32."""
    grads = (_gradient(x[i], g[i], kernel_size, stride, padding, dilation) for i in range(len(x)))
    return round_up([grad.square().sum() for grad in grads], x)


@definition
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
    """out[c, 0, j] += Σ_i c_i of sample i's gradient, summed in float64."""
    total = torch.zeros_like(out, dtype=torch.float64)
    for i, c in live(factors):
        total[:, 0] += c * _gradient(x[i], g[i], out.shape[-1], stride, padding, dilation)
    out += total
