"""Rounding: by how much a computed norm may fall below the exact one, and the guard against reduced precision.

**γ for an unknown order.** Let u be the unit roundoff (2⁻²⁴ for float32, 2⁻⁵³ for float64) and z = Σ_{t<n}
a_t b_t be computed with n products and n−1 additions *in any order*, fused or not, blocked or vectorised.
Each product and each addition multiplies its result by (1+δ), |δ| ≤ u; a term passes through its
product and at most n−1 additions, so the computed value is Σ a_t b_t (1+θ_t) with |θ_t| ≤ (1+u)ⁿ − 1 ≤ γ_n :=
nu/(1−nu) for nu < 1, and

    |fl(z) − z| ≤ γ_n Σ_t |a_t||b_t|.

The bound assumes no order, so it holds for every BLAS algorithm except Strassen-like ones (which neither MKL, oneDNN,
OpenBLAS nor cuBLAS use for these products).

**κ, from one entry to the norm.** For G = Σ_t g_t x_tᵀ the matrix of the entries' errors is below γ_n Σ_t
|g_t||x_t|ᵀ entry by entry, whose Frobenius norm is at most γ_n Σ_t ‖g_t‖‖x_t‖ = γ_n S. So a computed Ĝ has
|‖Ĝ‖ − ‖G‖| ≤ γ_n S, and the Ĝ' that the weighted sum computes for the same sample has ‖Ĝ'‖ ≤ ‖G‖ + γ_n S ≤
‖Ĝ‖ + 2γ_n S. Adding one rounding for c·Ĝ' (or c·g), with ‖Ĝ'‖ ≤ (1+γ_n) S,

    upper = (‖Ĝ‖ + e)²,   e = (γ_norm + γ_sum + 2u) S =: κ u S.

Here n is the number of the sample's own frames in one float32 accumulation, at most `CHUNK`: longer samples are cut,
and the pieces are added in float64, where the same argument gives γ of the number of additions with u = 2⁻⁵³.

**Own frames.** A frame in which x or g is 0 (padding, wherever it is) adds exact zeros: a product of 0, and an addition
of 0, round nothing. So a term of L own frames meets min(L, CHUNK) roundings in its piece at most, and L additions of
pieces, however many other frames the sum runs over and whichever pieces they fill: `product_error` takes L alone, and
the bound of a norm does not grow with the batch's longest sample.

**Underflow.** A float32 product or sum below 2⁻¹²⁶ may lose up to 2⁻¹²⁶ (flushed). That adds at most 2L·2⁻¹²⁶
to an entry, `2L·2⁻¹²⁶·√(pd)` to the norm, which is in e unless S = 0 (all products are exact zeros then).

Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms (2nd ed.), lemma 3.1 and section 3.1.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

CHUNK = 128
"""Frames in one float32 accumulation. A larger value increases κ and decreases the share of float64 additions."""

SLACK = 1.0 + 2.0**-40
"""Covers the float64 rounding of the bounds, which are chains of fewer than 2¹⁰ operations."""

_TINY = 2.0**-126


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return u of the dtype in which products are accumulated."""
    return torch.finfo(dtype).eps / 2


def gamma(n: int, dtype: torch.dtype) -> float:
    """Return γ_n = nu/(1−nu), the relative error bound of an accumulation of n products in any order."""
    nu = n * unit_roundoff(dtype)
    if nu >= 0.5:
        raise ValueError(
            f"n: given {n} roundings in {dtype}, for which there is no bound; accumulate in pieces or in float64"
        )
    return nu / (1.0 - nu)


def product_error(frames: int, entries: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return the bound on ‖Ĝ − G‖, as (relative to S, absolute), of a gradient of `entries` over own `frames`."""
    relative = gamma(min(frames, CHUNK), dtype) + gamma(frames + 1, torch.float64)
    return relative * SLACK, 2.0 * frames * _TINY * math.sqrt(entries)


def upper_square(square: Tensor, error: Tensor) -> Tensor:
    """(√square + error)² as float32, rounded up.

    Args:
        square: [B] float64, the computed ‖Ĝ_i‖².
        error: [B] float64, e_i ≥ 0, the bound on the error of the norm.

    Returns:
        [B] float32; NaN and infinity are kept, and 0 with error 0 is 0.
    """
    return round_up(((square.sqrt() + error).square()) * SLACK)


def round_up(exact: Tensor) -> Tensor:
    """Round float64 to the nearest float32 that is not below it."""
    nearest = exact.float()
    return torch.where(nearest < exact, nearest.nextafter(nearest.new_tensor(torch.inf)), nearest)


def round_down(exact: Tensor) -> Tensor:
    """Round float64 to the nearest float32 that is not above it."""
    nearest = exact.float()
    return torch.where(nearest > exact, nearest.nextafter(nearest.new_tensor(-torch.inf)), nearest)


def row_norms(rows: Tensor) -> Tensor:
    """Upper bounds of ‖row‖ for each row of a [n, m] float32 or float64 matrix, as float64 [n].

    Float32 squares underflow for entries below 2⁻⁶³ and overflow above 2⁶³, so such rows are computed in float64.
    """
    norms = torch.linalg.vector_norm(rows, dim=-1)
    wide = norms.double()
    if rows.dtype == torch.float32:
        extreme = ~((norms > 2.0**-40) & (norms < 2.0**60))
        if bool(extreme.any()):
            wide[extreme] = torch.linalg.vector_norm(rows[extreme].double(), dim=-1)
    # entries below 2⁻⁶³ in a row above 2⁻⁴⁰ lose at most m·2⁻¹²⁶ of a square ≥ 2⁻⁸⁰: inside the +2
    return wide * (1.0 + gamma(rows.shape[-1] + 2, rows.dtype)) * SLACK


def reduced_precision(device_type: str) -> bool:
    """Whether torch may compute float32 matrix products with fewer bits (TF32, bfloat16) on such a device.

    True under torch.set_float32_matmul_precision("high" or "medium"), torch.backends.cuda.matmul.allow_tf32 and
    torch.backends.*.fp32_precision, and for device types whose setting is unknown.
    """
    if device_type == "cpu":
        return torch.backends.mkldnn.matmul.fp32_precision not in ("none", "ieee")  # type: ignore[attr-defined]
    if device_type == "cuda":
        return torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")
    return True


@contextmanager
def exact_products(like: Tensor) -> Iterator[torch.dtype]:
    """Context in which products of the yielded dtype round to that dtype under any precision settings.

    Autocast, a per-thread setting, would turn float32 products into bfloat16 ones, so the context disables it. The
    process-wide precision settings are *read*, not changed: if they permit TF32 or bfloat16, the products are
    computed in float64, which no setting affects. So two threads in this context, or one here and one training,
    cannot undo each other's guard. A setting that another thread changes during a call goes undetected.

    Yields:
        float64 for float64 inputs or under a reduced-precision setting, otherwise float32.
    """
    wide = like.dtype == torch.float64 or reduced_precision(like.device.type)
    with torch.autocast(like.device.type, enabled=False):
        yield torch.float64 if wide else torch.float32
