"""Linear layers composed from PyTorch: gradients in blocks of `TILE` entries and CHUNK frames, never as one [p, d]."""

import torch
from torch import Tensor

from dpkernels.backends.bounds import (
    CHUNK,
    SLACK,
    exact_products,
    gamma,
    product_error,
    row_norms,
    unit_roundoff,
    upper_square,
)
from dpkernels.backends.torch_ops.samples import frames_of, live, of_frames, own_frames, square_of, vector

TILE = 1 << 18
"""Entries in a block of one sample's gradient: 1 MiB of float32 or 2 MiB of float64, which fits the cache."""

GRAM_ROWS = 256
"""Frames in one block of rows of a Gram matrix."""

GRAM_BELOW = 0.4
"""`auto` takes the Gram form of L own frames when L < GRAM_BELOW · 2pd/(p+d).

By FLOPs the factor would be 1, but this Gram form is computed in float64, at half the rate or less, in narrow products.
Measured on 2 cores (AVX-512, MKL), d = p = 1024: T = 188 Gram 8.1 ms, direct 13.8 ms; T = 750 Gram 73 ms,
direct 36 ms.
"""


def _product(x: Tensor, g: Tensor) -> Tensor:
    """gᵀx [p, d] of one sample's x [L, d] and g [L, p], by CHUNK frames, with the pieces added in float64."""
    if len(x) <= CHUNK:
        return g.T @ x
    total = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for t in range(0, len(x), CHUNK):
        total += g[t : t + CHUNK].T @ x[t : t + CHUNK]
    return total


def _direct_square(x: Tensor, g: Tensor) -> Tensor:
    """‖gᵀx‖², block by block of p."""
    rows = max(1, TILE // max(1, x.shape[1]))
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for a in range(0, g.shape[1], rows):
        total += square_of(_product(x, g[:, a : a + rows]))
    return total


def _gram_square(x: Tensor, g: Tensor) -> Tensor:
    """Σ_ts (x_t·x_s)(g_t·g_s) of float64 x and g, from blocks on and above the diagonal."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for a in range(0, len(x), GRAM_ROWS):
        b = a + GRAM_ROWS
        both = (x[a:b] @ x[a:].T).mul_(g[a:b] @ g[a:].T)
        total += 2.0 * both.sum(1).sum() - both[:, : len(both)].sum(1).sum()
    return total


def _uses_gram(method: str, frames: int, p: int, d: int) -> bool:
    return method == "gram" or (method == "auto" and frames * (p + d) < GRAM_BELOW * 2 * p * d)


def linear_square(x: Tensor, g: Tensor, method: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(‖Ĝ‖², e) of one sample's x [L, d] and g [L, p], both 0-d float64.

    Frames that add nothing are left out first, so that L, and with it the form and the bound, is the sample's own.

    The Gram form is computed in float64: products of float32 entries are exact there, and its bound on the
    square, (γ_d + γ_p + 6γ_T)·S² with u = 2⁻⁵³, is below γ_CHUNK²·S² in float32, the smallest bound of
    the direct form. So no sample needs a second computation by direct. A float32 Gram would be too loose for all but
    short samples (2γ_1024·S² is 2 % of the square at T = 188), and most samples would be computed twice.
    """
    own = own_frames(x, g)
    x, g = of_frames(own, x, dtype), of_frames(own, g, dtype)
    frames, p, d = len(x), g.shape[1], x.shape[1]
    of_sum, floor = product_error(frames, p * d, dtype)
    of_scaling = 2.0 * unit_roundoff(dtype)
    if _uses_gram(method, frames, p, d):
        x, g = x.double(), g.double()
        terms = torch.dot(row_norms(x), row_norms(g)) * SLACK
        square = _gram_square(x, g).clamp_min(0.0)
        square = square + gamma(d + p + 6 * frames + 16, torch.float64) * SLACK * terms.square()
        error = (of_sum + of_scaling) * terms
    else:
        terms = torch.dot(row_norms(x), row_norms(g)) * SLACK
        square = _direct_square(x, g)
        error = (2.0 * of_sum + of_scaling) * terms
        floor = 2.0 * floor
    return square, error + floor * (terms != 0.0)


def linear_norm_sq(x: Tensor, g: Tensor, *, lengths: Tensor | None = None, method: str = "auto") -> Tensor:
    """‖g_iᵀx_i‖², rounded up by the bound; see `dpkernels.ops.linear_norm_sq`."""
    with exact_products(x) as dtype:
        pairs = [
            linear_square(x[i, :n], g[i, :n], method, dtype)
            for i, n in enumerate(frames_of(lengths, x.shape[0], x.shape[1]))
        ]
        return upper_square(vector([s for s, _ in pairs], x), vector([e for _, e in pairs], x))


def add_linear(
    x: Tensor,
    g: Tensor,
    factors: Tensor,
    out: Tensor,
    lengths: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> None:
    """out += scaling · Σ_i c_i g_iᵀx_i; the factors multiply float64 values: no float32 rounding."""
    frames = frames_of(lengths, x.shape[0], x.shape[1])
    rows = max(1, TILE // max(1, x.shape[2]))
    for a in range(0, g.shape[2], rows):
        tile = out[a : a + rows]
        total = tile if tile.dtype == torch.float64 else torch.zeros_like(tile, dtype=torch.float64)
        for i, c in live(factors):
            for t in range(0, frames[i], CHUNK):
                end = min(t + CHUNK, frames[i])
                piece = g[i, t:end, a : a + rows].to(dtype).T @ x[i, t:end].to(dtype)
                total.add_(piece, alpha=c * scaling)
        if total is not tile:
            tile += total


def linear_weighted_sum(
    x: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """out += Σ_i c_i g_iᵀx_i; see `dpkernels.ops.linear_weighted_sum`."""
    with exact_products(x) as dtype:
        add_linear(x, g, factors, out, lengths, 1.0, dtype)
