"""The ops composed from PyTorch: sound and reasonably fast on any device, the fallback without native code.

Every sample is computed by calls whose shapes, strides and alignment depend on that sample alone: BLAS and
torch's reductions choose their order by shape, alignment and thread count, so a batched product or sum could
give one sample other bits next to other examples. Linear gradients are made in blocks of `TILE` entries
and CHUNK frames, never as one [p, d] or [B, p, d]. Bounds and their derivation: `dpkernels.backends.bounds`.
"""

import math
import sys
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

from dpkernels.backends.bounds import (
    CHUNK,
    SLACK,
    exact_products,
    gamma,
    product_error,
    round_down,
    row_norms,
    unit_roundoff,
    upper_square,
)

TILE = 1 << 18
"""Entries in a block of one sample's gradient: 1 MiB of float32, 2 MiB of float64, to stay in cache."""

GRAM_ROWS = 256
"""Frames in one block of rows of a Gram matrix."""

GRAM_BELOW = 0.4
"""`auto` takes the Gram form when T < GRAM_BELOW · 2pd/(p+d).

By FLOPs the factor would be 1; this Gram is float64, at half the rate or less, and in narrow products.
Measured on 2 cores (AVX-512, MKL), d = p = 1024: T = 188 Gram 8.1 ms, direct 13.8 ms; T = 750 Gram 73 ms,
direct 36 ms.
"""


def _frames(lengths: Tensor | None, batch: int, frames: int) -> list[int]:
    return [frames] * batch if lengths is None else [int(n) for n in lengths.tolist()]


def _live(factors: Tensor) -> Iterator[tuple[int, float]]:
    """(sample, factor) of the samples with a factor other than 0; the others are not read."""
    return ((i, c) for i, c in enumerate(factors.tolist()) if c != 0.0)


