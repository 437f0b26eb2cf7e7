"""Depthwise conv1d: norms and weighted sums of per-sample gradients Σ_t g_ict x_ic(ts + jδ − π).

Each channel has one filter of k taps j (groups = C_in = C_out), with stride s, dilation δ and π zeros on either side.
A pointwise conv1d is a linear layer.
"""

from torch import Tensor

from dpkernels.ops import _check, _library

_norm_sq = _library.define(
    "depthwise_conv1d_norm_sq",
    "(Tensor x, Tensor g, *, int kernel_size, int stride=1, int padding=0, int dilation=1) -> Tensor",
    fake=lambda x, g, *, kernel_size, stride=1, padding=0, dilation=1: _library.norms(x),
)
_weighted_sum = _library.define(
    "depthwise_conv1d_weighted_sum",
    "(Tensor x, Tensor g, Tensor factors, Tensor(a!) out, *, "
    "int stride=1, int padding=0, int dilation=1) -> ()",
    fake=lambda x, g, factors, out, *, stride=1, padding=0, dilation=1: None,
)


def check_norm(
    x: Tensor, g: Tensor, *, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> None:
    """Check x [B, C, T] and g [B, C, T'] of one dtype on one device, where T' follows from T and the sizes."""
    _check.floats(x=x, g=g)
    _check.shape("x", x, (None, None, None), "[B, C, T]")
    _check.integer("kernel_size", kernel_size, 1)
    _check.integer("stride", stride, 1)
    _check.integer("padding", padding, 0)
    _check.integer("dilation", dilation, 1)
    reach = x.shape[2] + 2 * padding - dilation * (kernel_size - 1) - 1
    _check.shape("g", g, (x.shape[0], x.shape[1], max(0, reach // stride + 1)), "[B, C, T']")


def check_sum(
    x: Tensor,
    g: Tensor,
    factors: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> None:
    """Check the norm's arguments, factors float32 [B], and out [C, 1, k], from which k is taken."""
    _check.shape("out", out, (None, 1, None), "[C, 1, k]")
    taps = out.shape[2]
    check_norm(x, g, kernel_size=taps, stride=stride, padding=padding, dilation=dilation)
    _check.weighted_sum(factors, x, out=(out, (x.shape[1], 1, taps), "[C, 1, k]"))


def depthwise_conv1d_norm_sq(
    x: Tensor, g: Tensor, *, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    """Squared norm of each sample's gradient of the filters, rounded up: Σ_cj (Σ_t g_ict x_ic(ts + jδ − π))².

    Args:
        x: [B, C, T] layer inputs; bfloat16, float16 or float32 (float64 in tests). B, T may be 0.
        g: [B, C, T'] gradients of the output, T' = ⌊(T + 2π − δ(k−1) − 1)/s⌋ + 1 frames (0 if negative),
            same dtype.
        kernel_size: k ≥ 1 taps.
        stride: s ≥ 1 frames.
        padding: π ≥ 0 frames of zeros on either side.
        dilation: δ ≥ 1 frames between taps.

    Returns:
        [B] float32, in squared units of x·g; not below the exact square, nor below the square of the
        gradient that `depthwise_conv1d_weighted_sum` adds for the sample, divided by its factor.

    Raises:
        TypeError: dtypes differ or are not floating.
        ValueError: shapes, devices or sizes do not fit.

    Source: the gradient of the cross-correlation that torch.nn.Conv1d(C, C, k, groups=C) computes.
    """
    check_norm(x, g, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
    result: Tensor = _norm_sq(
        x, g, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation
    )
    return result


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
    """Add the clipped gradients to a sum, in place: out[c, 0, j] += Σ_i c_i Σ_t g_ict x_ic(ts + jδ − π).

    Args:
        x: [B, C, T] layer inputs; bfloat16, float16 or float32 (float64 in tests).
        g: [B, C, T'] gradients of the output, same dtype.
        factors: [B] float32, c_i from `clip_factors`; a sample with factor 0 is not read.
        out: [C, 1, k] float32 or float64, added to; its last size is the number of taps.
        stride: s ≥ 1 frames.
        padding: π ≥ 0 frames of zeros on either side.
        dilation: δ ≥ 1 frames between taps.

    Raises:
        TypeError: dtypes differ or do not fit.
        ValueError: shapes, devices or sizes do not fit.

    Source: Bu et al. 2022, arXiv:2210.00038 (book-keeping).
    """
    check_sum(x, g, factors, out, stride=stride, padding=padding, dilation=dilation)
    _weighted_sum(x, g, factors, out, stride=stride, padding=padding, dilation=dilation)
