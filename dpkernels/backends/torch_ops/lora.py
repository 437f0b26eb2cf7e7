"""LoRA composed from PyTorch."""

import torch
from torch import Tensor

from dpkernels.backends.bounds import exact_products, upper_square
from dpkernels.backends.torch_ops.linear import add_linear, linear_square
from dpkernels.backends.torch_ops.samples import frames_of, vector


def lora_norm_sq(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(‖dh_iᵀx_i‖², s²‖g_iᵀh_i‖²), both direct; see `dpkernels.ops.lora_norm_sq`."""
    squares: list[Tensor] = []
    errors: list[Tensor] = []
    with exact_products(x) as dtype:
        for i, n in enumerate(frames_of(lengths, x.shape[0], x.shape[1])):
            for wide, narrow, scale in ((x, dh, 1.0), (g, h, scaling)):
                square, error = linear_square(wide[i, :n], narrow[i, :n], "direct", dtype)
                squares.append(square * (scale * scale))
                errors.append(error * abs(scale))
    upper = upper_square(vector(squares, x), vector(errors, x)).view(-1, 2)
    return upper[:, 0].contiguous(), upper[:, 1].contiguous()


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
    """out_a += Σ_i c_i dh_iᵀx_i, out_b += s Σ_i c_i g_iᵀh_i; see `dpkernels.ops.lora_weighted_sum`."""
    with exact_products(x) as dtype:
        add_linear(x, dh, factors, out_a, lengths, 1.0, dtype)
        add_linear(h, g, factors, out_b, lengths, scaling, dtype)


def lora_gradients(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """dh_iᵀx_i and s g_iᵀh_i; see `dpkernels.ops.lora_gradients`."""
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, h, g, dh = (t.to(dtype) for t in (x, h, g, dh))
        return torch.bmm(dh.mT, x), torch.bmm(g.mT, h).mul_(scaling)
