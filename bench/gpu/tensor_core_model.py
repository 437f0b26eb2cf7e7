"""A tensor core in software, bit for bit, with its properties as parameters: what the probes are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "toward zero": torch.trunc,
    "to nearest": torch.round,
    "down": torch.floor,
}
_NOTHING = -10_000.0  # the exponent of a term that is not there


@dataclass(frozen=True)
class Model:
    """Inner products of 16-bit rows as a device with these properties makes them; call it with a, b [n, chain].

    Attributes:
        block: products that are aligned and added together, with the accumulator.
        extra: bits below float32's 23 that the alignment keeps.
        align: how terms are cut in the alignment; final: how a block's sum is cut to float32. Both of `CUTS`.
        late: the accumulator is added to the block's sum, and not aligned with its products.
        subnormals: factors below the format's normal numbers are taken; else they are 0.
        zeros: a factor 0 has the exponent of the smallest normal number, as subnormals do; else none.
    """

    block: int
    extra: int
    align: str = "toward zero"
    final: str = "toward zero"
    late: bool = False
    subnormals: bool = True
    zeros: bool = False

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        least = torch.finfo(a.dtype).smallest_normal
        factors = [t.double() for t in (a, b)]
        if not self.subnormals:
            factors = [torch.where(f.abs() < least, 0.0, f) for f in factors]
        terms = factors[0] * factors[1]  # exact: at most 22 bits
        exponents = sum((_exponent(f, least) for f in factors), torch.zeros(()))
        if not self.zeros:
            exponents = torch.where(terms == 0, _NOTHING, exponents)
        total = torch.zeros_like(terms[:, :1])
        for k in range(0, a.shape[1], self.block):
            some, of_some = terms[:, k : k + self.block], exponents[:, k : k + self.block]
            of_total = torch.where(total == 0, _NOTHING, _exponent(total, 2.0**-126))
            if self.late:
                some, of_some = self._aligned_sum(some, of_some), of_some.amax(1, keepdim=True)
            total = self._aligned_sum(torch.cat([some, total], 1), torch.cat([of_some, of_total], 1))
            unit = torch.exp2(_exponent(total, 2.0**-126) - 23)
            total = CUTS[self.final](total / unit) * unit
        return total[:, 0].float()

    def _aligned_sum(self, terms: Tensor, exponents: Tensor) -> Tensor:
        """Terms cut at 2^-(23 + extra) of the largest exponent, added exactly: [n, 1]."""
        unit = torch.exp2(exponents.amax(1, keepdim=True).clamp_min(-133.0) - (23 + self.extra))
        return (CUTS[self.align](terms / unit) * unit).sum(1, keepdim=True)


def _exponent(values: Tensor, least: float) -> Tensor:
    """⌊log₂|v|⌋, not below that of `least`."""
    return (torch.frexp(values.abs().clamp_min(least)).exponent - 1).double()
