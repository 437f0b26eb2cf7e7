"""Biases: norms and weighted sums of the per-sample gradients Σ_t g_it, where g [B, T, p] is the output's gradient."""

from torch import Tensor

from dpkernels.ops import _check, _library


def _check_values(g: Tensor, *rest: Tensor, lengths: Tensor | None = None) -> None:
    _check.lengths_within(lengths, g.shape[1])


_norm_sq = _library.define(
    "bias_norm_sq",
    "(Tensor g, *, Tensor? lengths=None) -> Tensor",
    fake=lambda g, *, lengths=None: _library.norms(g),
    check=_check_values,
)
_weighted_sum = _library.define(
    "bias_weighted_sum",
    "(Tensor g, Tensor factors, Tensor(a!) out, *, Tensor? lengths=None) -> ()",
    fake=lambda g, factors, out, *, lengths=None: None,
    check=_check_values,
)


def check_norm(g: Tensor, *, lengths: Tensor | None = None) -> None:
    """Check g [B, T, p] of a floating dtype, and lengths int64 [B] or None."""
    _check.floats(g=g)
    _check.shape("g", g, (None, None, None), "[B, T, p]")
    _check.lengths_of(lengths, g)


def check_sum(g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None) -> None:
    """Check the norm's arguments, factors float32 [B], and out [p]."""
    check_norm(g, lengths=lengths)
    _check.weighted_sum(factors, g, out=(out, (g.shape[2],), "[p]"))


def bias_norm_sq(g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """Squared norm of each sample's bias gradient, rounded up: ‖Σ_t g_it‖².

    Args:
        g: [B, T, p] gradients of the layer's output; bfloat16, float16 or float32 (float64 in tests). B, T
            may be 0.
        lengths: [B] int64, 0 ≤ L_i ≤ T: frames from L_i on are not read. None: all T.

    Returns:
        [B] float32, in squared units of g; not below the exact square, nor below the square of
        the gradient that `bias_weighted_sum` adds.

    Raises:
        TypeError: g is not floating, or lengths is not int64.
        ValueError: shapes, devices or lengths do not fit.

    Source: the gradient of y = x Wᵀ + b with respect to b.
    """
    check_norm(g, lengths=lengths)
    result: Tensor = _norm_sq(g, lengths=lengths)
    return result


def bias_weighted_sum(g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None) -> None:
    """Add the clipped gradients to a sum, in place: out += Σ_i c_i Σ_t g_it.

    Args:
        g: [B, T, p] gradients of the layer's output; bfloat16, float16 or float32 (float64 in tests).
        factors: [B] float32, c_i from `clip_factors`; a sample with factor 0 is not read.
        out: [p] float32 or float64, added to.
        lengths: [B] int64, 0 ≤ L_i ≤ T: frames from L_i on are not read. None: all T.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes, devices or lengths do not fit.

    Source: Bu et al. 2022, arXiv:2210.00038 (book-keeping).
    """
    check_sum(g, factors, out, lengths=lengths)
    _weighted_sum(g, factors, out, lengths=lengths)
