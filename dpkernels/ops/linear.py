"""Linear layers: norms and weighted sums of the per-sample gradients g_iᵀx_i, which are never materialised.

y = x Wᵀ with x [B, T, d] and the gradient g of y [B, T, p]: sample i's gradient of W is G_i = Σ_t g_it x_itᵀ
[p, d]. A pointwise conv1d is a linear layer on x.transpose(1, 2).
"""

from torch import Tensor

from dpkernels.ops import _check, _library

METHODS = ("auto", "gram", "direct")


def _check_values(
    x: Tensor, g: Tensor, *rest: Tensor, lengths: Tensor | None = None, method: str = "auto"
) -> None:
    _check.lengths_within(lengths, x.shape[1])


_norm_sq = _library.define(
    "linear_norm_sq",
    '(Tensor x, Tensor g, *, Tensor? lengths=None, str method="auto") -> Tensor',
    fake=lambda x, g, *, lengths=None, method="auto": _library.norms(x),
    check=_check_values,
)
_weighted_sum = _library.define(
    "linear_weighted_sum",
    "(Tensor x, Tensor g, Tensor factors, Tensor(a!) out, *, Tensor? lengths=None) -> ()",
    fake=lambda x, g, factors, out, *, lengths=None: None,
    check=_check_values,
)


def check_norm(x: Tensor, g: Tensor, *, lengths: Tensor | None = None) -> None:
    """Check x [B, T, d] and g [B, T, p] of one dtype on one device, lengths int64 [B] or None."""
    _check.floats(x=x, g=g)
    _check.shape("x", x, (None, None, None), "[B, T, d]")
    _check.shape("g", g, (x.shape[0], x.shape[1], None), "[B, T, p]")
    _check.lengths_of(lengths, x)


def check_sum(x: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None) -> None:
    """Check the norm's arguments, factors float32 [B], and out [p, d]."""
    check_norm(x, g, lengths=lengths)
    _check.weighted_sum(factors, x, out=(out, (g.shape[2], x.shape[2]), "[p, d]"))


def linear_norm_sq(x: Tensor, g: Tensor, *, lengths: Tensor | None = None, method: str = "auto") -> Tensor:
    """Squared norm of each sample's weight gradient, rounded up: ‖Σ_t g_it x_itᵀ‖²_F.

    *direct* squares and sums blocks of g_iᵀx_i (2Tpd FLOPs a sample); *gram* sums (x_t·x_s)(g_t·g_s) over t
    and s (T²(p+d) FLOPs). The method depends on the sample's own length alone, so that a sample's result does
    not depend on the rest of the batch.

    Args:
        x: [B, T, d] layer inputs; bfloat16, float16 or float32 (float64 in tests). B, T may be 0.
        g: [B, T, p] gradients of the layer's output, same dtype.
        lengths: [B] int64, 0 ≤ L_i ≤ T: frames from L_i on are not read. None: all T.
        method: "auto" (by FLOPs and measured constants), "gram" or "direct".

    Returns:
        [B] float32, in squared units of x·g. Not below the exact square, nor below the square of the
        gradient that `linear_weighted_sum` adds for the sample, divided by its factor. NaN or infinite if inputs are.

    Raises:
        TypeError: dtypes differ or are not floating.
        ValueError: shapes, devices or lengths do not fit, or method is unknown.

    Source: Goodfellow 2015, arXiv:1510.01799 (T = 1); Li et al. 2021, arXiv:2110.05679 (ghost clipping).
    """
    check_norm(x, g, lengths=lengths)
    if method not in METHODS:
        raise ValueError(f"method: given {method!r}; pass one of {', '.join(METHODS)}")
    result: Tensor = _norm_sq(x, g, lengths=lengths, method=method)
    return result


def linear_weighted_sum(
    x: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """Add the clipped gradients to a sum, in place: out += Σ_i c_i Σ_t g_it x_itᵀ.

    Each sample's product is accumulated in float32, and the products are added in float64. A sample whose
    factor is 0 is not read, so its NaN and infinity have no effect.

    Args:
        x: [B, T, d] layer inputs; bfloat16, float16 or float32 (float64 in tests).
        g: [B, T, p] gradients of the layer's output, same dtype.
        factors: [B] float32, c_i from `clip_factors`.
        out: [p, d] float32 or float64 (the engine passes float64), added to.
        lengths: [B] int64, 0 ≤ L_i ≤ T: frames from L_i on are not read. None: all T.

    Raises:
        TypeError: dtypes differ or do not fit.
        ValueError: shapes, devices or lengths do not fit.

    Source: Bu et al. 2022, arXiv:2210.00038 (book-keeping).
    """
    check_sum(x, g, factors, out, lengths=lengths)
    _weighted_sum(x, g, factors, out, lengths=lengths)