def _sample(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """One sample as a contiguous matrix, aligned as a fresh allocation is, from anywhere in a batch."""
    matrix = rows.to(dtype).contiguous()
    return matrix.clone() if matrix.data_ptr() % 64 else matrix


def _vector(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values) if values else like.new_zeros(0, dtype=torch.float64)


def _square(values: Tensor) -> Tensor:
    """Σ values² in float64, as a 0-d tensor."""
    wide = values.double().flatten()
    return torch.dot(wide, wide)


def _product(x: Tensor, g: Tensor) -> Tensor:
    """gᵀx [p, d] of one sample's x [L, d] and g [L, p], by CHUNK frames, the pieces added in float64."""
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
        total += _square(_product(x, g[:, a : a + rows]))
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


def _linear_square(x: Tensor, g: Tensor, method: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(‖Ĝ‖², e) of one sample, both 0-d float64.

    The Gram form is computed in float64: products of float32 entries are exact there, and its bound on the
    square, (γ_d + γ_p + 6γ_T)·S² with u = 2⁻⁵³, is below γ_CHUNK²·S² in float32, the least that direct could
    state. A float32 Gram would be too loose for all but short samples (2γ_1024·S² is 2 % of the square at T =
    188), and every sample would be computed twice. So no sample needs to be redone by direct.
    """
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
            _linear_square(_sample(x[i, :n], dtype), _sample(g[i, :n], dtype), method, dtype)
            for i, n in enumerate(_frames(lengths, x.shape[0], x.shape[1]))
        ]
        return upper_square(_vector([s for s, _ in pairs], x), _vector([e for _, e in pairs], x))


def _add_linear(
    x: Tensor,
    g: Tensor,
    factors: Tensor,
    out: Tensor,
    lengths: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> None:
    """out += scaling · Σ_i c_i g_iᵀx_i; the factors multiply float64 values: no float32 rounding."""
    frames = _frames(lengths, x.shape[0], x.shape[1])
    rows = max(1, TILE // max(1, x.shape[2]))
    for a in range(0, g.shape[2], rows):
        tile = out[a : a + rows]
        total = tile if tile.dtype == torch.float64 else torch.zeros_like(tile, dtype=torch.float64)
        for i, c in _live(factors):
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
        _add_linear(x, g, factors, out, lengths, 1.0, dtype)


def lora_norm_sq(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(‖dh_iᵀx_i‖², s²‖g_iᵀh_i‖²), both direct; see `dpkernels.ops.lora_norm_sq`."""
    squares: list[Tensor] = []
    errors: list[Tensor] = []
    with exact_products(x) as dtype:
        for i, n in enumerate(_frames(lengths, x.shape[0], x.shape[1])):
            for wide, narrow, scale in ((x, dh, 1.0), (g, h, scaling)):
                square, error = _linear_square(
                    _sample(wide[i, :n], dtype), _sample(narrow[i, :n], dtype), "direct", dtype
                )
                squares.append(square * (scale * scale))
                errors.append(error * abs(scale))
    upper = upper_square(_vector(squares, x), _vector(errors, x)).view(-1, 2)
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
        _add_linear(x, dh, factors, out_a, lengths, 1.0, dtype)
        _add_linear(h, g, factors, out_b, lengths, scaling, dtype)


def lora_gradients(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """dh_iᵀx_i and s g_iᵀh_i; see `dpkernels.ops.lora_gradients`."""
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, h, g, dh = (t.to(dtype) for t in (x, h, g, dh))
        return torch.bmm(dh.mT, x), torch.bmm(g.mT, h).mul_(scaling)


def _upper_in_float64(
    values: list[Tensor], terms: list[Tensor], roundings: list[int], like: Tensor
) -> Tensor:
    """‖values_i‖² rounded up, for float64 sums of `roundings` terms whose norms add up to at most `terms`.

    Twice γ: the norm's own rounding and the weighted sum's, both float64; what float32 inputs leave is 10⁻¹³
    of the terms.
    """
    bounds = [2.0 * gamma(n + 4, torch.float64) * SLACK * t for n, t in zip(roundings, terms, strict=True)]
    return upper_square(_vector([_square(v) for v in values], like), _vector(bounds, like))


def _sum_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ_t rows_t, a bound ≥ Σ_t ‖rows_t‖ by Cauchy and Schwarz) of float64 rows [L, p]."""
    return rows.sum(0), _square(rows).sqrt() * math.sqrt(len(rows))


def bias_norm_sq(g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖Σ_t g_it‖², summed in float64; see `dpkernels.ops.bias_norm_sq`."""
    frames = _frames(lengths, g.shape[0], g.shape[1])
    sums = [_sum_of_rows(_sample(g[i, :n], torch.float64)) for i, n in enumerate(frames)]
    return _upper_in_float64([s for s, _ in sums], [t for _, t in sums], frames, g)


def bias_weighted_sum(g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None) -> None:
    """out += Σ_i c_i Σ_t g_it; see `dpkernels.ops.bias_weighted_sum`."""
    frames = _frames(lengths, g.shape[0], g.shape[1])
    total = torch.zeros_like(out, dtype=torch.float64)
    for i, c in _live(factors):
        total.add_(g[i, : frames[i]].sum(0, dtype=torch.float64), alpha=c)
    out += total


def layer_norm_norm_sq(x_hat: Tensor, g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖Σ_t x̂_it ⊙ g_it‖², in float64; see `dpkernels.ops.layer_norm_norm_sq`."""
    frames = _frames(lengths, g.shape[0], g.shape[1])
    sums = [
        _sum_of_rows(_sample(x_hat[i, :n], torch.float64) * _sample(g[i, :n], torch.float64))
        for i, n in enumerate(frames)
    ]
    return _upper_in_float64([s for s, _ in sums], [t for _, t in sums], frames, g)


def layer_norm_weighted_sum(
    x_hat: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """out += Σ_i c_i Σ_t x̂_it ⊙ g_it; see `dpkernels.ops.layer_norm_weighted_sum`."""
    frames = _frames(lengths, g.shape[0], g.shape[1])
    total = torch.zeros_like(out, dtype=torch.float64)
    for i, c in _live(factors):
        n = frames[i]
        total.add_((x_hat[i, :n].double() * g[i, :n].double()).sum(0), alpha=c)
    out += total


def _kept(ids: Tensor, g: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
    """The ids that are not padding, and their rows of g."""
    if padding_idx is None or padding_idx < 0:
        return ids, g
    keep = ids != padding_idx
    return ids[keep], g[keep]


def _rows_by_id(ids: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(distinct ids, g summed over equal ones [distinct, d])."""
    distinct, place = ids.unique(return_inverse=True)
    return distinct, g.new_zeros(len(distinct), g.shape[1]).index_add_(0, place, g)


def embedding_norm_sq(ids: Tensor, g: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Σ_v ‖Σ_{t: ids_it = v} g_it‖², in float64; see `dpkernels.ops.embedding_norm_sq`."""
    values, terms, roundings = [], [], []
    for i in range(len(ids)):
        rows, kept = _kept(ids[i], g[i], padding_idx)
        wide = _sample(kept, torch.float64)
        values.append(_rows_by_id(rows, wide)[1])
        terms.append(_square(wide).sqrt() * math.sqrt(len(rows)))
        roundings.append(len(rows))
    return _upper_in_float64(values, terms, roundings, g)


def embedding_weighted_sum(
    ids: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, padding_idx: int | None = None
) -> None:
    """out[v] += Σ_i c_i Σ_{t: ids_it = v} g_it; see `dpkernels.ops.embedding_weighted_sum`."""
    kept = [(c, *_kept(ids[i], g[i], padding_idx)) for i, c in _live(factors)]
    if not kept:
        return
    # only the rows that occur: a float64 copy of a whole vocabulary would dwarf the step
    distinct = torch.cat([rows for _, rows, _ in kept]).unique()
    total = out.new_zeros(len(distinct), out.shape[1], dtype=torch.float64)
    for c, rows, values in kept:
        # a sample's own tokens first: what cancels among them never rounds a neighbour's share
        own, sums = _rows_by_id(rows, values.double())
        total.index_add_(0, torch.searchsorted(distinct, own), sums, alpha=c)
    out.index_add_(0, distinct, total.to(out.dtype))


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
        wide_x, wide_g = _sample(x[i], torch.float64), _sample(g[i], torch.float64)
        values.append(_taps(wide_x, wide_g, kernel_size, stride, padding, dilation))
        # one tap of one channel is off by at most γ‖x_c‖‖g_c‖
        terms.append(torch.linalg.vector_norm(row_norms(wide_x) * row_norms(wide_g)) * math.sqrt(kernel_size))
    return _upper_in_float64(values, terms, [g.shape[2]] * len(x), x)


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
    for i, c in _live(factors):
        total[:, 0].add_(
            _taps(x[i].double(), g[i].double(), out.shape[2], stride, padding, dilation), alpha=c
        )
    out += total


def _square_rounded_down(value: float) -> float:
    square = min(value * value, sys.float_info.max)
    return square if Fraction(square) <= Fraction(value) ** 2 else math.nextafter(square, 0.0)


def clip_factors(norm_sq: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, C/√norm_sq) rounded down; see `dpkernels.ops.clip_factors`."""
    square = norm_sq.double()
    # √ and ÷ round by 2⁻⁵³ each, and the product once more: 2⁻⁵⁰ covers them before the rounding to float32
    factor = (max_grad_norm / square.sqrt() * (1.0 - 2.0**-50)).clamp_max(1.0)
    limit = _square_rounded_down(max_grad_norm)
    factor = torch.where(square <= limit, torch.ones_like(factor), factor)
    usable = square.isfinite() & (square >= 0.0)
    return torch.where(
        usable, round_down(factor), torch.zeros((), dtype=torch.float32, device=norm_sq.device)
    )
