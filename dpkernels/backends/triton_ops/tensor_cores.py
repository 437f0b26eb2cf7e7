"""What a tensor core makes of given numbers: inner products by the `product` of the kernels, one accumulation each."""

import re

import torch
import triton.language as tl
from torch import Tensor

from dpkernels.backends.triton_ops import launching
from dpkernels.backends.triton_ops.device import product
from dpkernels.backends.triton_ops.launching import kernel


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


def row_products_of(a: Tensor, b: Tensor, rows: int = 64) -> Tensor:
    """Σ_k a[i, k] b[i, k] for 16-bit a, b [n, chain] as float32 [n], each one accumulation of `tl.dot`.

    Args:
        a: chain is a power of two, 16 at least.
        b: as a.
        rows: of a tile. 64 and more make Triton use wgmma on sm_90 and tcgen05 on sm_100; 16 makes it use mma.sync.
    """
    count, chain = a.shape
    padded = [torch.nn.functional.pad(t, (0, 0, 0, -count % rows)).contiguous() for t in (a, b)]
    out = torch.empty(len(padded[0]), dtype=torch.float32, device=a.device)
    constants = {"UPCAST": launching.upcast(a), "ROWS": rows, "CHAIN": chain, "num_warps": 4, "num_stages": 1}
    launching.execute(row_products, len(out) // rows, a.device, (*padded, out, 1.0), constants)
    return out[:count]


def instruction(dtype: torch.dtype, chain: int, rows: int = 64) -> str:
    """The matrix instruction that `row_products_of` is compiled to for the current CUDA device."""
    constants = {"UPCAST": False, "ROWS": rows, "CHAIN": chain, "num_warps": 4, "num_stages": 1}
    types = (dtype, dtype, torch.float32)
    compiled = row_products.warmup(*types, 1.0, grid=(1,), **constants, **launching.OPTIONS)
    if hasattr(compiled, "result"):
        compiled = compiled.result()
    found = re.search(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*", compiled.asm["ptx"])
    return found[0] if found else "none"
