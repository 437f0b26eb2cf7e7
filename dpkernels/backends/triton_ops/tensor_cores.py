"""The test, at a GPU's first use, whether its tensor cores round as `bounds` assumes for its architecture.

The test computes inner products by the kernels' `product`, one accumulation each, whose results show what was cut off.
A GPU that fails it, or whose rounding is not published, gets the coarsest known bound. This test takes one launch an
instruction; `bench.gpu.tensor_cores` tests far more, and searches for errors above the bound.
"""

import functools
import logging
import re
from collections.abc import Callable

import torch
import triton.language as tl
from torch import Tensor

from dpkernels.backends.triton_ops import bounds, launching
from dpkernels.backends.triton_ops.device import product
from dpkernels.backends.triton_ops.launching import kernel

logger = logging.getLogger("dpkernels")

TILES = (64, 16)
"""Rows of a tile for which Triton uses the large instruction (wgmma on sm_90, tcgen05 on sm_100), and mma.sync."""


@kernel
def row_products(a, b, out, one, UPCAST: tl.constexpr, ROWS: tl.constexpr, CHAIN: tl.constexpr):
    """out[i] = Σ_k a[i, k] b[i, k] of ROWS rows: the diagonal of a [ROWS, ROWS] tile."""
    rows, terms = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHAIN)
    at = rows[:, None] * CHAIN + terms[None, :]
    tile = product(
        tl.load(a + at), tl.trans(tl.load(b + at)), tl.zeros((ROWS, ROWS), tl.float32), one, UPCAST
    )
    of_diagonal = tl.arange(0, ROWS)[:, None] == tl.arange(0, ROWS)[None, :]
    tl.store(out + rows, tl.sum(tl.where(of_diagonal, tile, 0.0), axis=1))  # adds zeros only: exact


def row_products_of(a: Tensor, b: Tensor, rows: int = TILES[0]) -> Tensor:
    """Σ_k a[i, k] b[i, k] for 16-bit a, b [n, chain] as float32 [n], each one accumulation of `tl.dot`.

    Args:
        a: chain is a power of two, 16 at least.
        b: as a.
        rows: of a tile, see `TILES`.
    """
    count, chain = a.shape
    padded = [torch.nn.functional.pad(t, (0, 0, 0, -count % rows)).contiguous() for t in (a, b)]
    out = torch.empty(len(padded[0]), dtype=torch.float32, device=a.device)
    constants = _constants(rows, chain) | {"UPCAST": launching.upcast(a)}
    launching.execute(row_products, len(out) // rows, a.device, (*padded, out, 1.0), constants)
    return out[:count]


def _constants(rows: int, chain: int) -> dict[str, int]:
    return {"ROWS": rows, "CHAIN": chain, "num_warps": 4, "num_stages": 1}


def instruction(dtype: torch.dtype, chain: int, rows: int = TILES[0]) -> str:
    """The matrix instruction that `row_products_of` is compiled to for the current CUDA device."""
    compiled = row_products.warmup(
        dtype,
        dtype,
        torch.float32,
        1.0,
        grid=(1,),
        UPCAST=False,
        **_constants(rows, chain),
        **launching.OPTIONS,
    )
    if hasattr(compiled, "result"):
        compiled = compiled.result()
    match = re.search(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*", compiled.asm["ptx"])
    return match[0] if match else "none"


# ---- the test at a GPU's first use ----------------------------------------------------------------------------


def questions(core: bounds.TensorCore, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows a, b [n, CHAIN], the results of a device that rounds as assumed, and their tolerances, each [n].

    A large term and its negative cancel; the rest of a small term beside them shows how it was cut.
    """
    chain, k, info = bounds.CHAIN, core.block, torch.finfo(dtype)
    big, kept, lost = 2.0**8, 2.0 ** (16 - 23 - core.extra), 2.0 ** (16 - 40)
    rows: list[tuple[dict[int, tuple[float, float]], float, float]] = []
    for s in range(0, chain, k):
        # a block is K wide: the last of its products is lost beside the first two
        rows.append(({s: (big, big), s + 1: (-big, big), s + k - 1: (lost * 2.0**12, 2.0**-12)}, 0.0, 0.0))
        for sign in (1.0, -1.0):
            small = (sign * kept * 2.0**4, 2.0**-4)
            # the alignment keeps e bits: of a product, of one beside a large accumulator, of the accumulator
            rows.append(({s: (big, big), s + 1: (-big, big), s + 2: small}, sign * kept, 0.0))
            if s:
                rows.append(({s - 1: (big, big), s: (-big, big), s + 1: small}, sign * kept, 0.0))
                rows.append(({s - 1: small, s: (big, big), s + 1: (-big, big)}, sign * kept, 0.0))
            # a sum loses less than its last place, which is 2⁻²¹ of 4.5 and a little more
            part = {s + i: (sign * 1.5, 1.0) for i in range(3)} | {s + 3: (sign * 1.75 * 2.0**-10, 2.0**-11)}
            rows.append((part, sign * (4.5 + 1.75 * 2.0**-21), 2.0**-21))
            # subnormal factors count
            tiny = sign * info.smallest_normal * info.eps
            rows.append(({s: (tiny, 2.0**15)}, tiny * 2.0**15, 0.0))
    a, b = (torch.zeros(len(rows), chain, dtype=torch.float64) for _ in range(2))
    for i, (row, _, _) in enumerate(rows):
        for place, pair in row.items():
            a[i, place], b[i, place] = pair
    expected, slack = (torch.tensor([row[which] for row in rows], dtype=torch.float64) for which in (1, 2))
    return a.to(dtype), b.to(dtype), expected, slack


def answers_as_assumed(
    core: bounds.TensorCore, dtype: torch.dtype, dots: Callable[[Tensor, Tensor], Tensor]
) -> bool:
    """Whether `dots`, rows' inner products as float32, rounds as assumed for such a tensor core, or better."""
    a, b, expected, slack = questions(core, dtype)
    return bool(((dots(a, b).double().cpu() - expected).abs() <= slack).all())


@functools.cache
def trusted(device: torch.device, dtype: torch.dtype) -> int:
    """Return the architecture that bounds 16-bit products on a CUDA device: its own, or 0 for the coarsest."""
    number, name = launching.architecture(device), str(dtype).removeprefix("torch.")
    if number not in bounds.TENSOR_CORES:
        logger.info(
            "sm_%d: its tensor cores' rounding is not published; norms use the coarsest known bound", number
        )
        return 0
    for rows in TILES:

        def dots(a: Tensor, b: Tensor, rows: int = rows) -> Tensor:
            return row_products_of(a.to(device), b.to(device), rows)

        if not answers_as_assumed(bounds.TENSOR_CORES[number], dtype, dots):
            logger.warning(
                "the tensor cores of this sm_%d GPU do not round %s as published; norms use the coarsest known bound, "
                "and are slightly larger; python -m bench.gpu.tensor_cores shows the differences",
                number,
                name,
            )
            return 0
    return number


def roundings(like: Tensor) -> float:
    """Return the roundings of a product of `like`'s dtype in one accumulation, for kernels' PER_TERM."""
    if like.device.type != "cuda" or like.dtype == torch.float32:
        return bounds.roundings(like.dtype, launching.architecture(like.device))
    return bounds.roundings(like.dtype, trusted(like.device, like.dtype))
