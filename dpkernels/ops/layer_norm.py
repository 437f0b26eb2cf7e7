"""LayerNorm and RMSNorm weights: norms and weighted sums of the per-sample gradients Σ_t x̂_it ⊙ g_it.

x̂ is the normalised input, before weight and bias. `bias_norm_sq` of the same g is the norm of a LayerNorm's bias.
"""

from torch import Tensor

from dpkernels.ops import _check, _library


def _check_values(x_hat: Tensor, g: Tensor, *rest: Tensor, lengths: Tensor | None = None) -> None:
    _check.lengths_within(lengths, g.shape[1])


_norm_sq = _library.define(
    "layer_norm_norm_sq",
    "(Tensor x_hat, Tensor g, *, Tensor? lengths=None) -> Tensor",
    fake=lambda x_hat, g, *, lengths=None: _library.norms(g),
    check=_check_values,
)
_weighted_sum = _library.define(
    "layer_norm_weighted_sum",
    "(Tensor x_hat, Tensor g, Tensor factors, Tensor(a!) out, *, Tensor? lengths=None) -> ()",
    fake=lambda x_hat, g, factors, out, *, lengths=None: None,
    check=_check_values,
)


def check_norm(x_hat: Tensor, g: Tensor, *, lengths: Tensor | None = None) -> None:
    """Check x_hat and g [B, T, d] of one dtype on one device, lengths int64 [B] or None."""
    _check.floats(x_hat=x_hat, g=g)
    _check.shape("x_hat", x_hat, (None, None, None), "[B, T, d]")
    _check.shape("g", g, tuple(x_hat.shape), "[B, T, d]")
    _check.lengths_of(lengths, g)


def check_sum(
    x_hat: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """Check the norm's arguments, factors float32 [B], and out [d]."""
    check_norm(x_hat, g, lengths=lengths)
    _check.weighted_sum(factors, g, out=(out, (g.shape[2],), "[d]"))


def layer_norm_norm_sq(x_hat: Tensor, g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """Squared norm of each sample's gradient of the weight, rounded up: ‖Σ_t x̂_it ⊙ g_it‖².

    Args:
        x_hat: [B, T, d] normalised inputs; bfloat16, float16 or float32 (float64 in tests). B, T may be 0.
        g: [B, T, d] gradients of the layer's output, same dtype.
        lengths: [B] int64, 0 ≤ L_i ≤ T: frames from L_i on are not read. None: all T.

    Returns:
        [B] float32, in squared units of g; not below the exact square, nor below the square of the gradient
        that `layer_norm_weighted_sum` adds for the sample, divided by its factor.

    Raises:
        TypeError: dtypes differ or are not floating.
        ValueError: shapes, devices or lengths do not fit.

    Source: the gradient of y = x̂ ⊙ w with respect to w.
    """
    check_norm(x_hat, g, lengths=lengths)
    result: Tensor = _norm_sq(x_hat, g, lengths=lengths)
    return result


def layer_norm_weighted_sum(
    x_hat: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """Add the clipped gradients to a sum, in place: out += Σ_i c_i Σ_t x̂_it ⊙ g_it.

    Args:
        x_hat: [B, T, d] normalised inputs; bfloat16, float16 or float32 (float64 in tests).
        g: [B, T, d] gradients of the layer's output, same dtype.
        factors: [B] float32, c_i from `clip_factors`; a sample with factor 0 is not read.
        out: [d] float32 or float64, added to.
        lengths: [B] int64, 0 ≤ L_i ≤ T: frames from L_i on are not read. None: all T.

    Raises:
        TypeError: dtypes differ or do not fit.
        ValueError: shapes, devices or lengths do not fit.

    Source: Bu et al. 2022, arXiv:2210.00038 (book-keeping).
    """
    check_sum(x_hat, g, factors, out, lengths=lengths)
    _weighted_sum(x_hat, g, factors, out, lengths=lengths)
