"""Linear layers: norms by half-Gram or direct, chosen by each sample's own frames, and weighted sums.

No matrix of size T×T or p×d reaches device memory, and the host does not wait: the device counts the frames that add
something, and decides which samples a kernel computes, from these counts, the layer's shape, and the flags of samples
whose gram bound was too loose.
"""

from typing import Any

import torch
from torch import Tensor

from dpkernels.backends.triton_ops import bounds, configs, tensor_cores
from dpkernels.backends.triton_ops.frame_kernels import frames_that_count, order_frames
from dpkernels.backends.triton_ops.launching import (
    architecture,
    dense,
    float64_by_torch,
    in_pairs,
    is_long,
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


class _Norms:
    """One call of `linear_norm_sq`: its launches, and the arguments that they share."""

    def __init__(self, x: Tensor, g: Tensor, lengths: Tensor | None, method: str) -> None:
        (self.batch, self.frames, self.d), self.p = x.shape, g.shape[2]
        self.x = x
        self.out = torch.empty(self.batch, dtype=torch.float32, device=x.device)
        (x_view, x_align), (g_view, g_align) = rows(x), rows(g)
        self.views = (*x_view, *g_view)
        self.aligned = x_align > 1 and g_align > 1
        self.aligns: dict[str, Any] = {"X_ALIGN": x_align, "G_ALIGN": g_align}
        self.most = _most_by_gram(method, self.frames, self.p, self.d)
        # the kernels' own choice, sample by sample; without half-Gram's results none may ask for them
        self.method: dict[str, Any] = {"METHOD": _METHODS[method if self.most else "direct"]}
        self.smallest = bounds.smallest(x.dtype)
        self.per_term = tensor_cores.roundings(x)
        # the norm is rounded up for the weighted sum, whichever of its configurations makes that
        chain = configs.largest(configs.SUMS["linear"], "BT", x.dtype, architecture(x.device))
        self.of_sum: dict[str, Any] = {"SUM_ROUNDINGS": bounds.sum_roundings(chain, self.per_term)}
        self.own, self.order, self.found = self._own_frames(dense(lengths))

    def _tile(self, kernel: Any, name: str, variant: str = "") -> int:
        return tile_of(kernel, self.x, name, self.aligned, variant)

    def _largest_direct(self, name: str) -> int:
        """A tile's size in the bound of direct, which is one for short and for long batches."""
        return max(self._tile(linear_direct, name), self._tile(linear_direct, name, "long"))

    def _own_frames(self, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Which frames count, [B, T]; their numbers, [B, T]; how many they are and where they end, [B, 2]."""
        x, blocks = self.x, tiles(self.frames, tile_of(frames_that_count, self.x, "BT"))
        own = scratch(x, self.batch, self.frames, dtype=torch.int8)
        order = scratch(x, self.batch, self.frames, dtype=torch.int32)
        found = scratch(x, self.batch, 2, dtype=torch.int32)
        launch(
            frames_that_count,
            self.batch * blocks,
            x,
            *self.views,
            lengths,
            own,
            self.frames,
            blocks,
            **self.aligns,
        )
        launch(order_frames, self.batch, x, own, order, found, self.frames)
        return own, order, found

    def by_gram(self) -> tuple[Tensor, Tensor]:
        """Norms of the samples that half-Gram takes into `out`.

        Returns:
            scale [B]: their S; again [B]: 1 for the samples that are left to direct, among them those whose gram
            bound is loose.
        """
        x, bt, bk = self.x, self._tile(linear_gram, "BT"), self._tile(linear_gram, "BK")
        bs = self._tile(linear_gram, "BS")
        strips, blocks = bt // bs, tiles(self.most, bt)
        pairs = blocks * (blocks + 1) // 2
        products, diagonals = scratch(x, self.batch, pairs, strips), scratch(x, self.batch, blocks, strips, 3)
        scale, again = scratch(x, self.batch), torch.empty(self.batch, dtype=torch.int32, device=x.device)
        launch(
            linear_gram,
            self.batch * pairs * strips,
            x,
            *self.views,
            self.order,
            self.found,
            products,
            diagonals,
            self.frames,
            blocks,
            pairs,
            1.0,
            aligned=self.aligned,
            SMALLEST=self.smallest,
            UPCAST=upcast(x),
            X_WHOLE=self.d % bk == 0,
            G_WHOLE=self.p % bk == 0,
            **self.aligns,
            **self.method,
        )
        launch(
            finish_gram,
            self.batch,
            x,
            products,
            diagonals,
            self.found,
            self.out,
            scale,
            again,
            self.p,
            self.d,
            blocks,
            pairs,
            GRAM_BS=bs,
            GRAM_BT=bt,
            GRAM_BK=bk,
            PER_TERM=self.per_term,
            **self.of_sum,
            **self.method,
        )
        return scale, again

    def by_direct(self, scale: Tensor | None, again: Tensor | None) -> None:
        """Norms of the samples that `again` names (None: of all) into `out`; scale: S where half-Gram made it."""
        x, rows_bt = self.x, tile_of(linear_rows, self.x, "BT")
        blocks = tiles(self.frames, rows_bt)
        terms = scratch(x, self.batch, blocks)
        if self.most < self.frames:  # else half-Gram has made S of every sample
            launch(
                linear_rows,
                self.batch * blocks,
                x,
                *self.views,
                self.own,
                self.found,
                terms,
                self.frames,
                blocks,
                SMALLEST=self.smallest,
                **self.aligns,
                **self.method,
            )
        long = "long" if is_long(linear_direct, x, self.aligned) else ""
        across = tiles(self.d, self._tile(linear_direct, "BD", long))
        count = across * tiles(self.p, self._tile(linear_direct, "BP", long))
        squares = scratch(x, self.batch, count)
        launch(
            linear_direct,
            self.batch * count,
            x,
            *self.views,
            self.found,
            again,
            squares,
            across,
            count,
            1.0,
            aligned=self.aligned,
            variant=long,
            UPCAST=upcast(x),
            LONG=bool(long),
            **self.aligns,
        )
        launch(
            finish_direct,
            self.batch,
            x,
            squares,
            terms,
            terms if scale is None else scale,
            self.found,
            again,
            self.out,
            self.p,
            self.d,
            count,
            blocks,
            ROWS_BT=rows_bt,
            DIRECT_BD=self._largest_direct("BD"),
            NORM_ROUNDINGS=bounds.sum_roundings(self._largest_direct("BT"), self.per_term),
            **self.of_sum,
            **self.method,
        )


def _most_by_gram(method: str, frames: int, p: int, d: int) -> int:
    """Return the most own frames that `linear_kernels.by_gram` may choose half-Gram for; 0 if it is for none."""
    if method != "auto":
        return frames if method == "gram" else 0
    # At equal operations `by_gram` chooses direct, whose passes must include that length.
    return min(frames, (2 * p * d - 1) // (p + d)) if p and d else 0


@float64_by_torch
def linear_norm_sq(x: Tensor, g: Tensor, *, lengths: Tensor | None = None, method: str = "auto") -> Tensor:
    """‖g_iᵀx_i‖², rounded up; see `dpkernels.ops.linear_norm_sq`."""
    norms = _Norms(x, g, lengths, method)
    norms.by_direct(*(norms.by_gram() if norms.most else (None, None)))
    return norms.out


@float64_by_torch
def linear_weighted_sum(
    x: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """out += Σ_i c_i g_iᵀx_i; see `dpkernels.ops.linear_weighted_sum`."""
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
        PAIRS=in_pairs(linear_sum, x, frames, aligned),
    )
    if total is not out:
        out.copy_(total)
