"""Rounding on a GPU: the largest number of roundings of a term in a kernel's sum, tensor cores included.

`dpkernels.backends.bounds` derives from these counts that no norm is too small: if every product of
an entry carries at most κ roundings, each of relative size u = 2⁻²⁴ of the terms' absolute values, then the computed
gradient is within γ S of the exact one, γ = κu/(1−κu) and S = Σ_t ‖x_t‖‖g_t‖, and so is what the weighted sum adds.

**Float32 arithmetic** (`input_precision="ieee"`, sums by `tl.sum`): one rounding an operation, in any order, fused or
not, so n terms give κ = n. The divisions and approximate functions of PTX are not used.

**Tensor cores** do not round to nearest. An instruction forms products of 16-bit inputs exactly and adds them, with
the accumulator, in blocks: all terms of a block are aligned to the largest of them and cut off below, added exactly,
and the sum is cut off to float32. The bound assumes only this, with K and e of the architecture (`TensorCore`):

1. a block takes K products, or more, and the accumulator;
2. a term loses at most 2^-(23+e) of the largest term of its block in the alignment, each of the K + 1;
   a factor below the format's normal numbers counts as the smallest of these (its digits may not be shifted first);
3. the block's sum loses at most 2⁻²³ of itself.

With A ≥ every partial sum of the terms' absolute values, a block loses at most (K + 1)·2^-(23+e)·A + 2⁻²³·A. That is
((K + 1)·2^(1-e) + 2) u A a block, and a K-th of it a product: `TensorCore.roundings`, where float32 arithmetic has 1.
An accumulation counts by the blocks that it *could* fill, not by its terms: a tile that is partly empty counts whole.
So the bound does not assume which products share a block, nor in which order blocks are added.

| tensor core | K | e | roundings a product |
|---|---|---|---|
| sm_80, sm_86, sm_89 | 8 | 1 | 1.375 |
| sm_90, by mma.sync and by wgmma; sm_100, by tcgen05; sm_120 | 16 | 2 | 0.65625 |
| V100, the coarsest known; assumed for every other GPU | 4 | 0 | 3 |

All of these cut off (round toward zero) both times, and keep subnormal factors and results. Xie et al. and Khattak and
Mikaitis built models that agree bit for bit with the GPUs, the former also for wgmma and tcgen05, and name the same K
and e; Fasi et al. found V100's, and A100's K. `tensor_cores` tests at a GPU's first
use whether it rounds as its architecture should; `tests/ops/test_tensor_cores.py` tests this in detail.

For the subnormal factors of 2., S is Σ_t (‖x_t‖ + δ√d)(‖g_t‖ + δ√p), δ being the smallest normal number, or more.

**Chains.** Roundings add up along an accumulation, so one accumulation covers `CHAIN` terms; the pieces are added in
float32, one rounding each, outside of the matrix instruction. `PIECES` of them make a part, which is then added in
float64. So κ is a constant, whatever the length: a bound that grew with the frames of the longest sample of a batch
would raise the norms of all others when that one joins.

**Pairs.** Where float64 is slow, a weighted sum over samples is a pair of float32 numbers a + b. A sample's value v is
added by Knuth's two-sum: a' = fl(a + v), and the error e = a + v − a', a float32 number, is found exactly by five more
additions (in round-to-nearest, for subnormal numbers too); b' = fl(b + e). Only this last addition rounds. The values
have norms of at most C, and n of them are added, so that ‖a‖ is nC at most, and a few u more. Every RENEWED-th sample a
becomes fl(a + b), and b what that leaves out, at most u‖a‖. Until the next exchange b grows by ‖e‖ ≤ u‖a‖ a sample,
to (RENEWED + 1) u nC at most, of which an addition rounds off u, and an exchange 3u (where b is larger than a, two of
its additions round, too). In all n (1 + 3/RENEWED)(RENEWED + 1) u² nC < 20.2 n² 2⁻⁴⁸ C, which is below n² 2⁻⁴³ C:
`privacy.step.clipping.rounding_slack` allows n (n + 2¹⁷) 2⁻⁴³ C, for float64 sums of samples in pieces. Pairs are for
samples of one piece: the pieces of a longer one may cancel, and are up to 2¹⁷ C.

Sources: M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ Computer
Science 7:e330, 2021. F. A. Khattak, M. Mikaitis, Accurate models of NVIDIA tensor cores, arXiv:2512.07004, with the
models in github.com/north-numerical-computing/MATLAB-tensor-core (V100, A100, A30, A2, L40S, RTX 1000 Ada, H100, H200,
B200, RTX PRO 6000). P. Xie, Y. Wang, F. Yang, M. Yang, MMA-Sim: bit-accurate reference model of tensor cores and matrix
cores, arXiv:2511.10909, with the simulator in github.com/microsoft/MMA-Sim.
"""

