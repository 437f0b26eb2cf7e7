"""10⁸ draws of the noise, as a stream: what four million (test_chacha20.py) are too few to show.

The draws come in pieces that stay in the cache and are reduced to sums at once. DPKERNELS_DRAWS sets another number,
1e10 on a GPU. The key is fixed: what holds once holds always.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dpkernels.backends import native
from dpkernels.ops import chacha20_normal
from tests.slow import slow_cases

KEY = bytes(range(100, 132))
PIECE = 1 << 20
LANES = 128  # 16 blocks of 8 normals: what one round of the widest kernel makes
REACH, PER_UNIT = 8, 512  # bins of 1/512 from -8 to 8
LAGS = (1, 2, 7, 8, 9, 127, 128, 16384)
TAILS = (3.0, 4.0, 4.5, 5.0, 5.25, 5.5)

needs_native = pytest.mark.skipif(
    native.library("cpu").handle is None, reason=native.library("cpu").reason or "the CPU library loads"
)


def number_of_draws() -> int:
    return int(float(os.environ.get("DPKERNELS_DRAWS", "1e8")))


def pieces(draws: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of two streams that differ in the nonce only, as two steps of a run do; new ones every 64 pieces."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def piece(number: int, counter: int) -> Tensor:
        nonce = bytes([1, 0]) + number.to_bytes(10, "little")
        return chacha20_normal(PIECE, key=KEY, nonce=nonce, counter=counter, device=device)

    for index in range(-(-draws // (2 * PIECE))):
        step, part = divmod(index, 64)
        yield piece(2 * step, part * PIECE // 8), piece(2 * step + 1, part * PIECE // 8)


@dataclass
class Sums:
    """What is kept of a stream of draws."""

    draws: int
    powers: Tensor  # of z, 1 to 6
    bins: Tensor
    lags: Tensor
    lanes: Tensor  # Σ z_i z_j of the 128 draws of one round, [128, 128]
    squares: Tensor  # the same of z² - 1
    streams: Tensor  # Σ of first·second, and of (first² - 1)(second² - 1)


def reduce(stream: Iterator[tuple[Tensor, Tensor]]) -> Sums:
    found = None
    for pair in stream:
        one = Sums(0, *(torch.zeros((), dtype=torch.float64) for _ in range(6)))
        centred = []
        for z in pair:
            square = z * z
            cube = square * z
            dots = (z.sum(), z @ z, z @ square, square @ square, square @ cube, cube @ cube)
            bin_of = ((z + REACH) * PER_UNIT).clamp_(0, 2 * REACH * PER_UNIT - 1).int()
            rounds, spread = z.view(-1, LANES).float(), (square - 1).view(-1, LANES).float()
            one.draws += z.numel()
            one.powers = one.powers + torch.stack(dots).cpu()
            one.bins = one.bins + torch.bincount(bin_of, minlength=2 * REACH * PER_UNIT).cpu()
            one.lags = one.lags + torch.stack([z[lag:] @ z[:-lag] for lag in LAGS]).cpu()
            one.lanes = one.lanes + (rounds.T @ rounds).double().cpu()
            one.squares = one.squares + (spread.T @ spread).double().cpu()
            centred.append(square - 1)
        one.streams = torch.stack((pair[0] @ pair[1], centred[0] @ centred[1])).cpu()
        found = (
            one
            if found is None
            else Sums(*(a + b for a, b in zip(vars(found).values(), vars(one).values(), strict=True)))
        )
    assert found is not None
    return found


def check(sums: Sums) -> None:
    """Moments, tails, Kolmogorov-Smirnov, and no correlation between lanes, lags and streams.

    Each figure is within 5 standard errors of the standard normal's; KS below its 0.1 % point.
    """
    n = sums.draws
    for power, (mean, variance) in enumerate(
        ((0, 1), (1, 2), (0, 15), (3, 96), (0, 945), (15, 10170)), start=1
    ):
        found = float(sums.powers[power - 1]) / n
        assert abs(found - mean) < 5 * math.sqrt(variance / n), f"moment {power}: {found}"

    below = sums.bins.cumsum(0)
    edges = torch.arange(1, len(sums.bins) + 1, dtype=torch.float64) / PER_UNIT - REACH
    distance = (below[:-1] / n - torch.special.ndtr(edges[:-1])).abs().max()
    assert distance < 1.95 / math.sqrt(n), f"Kolmogorov-Smirnov: {distance:.2e}"
    for tail in TAILS:
        expected = n * math.erfc(tail / math.sqrt(2)) / 2
        cut = round((REACH - tail) * PER_UNIT)
        for side, count in (("lower", int(below[cut - 1])), ("upper", n - int(below[len(below) - cut - 1]))):
            assert abs(count - expected) < 5 * math.sqrt(expected) + 5, f"{side} tail beyond {tail}: {count}"

    for lag, total in zip(LAGS, sums.lags.tolist(), strict=True):
        assert abs(total) / n < 5 / math.sqrt(n), f"lag {lag}: {total / n}"
    rounds = n / LANES
    others = ~torch.eye(LANES, dtype=torch.bool)
    # 16,256 and 16,256 correlations: the largest of so many is near 4.3 standard errors.
    for what, gram, deviation in (("lanes", sums.lanes, 1), ("squares of lanes", sums.squares, 2)):
        worst = float((gram[others] / rounds).abs().max())
        assert worst < 6 * deviation / math.sqrt(rounds), f"{what}: {worst}"
    for what, total, deviation in zip(
        ("streams", "squares of streams"), sums.streams.tolist(), (1, 2), strict=True
    ):
        assert abs(total) / (n / 2) < 5 * deviation / math.sqrt(n / 2), f"{what}: {total}"


@needs_native
@pytest.mark.parametrize("draws", [16 * PIECE, *slow_cases(number_of_draws())])
def test_draws_are_independent_standard_normals(draws: int) -> None:
    check(reduce(pieces(draws)))


def shifted(z: Tensor) -> Tensor:
    return z + 3e-3


def wide(z: Tensor) -> Tensor:
    return z * 1.002


def cut_at_four(z: Tensor) -> Tensor:
    return torch.where(z.abs() > 4, z.sign(), z)


def coarse(z: Tensor) -> Tensor:
    """Uniforms of 8 bits would do this."""
    return (z * 64).round() / 64


def neighbours(z: Tensor) -> Tensor:
    return torch.where(
        torch.arange(z.numel(), device=z.device) % 2 == 0, z, (z + 0.02 * z.roll(1)) / math.sqrt(1.0004)
    )


def repeated_lane(z: Tensor) -> Tensor:
    rounds = z.view(-1, LANES).clone()
    rounds[:, 77] = rounds[:, 13]
    return rounds.view(-1)


def radius_shared(z: Tensor) -> Tensor:
    """Uncorrelated, but large together: only the squares show it."""
    rounds = z.view(-1, LANES).clone()
    rounds[:, 77] = rounds[:, 13] * rounds[:, 77].sign()
    return rounds.view(-1)


@pytest.mark.thinned(4)
@needs_native
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (shifted, "moment 1"),
        (wide, "moment 2"),
        (cut_at_four, "moment|tail"),
        (coarse, "Kolmogorov"),
        (neighbours, "lag 1"),
        (repeated_lane, "lanes|lag"),
        (radius_shared, "squares of lanes"),
    ],
)
def test_faults_of_the_normals_are_caught(fault: Callable[[Tensor], Tensor], message: str) -> None:
    stream = ((fault(first), fault(second)) for first, second in pieces(16 * PIECE))
    with pytest.raises(AssertionError, match=message):
        check(reduce(stream))


@needs_native
def test_streams_that_coincide_are_caught() -> None:
    with pytest.raises(AssertionError, match="streams"):
        check(reduce((first, first) for first, _ in pieces(16 * PIECE)))
