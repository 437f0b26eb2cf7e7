"""Inner products that are as far off as a search can make them, against the bound."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Dots = Callable[[Tensor, Tensor], Tensor]
"""a, b [n, chain] of one 16-bit dtype to float32 [n], the rows' inner products."""


def random_rows(
    rows: int, chain: int, dtype: torch.dtype, generator: torch.Generator, tiny: bool = False
) -> tuple[Tensor, Tensor]:
    """Signs, digits and exponents at random, over ranges from none to the format's; tiny: subnormals among them."""

    def uniform(width: int = chain) -> Tensor:
        return torch.rand(rows, width, generator=generator, device=generator.device, dtype=torch.float64)

    spread, signed = (13 * uniform(1)).floor(), uniform(1) < 0.5

    def matrix() -> Tensor:
        values = (1 + uniform()) * torch.exp2(-(uniform() * spread).round())
        values = torch.where(signed & (uniform() < 0.5), -values, values)
        if tiny:
            values = torch.where(uniform() < 0.2, values * torch.finfo(dtype).smallest_normal / 2, values)
        return values.to(dtype)

    return matrix(), matrix()


def ratio(dots: Dots, a: Tensor, b: Tensor, bound: float) -> Tensor:
    """|computed - exact| over bound · Σ|ab|, each row's."""
    terms = a.double() * b.double()
    return (dots(a, b).double() - terms.sum(1)).abs() / (bound * terms.abs().sum(1))


def seeds(chain: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows that are bad by design: equal terms, and terms just below a place that is cut beside a large one."""
    most = 2.0 - torch.finfo(dtype).eps
    a, b = (torch.ones(40, chain, dtype=torch.float64) for _ in range(2))
    a[0] = b[0] = most
    a[1] = most
    for i, j in enumerate(range(19, 28)):
        for k, (large, sign) in enumerate(((1.0, 1.0), (1.0, -1.0), (most, 1.0), (most, -1.0))):
            row = 4 + 4 * i + k
            a[row], b[row] = most * 2.0 ** -(j // 2), sign * most * 2.0 ** -(j - j // 2)
            a[row, 0], b[row, 0] = large, 1.0
    return a.to(dtype), b.to(dtype)


def worst(
    dots: Dots, dtype: torch.dtype, chain: int, bound: float, rows: int, rounds: int, device: str = "cpu"
) -> float:
    """The largest `ratio` that random starts, the seeds and changes that make it larger lead to."""
    generator = torch.Generator(device).manual_seed(0)

    def uniform(width: int) -> Tensor:
        return torch.rand(len(a), width, generator=generator, device=device)

    start = [random_rows(rows, chain, dtype, generator), seeds(chain, dtype)]
    a, b = (torch.cat([part.to(device) for part in parts]) for parts in zip(*start, strict=True))
    best = ratio(dots, a, b, bound)
    factors = torch.tensor([1.0, 0.5, 2.0, -1.0], device=device, dtype=dtype)
    for _ in range(rounds):
        # two places or so change: new factors, or the old ones times a power of two, or with another sign
        places, anew = uniform(chain) < 2.0 / chain, uniform(1) < 0.5
        tried = []
        for old, new in zip((a, b), random_rows(len(a), chain, dtype, generator), strict=True):
            scaled = (old * factors[(4 * uniform(chain)).long() % 4]).clamp(-(2.0**12), 2.0**12)
            scaled = torch.where(scaled.abs() < 2.0**-13, old, scaled)  # subnormals have a bound of their own
            tried.append(torch.where(places, torch.where(anew, new, scaled), old))
        now = ratio(dots, tried[0], tried[1], bound)
        better = (now > best)[:, None]
        a, b = (torch.where(better, new, old) for new, old in zip(tried, (a, b), strict=True))
        best = torch.maximum(best, now)
    return float(best.max())
