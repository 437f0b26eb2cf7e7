"""Linear layers: norms by half-Gram or direct, sample by sample as its own length says, and weighted sums.

Nothing of size T×T or p×d reaches device memory, and the host waits for nothing: which samples a kernel computes is
decided on the device, from lengths, the layer's shape, and the flags of samples whose gram bound was too loose.
"""

from typing import Any

import torch
from torch import Tensor

from dpkernels.backends.triton_ops import bounds, configs
from dpkernels.backends.triton_ops.launching import (
    architecture,
    dense,
    float64_by_torch,
    launch,
    rows,
    scratch,
    tile_of,
    tiles,
    upcast,
)
from dpkernels.backends.triton_ops.linear_kernels import (
    finish_direct,
    finish_gram,
    linear_direct,
    linear_gram,
    linear_rows,
    linear_sum,
)

_METHODS = {"auto": 0, "gram": 1, "direct": 2}


def _sum_rounding(function: Any, like: Tensor) -> dict[str, Any]:
    """What the kernels that finish a norm must know of the weighted sum's kernel `function`."""
    least, most = configs.extremes(function.__name__, "BT", like.dtype, architecture(like.device))
    return {"SUM_LEAST": least, "SUM_MOST": most, "PER_TERM": bounds.roundings(like.dtype)}


def _most_by_gram(method: str, frames: int, p: int, d: int) -> int:
    """The longest sample that `linear_kernels.by_gram` may give to half-Gram."""
    if method != "auto":
        return frames if method == "gram" else 0
    return min(frames, 2 * p * d // (p + d)) if p and d else 0


@float64_by_torch
def linear_norm_sq(x: Tensor, g: Tensor, *, lengths: Tensor | None = None, method: str = "auto") -> Tensor:
    """‖g_iᵀx_i‖², rounded up; see `dpkernels.ops.linear_norm_sq`."""
    (batch, frames, d), p = x.shape, g.shape[2]
    lengths, out = dense(lengths), torch.empty(len(x), dtype=torch.float32, device=x.device)
    (x_view, x_align), (g_view, g_align) = rows(x), rows(g)
    aligns: dict[str, Any] = {"X_ALIGN": x_align, "G_ALIGN": g_align}
    aligned = x_align > 1 and g_align > 1
    rounding = _sum_rounding(linear_sum, x)
    most = _most_by_gram(method, frames, p, d)
    # the kernels' own choice among methods; all by direct where no sample can be short enough
    choice: dict[str, Any] = {"METHOD": _METHODS[method] if most else _METHODS["direct"]}

    scale = again = None
    if most:
        gram_bt = tile_of(linear_gram, x, "BT", aligned)
        blocks = tiles(most, gram_bt)
        pairs = blocks * (blocks + 1) // 2
        products, diagonals = scratch(x, batch, pairs), scratch(x, batch, blocks, 3)
        scale, again = scratch(x, batch), torch.empty(batch, dtype=torch.int32, device=x.device)
        launch(
            linear_gram,
            batch * pairs,
            x,
            *x_view,
            *g_view,
            lengths,
            products,
            diagonals,
            frames,
            blocks,
            pairs,
            1.0,
            UPCAST=upcast(x),
            aligned=aligned,
            **aligns,
            **choice,
        )
        launch(
            finish_gram,
            batch,
            x,
            products,
            diagonals,
            lengths,
            out,
            scale,
            again,
            frames,
            p,
            d,
            blocks,
            pairs,
            GRAM_BT=gram_bt,
            GRAM_BK=tile_of(linear_gram, x, "BK", aligned),
            **rounding,
            **choice,
        )

    rows_bt = tile_of(linear_rows, x, "BT")
    blocks = tiles(frames, rows_bt)
    norms = scratch(x, batch, blocks)
    if most < frames or not most:
        launch(
            linear_rows,
            batch * blocks,
            x,
            *x_view,
            *g_view,
            lengths,
            norms,
            frames,
            blocks,
            **aligns,
            **choice,
        )
    direct_bd = tile_of(linear_direct, x, "BD", aligned)
    across = tiles(d, direct_bd)
    count = across * tiles(p, tile_of(linear_direct, x, "BP", aligned))
    squares = scratch(x, batch, count)
    launch(
        linear_direct,
        batch * count,
        x,
        *x_view,
        *g_view,
        lengths,
        again,
        squares,
        frames,
        across,
        count,
        1.0,
        aligned=aligned,
        UPCAST=upcast(x),
        **aligns,
    )
    launch(
        finish_direct,
        batch,
        x,
        squares,
        norms,
        norms if scale is None else scale,
        lengths,
        again,
        out,
        frames,
        p,
        d,
        count,
        blocks,
        ROWS_BT=rows_bt,
        DIRECT_BT=tile_of(linear_direct, x, "BT", aligned),
        DIRECT_BD=direct_bd,
        **rounding,
        **choice,
    )
    return out


@float64_by_torch
def linear_weighted_sum(
    x: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """Out += Σ_i c_i g_iᵀx_i; see `dpkernels.ops.linear_weighted_sum`."""
    (batch, frames, d), p = x.shape, g.shape[2]
    total = out.contiguous()
    (x_view, x_align), (g_view, g_align) = rows(x), rows(g)
    aligned = x_align > 1 and g_align > 1
    across = tiles(d, tile_of(linear_sum, x, "BD", aligned))
    launch(
        linear_sum,
        across * tiles(p, tile_of(linear_sum, x, "BP", aligned)),
        x,
        *x_view,
        *g_view,
        dense(factors),
        dense(lengths),
        total,
        batch,
        frames,
        across,
        1.0,
        aligned=aligned,
        X_ALIGN=x_align,
        G_ALIGN=g_align,
        UPCAST=upcast(x),
    )
    if total is not out:
        out.copy_(total)