from dataclasses import dataclass

import torch

UNIT = 2.0**-24
"""u of float32."""

TINIEST = 2.0**-126
"""The largest error of a float32 result below the smallest normal number, which may be flushed to 0."""

SLACK = 1.0 + 2.0**-30
"""Covers the float64 arithmetic of sums of squares and of the bounds themselves, chains below 2²² operations."""

ROUNDINGS_FMA = 1.0
"""Roundings of size u for each product in one accumulation, without tensor cores."""


@dataclass(frozen=True)
class TensorCore:
    """The assumed properties of a tensor core with 16-bit factors and a float32 accumulator.

    Attributes:
        block: K, the least number of products that are aligned and added with the accumulator; it divides 16.
        extra: e, the least number of bits that the alignment keeps below the 23 of a float32.
    """

    block: int
    extra: int

    @property
    def roundings(self) -> float:
        """Roundings of size u for each product in one accumulation; exact in float32, as kernels need it."""
        return ((self.block + 1) * 2.0 ** (1 - self.extra) + 2.0) / self.block


COARSEST = TensorCore(4, 0)
"""The coarsest tensor core known in any NVIDIA GPU (V100)."""

TENSOR_CORES = {
    80: TensorCore(8, 1),
    86: TensorCore(8, 1),
    89: TensorCore(8, 1),
    90: TensorCore(16, 2),
    100: TensorCore(16, 2),
    120: TensorCore(16, 2),
}
"""Published tensor cores, by compute capability × 10. None is published for sm_87, 103, 110 and 121."""

CHAIN = 64
"""Products in one accumulation of a matrix product.

Twice as many would halve the pieces, which are added in float32, and double the other roundings: for a sum of 1024 at
0.65625 roundings a product, 84 + 1 + 8 against 42 + 1 + 16. From 1,000 to 4,000 terms 64 is within a tenth of the best.
"""

PIECES = 32
"""Accumulations that are added in float32, at most; their sums are added in float64."""


FLOAT64 = (0, 80, 90, 100)
"""Architectures whose float64 units keep up with a sum over samples, and the interpreter; others have 2 a clock and SM,
and the sums are in pairs there. `docs/notes/sums.md` counts both."""

RENEWED = 16
"""Samples between two exchanges of a pair that bring its sum back to the first number."""


def smallest(dtype: torch.dtype) -> float:
    """Return δ, above the value that a tensor core assumes for a subnormal factor; 0 if none is used.

    δ is twice the smallest normal number, so that ‖x_t‖ + δ√d stays an upper bound where the tensor core itself
    computes ‖x_t‖² (half-Gram's diagonal) and loses most of it.
    """
    return 0.0 if dtype == torch.float32 else 2.0 * float(torch.finfo(dtype).smallest_normal)


def tensor_core(architecture: int) -> TensorCore:
    """Return the tensor core of an architecture (compute capability × 10): the coarsest if none is published."""
    return TENSOR_CORES.get(architecture, COARSEST)


def sum_roundings(chain: int, per_term: float, pieces: int = PIECES) -> float:
    """Return κ of a sum of any number of products, which its length does not enter.

    Args:
        chain: products in one accumulation, at most. It counts whole: the tensor core decides which share a block.
        per_term: roundings of a product in it, for each product.
        pieces: accumulations that are added in float32, one rounding each; 0 where all are added in float64.

    A term's own rounding counts one (that of a product, of a float32 factor, or of a total to float32), and one stands
    for all additions in float64: a sum has fewer than 2³¹ frames, and 2²⁹ pieces, of 2⁻⁵³ each. A frame whose product
    is 0 rounds nothing, so padding, wherever it is, adds nothing to κ.
    """
    return chain * per_term + pieces + 2.0


def roundings(dtype: torch.dtype, architecture: int) -> float:
    """Return the roundings of a product in one accumulation of `tl.dot`, which uses no tensor cores for float32."""
    return ROUNDINGS_FMA if dtype == torch.float32 else tensor_core(architecture).roundings
