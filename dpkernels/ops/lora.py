"""LoRA: norms and weighted sums of both factors' per-sample gradients.

y += s (x Aᵀ) Bᵀ with A [r, d], B [p, r], h = x Aᵀ [B, T, r] and dh = s g B [B, T, r]: sample i's gradients
are dh_iᵀx_i [r, d] for A (dh holds the scaling s) and s g_iᵀh_i [p, r] for B.
"""

import torch
from torch import Tensor

from dpkernels.ops import _check, _library


def _check_values(
    x: Tensor,
    h: Tensor,
    g: Tensor,
    dh: Tensor,
    *rest: Tensor,
    scaling: float = 1.0,
    lengths: Tensor | None = None,
) -> None:
    _check.lengths_within(lengths, x.shape[1])


_norm_sq = _library.define(
    "lora_norm_sq",
    "(Tensor x, Tensor h, Tensor g, Tensor dh, *, float scaling=1.0, Tensor? lengths=None) "
    "-> (Tensor, Tensor)",
    fake=lambda x, h, g, dh, *, scaling=1.0, lengths=None: (_library.norms(x), _library.norms(x)),
    check=_check_values,
)
_weighted_sum = _library.define(
    "lora_weighted_sum",
    "(Tensor x, Tensor h, Tensor g, Tensor dh, Tensor factors, Tensor(a!) out_a, Tensor(b!) out_b, *, "
    "float scaling=1.0, Tensor? lengths=None) -> ()",
    fake=lambda x, h, g, dh, factors, out_a, out_b, *, scaling=1.0, lengths=None: None,
    check=_check_values,
)
_gradients = _library.define(
    "lora_gradients",
    "(Tensor x, Tensor h, Tensor g, Tensor dh, *, float scaling=1.0) -> (Tensor, Tensor)",
    fake=lambda x, h, g, dh, *, scaling=1.0: _empty_gradients(x, h, g),
)


def _empty_gradients(x: Tensor, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    batch, rank, dtype = x.shape[0], h.shape[2], torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(batch, rank, x.shape[2], dtype=dtype),
        x.new_empty(batch, g.shape[2], rank, dtype=dtype),
    )


def check_norm(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0, lengths: Tensor | None = None
) -> None:
    """Check x [B, T, d], h and dh [B, T, r], g [B, T, p] of one dtype on one device, finite scaling, and lengths."""
    _check.floats(x=x, h=h, g=g, dh=dh)
    _check.shape("x", x, (None, None, None), "[B, T, d]")
    batch, frames, _ = x.shape
    _check.shape("h", h, (batch, frames, None), "[B, T, r]")
    _check.shape("g", g, (batch, frames, None), "[B, T, p]")
    _check.shape("dh", dh, (batch, frames, h.shape[2]), "[B, T, r]")
    _check.finite("scaling", scaling)
    _check.lengths_of(lengths, x)


def check_sum(
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
    """Check the norm's arguments, factors float32 [B], out_a [r, d] and out_b [p, r]."""
    check_norm(x, h, g, dh, scaling=scaling, lengths=lengths)
    of_a, of_b = (h.shape[2], x.shape[2]), (g.shape[2], h.shape[2])
    _check.weighted_sum(factors, x, out_a=(out_a, of_a, "[r, d]"), out_b=(out_b, of_b, "[p, r]"))


def lora_norm_sq(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Squared norms of each sample's gradients of A and B, rounded up: ‖dh_iᵀx_i‖² and s²‖g_iᵀh_i‖².

    Args:
        x: [B, T, d] layer inputs; bfloat16, float16 or float32 (float64 in tests). B, T may be 0.
        h: [B, T, r] = x Aᵀ, same dtype.
        g: [B, T, p] gradients of the layer's output, same dtype.
        dh: [B, T, r] = s g B, same dtype; it includes the scaling.
        scaling: s, finite; 1 for an unscaled adapter.
        lengths: [B] int64, 0 ≤ L_i ≤ T: frames from L_i on are not read. None: all T.

    Returns:
        Two [B] float32 vectors, for A and for B, each not below the exact square, nor below the square of the
        gradient that `lora_weighted_sum` adds for the sample, divided by its factor.

    Raises:
        TypeError: dtypes differ or are not floating.
        ValueError: shapes, devices, scaling or lengths do not fit.

    Source: Hu et al. 2021, arXiv:2106.09685 (the layer); its gradients by the chain rule.
    """
    check_norm(x, h, g, dh, scaling=scaling, lengths=lengths)
    of_a, of_b = _norm_sq(x, h, g, dh, scaling=scaling, lengths=lengths)
    return of_a, of_b


def lora_gradients(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The materialised per-sample gradients: dh_iᵀx_i of A and s g_iᵀh_i of B.

    For r well below T they are smaller than x and g, and x and g are read only once. Norms and sums are then computed
    from the returned values, so this rounding needs no bound.

    Args:
        x: [B, T, d] layer inputs; bfloat16, float16 or float32 (float64 in tests). B, T may be 0.
        h: [B, T, r] = x Aᵀ, same dtype.
        g: [B, T, p] gradients of the layer's output, same dtype.
        dh: [B, T, r] = s g B, same dtype; it includes the scaling.
        scaling: s, finite; 1 for an unscaled adapter.

    Returns:
        [B, r, d] and [B, p, r], contiguous, float32 (float64 for float64 inputs), accumulated at least as precisely.

    Raises:
        TypeError: dtypes differ or are not floating.
        ValueError: shapes, devices or scaling do not fit.

    Source: Hu et al. 2021, arXiv:2106.09685 (the layer); its gradients by the chain rule.
    """
    check_norm(x, h, g, dh, scaling=scaling)
    of_a, of_b = _gradients(x, h, g, dh, scaling=scaling)
    return of_a, of_b


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
    """Add the clipped gradients to two sums, in place: out_a += Σ_i c_i dh_iᵀx_i, out_b += s Σ_i c_i g_iᵀh_i.

    Args:
        x: [B, T, d] layer inputs; bfloat16, float16 or float32 (float64 in tests).
        h: [B, T, r] = x Aᵀ, same dtype.
        g: [B, T, p] gradients of the layer's output, same dtype.
        dh: [B, T, r] = s g B, same dtype.
        factors: [B] float32, c_i from `clip_factors`; a sample with factor 0 is not read.
        out_a: [r, d] float32 or float64, added to.
        out_b: [p, r] float32 or float64, added to.
        scaling: s, finite.
        lengths: [B] int64, 0 ≤ L_i ≤ T: frames from L_i on are not read. None: all T.

    Raises:
        TypeError: dtypes differ or do not fit.
        ValueError: shapes, devices, scaling or lengths do not fit.

    Source: Hu et al. 2021, arXiv:2106.09685 (the layer); Bu et al. 2022, arXiv:2210.00038 (book-keeping).
    """
    check_sum(x, h, g, dh, factors, out_a, out_b, scaling=scaling, lengths=lengths)
    _weighted_sum(x, h, g, dh, factors, out_a, out_b, scaling=scaling, lengths=lengths)
