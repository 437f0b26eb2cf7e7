"""Definition of the LoRA ops: y += s (x Aᵀ) Bᵀ, h = x Aᵀ, dh = s g B; gradients dhᵀx of A and s gᵀh of B."""

import torch
from torch import Tensor

from dpkernels.reference._definitions import definition
from dpkernels.reference.linear import linear_norm_sq, linear_weighted_sum


@definition
def lora_norm_sq(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(‖dhᵀx‖², s²‖gᵀh‖²) of each sample in float64, rounded up to float32: two linear layers' norms."""
    scaled = g.double() * scaling
    return linear_norm_sq(x, dh, lengths=lengths), linear_norm_sq(h.double(), scaled, lengths=lengths)


@definition
def lora_gradients(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(dhᵀx, s·gᵀh) of each sample in float64, rounded to float32 unless the inputs are float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    of_a, of_b = dh.double().mT @ x.double(), scaling * (g.double().mT @ h.double())
    return of_a.to(dtype), of_b.to(dtype)


@definition
def lora_weighted_sum(
    x: Tensor,
    h: Tensor,
    g: Tensor,
    dh: Tensor,
    factors: Tensor,
    out_a: Tensor,
    out_b: Tensor,
    *,
    scaling: float = 1.0,
    lengths: Tensor | None = None,
) -> None:
    """out_a += Σ_i c_i dh_iᵀx_i and out_b += s Σ_i c_i g_iᵀh_i, summed in float64."""
    linear_weighted_sum(x, dh, factors, out_a, lengths=lengths)
    unscaled = torch.zeros_like(out_b, dtype=torch.float64)
    linear_weighted_sum(h, g, factors, unscaled, lengths=lengths)
    out_b += scaling * unscaled
