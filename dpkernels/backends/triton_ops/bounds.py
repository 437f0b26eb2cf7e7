"""Rounding on a GPU: how many roundings a term of a kernel's sum can meet, tensor cores included.

The argument from these counts to a norm that is never short is in `dpkernels.backends.bounds`: if every product of
an entry carries at most κ roundings, each of relative size u = 2⁻²⁴ of the terms' absolute values, then the computed
gradient is within γ S of the exact one, γ = κu/(1−κu) and S = Σ_t ‖x_t‖‖g_t‖, and so is what the weighted sum adds.

**Float32 arithmetic** (`input_precision="ieee"`, sums by `tl.sum`): one rounding an operation, in any order, fused or
not, so n terms give κ = n. The divisions and approximate functions of PTX are not used.

**Tensor cores** do not round to nearest. An instruction forms products of 16-bit inputs exactly and adds them, with
the accumulator, in blocks: all terms of a block are aligned to the largest of them and cut off below, added exactly,
and the sum is cut off to float32. Assumed, and nothing else:

1. a block takes K ≥ 4 products, and the accumulator;
2. a term loses at most 2⁻²³ of the largest term of its block in the alignment (no guard bits), each of the K + 1;
   a factor below the format's normal numbers counts as the smallest of these (its digits may not be shifted first);
3. the block's sum loses at most 2⁻²³ of itself.

With A ≥ every partial sum of the terms' absolute values, a block loses at most (K + 1)·2⁻²³·A + 2⁻²³·A, which is
(K + 2)/K · 2⁻²³·A ≤ 3·2⁻²⁴·A a product: three roundings where float32 arithmetic has one. This is the coarsest
behaviour that Fasi et al. found (K = 4, no guard bits, truncation); later tensor cores have wider blocks and guard
bits, and then the bound has a margin. `tests/ops/test_triton.py` probes the assumptions on the GPU it runs on.

For the subnormal factors of 2., S is Σ_t (‖x_t‖ + δ√d)(‖g_t‖ + δ√p), δ being the smallest normal number, or more.

**Chains.** Roundings add up along an accumulation, so one accumulation covers `CHAIN` terms; the pieces are added in
float32, one rounding each, outside of the matrix instruction.

Sources: M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ Computer
Science 7:e330, 2021; F. A. Khattak, M. Mikaitis, Accurate models of NVIDIA tensor cores, arXiv:2512.07004.
"""

from dataclasses import dataclass

import torch

UNIT = 2.0**-24
"""u of float32."""

TINIEST = 2.0**-126
"""What a float32 result below the smallest normal number can lose (it may be flushed to 0)."""

SLACK = 1.0 + 2.0**-30
"""Covers the float64 arithmetic of sums of squares and of the bounds themselves, chains below 2²² operations."""

ROUNDINGS_FMA = 1
ROUNDINGS_TENSOR_CORE = 3
"""Roundings of size u for each product in one accumulation."""


@dataclass(frozen=True)
class TensorCore:
    """What is assumed of a tensor core with 16-bit factors and a float32 accumulator.

    Attributes:
        block: products, at least, that are aligned and added together with the accumulator.
        extra: bits, at least, that the alignment keeps below the 23 of a float32.
    """

    block: int
    extra: int

    @property
    def roundings(self) -> float:
        """Roundings of size u a product; a dyadic number, so that every float type holds it."""
        return ((self.block + 1) * 2.0 ** (1 - self.extra) + 2.0) / self.block


COARSEST = TensorCore(4, 0)

TENSOR_CORES = {
    80: TensorCore(8, 1),
    86: TensorCore(8, 1),
    89: TensorCore(8, 1),
    90: TensorCore(16, 2),
    100: TensorCore(16, 2),
    120: TensorCore(16, 2),
}


def tensor_core(architecture: int) -> TensorCore:
    """What is assumed of an architecture, the coarsest where nothing is published."""
    return TENSOR_CORES.get(architecture, COARSEST)


CHAIN = 64
"""Products in one accumulation of a matrix product."""


def smallest(dtype: torch.dtype) -> float:
    """δ: above what a factor counts as, at least, in a product of a tensor core; 0 where none is used.

    Twice the smallest normal number: then ‖x_t‖ + δ√d is not below what it stands for where the tensor core itself
    computes ‖x_t‖² (half-Gram's diagonal) and loses most of it.
    """
    return 0.0 if dtype == torch.float32 else 2.0 * float(torch.finfo(dtype).smallest_normal)


def roundings(dtype: torch.dtype) -> int:
    """Roundings a product meets in one accumulation of `tl.dot`: float32 is computed without tensor cores."""
    return ROUNDINGS_FMA if dtype == torch.float32 else ROUNDINGS_TENSOR_CORE
