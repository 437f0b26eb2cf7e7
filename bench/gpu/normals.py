"""The noise's distribution over 10¹⁰ draws: moments, tails, goodness of fit, independence.

    python -m bench.gpu.normals --device cuda --draws 1e10      $OUT/<device>/many_normals.json (OUT: bench/results)
    python -m bench.gpu.normals --draws 1e7                     on this machine's CPU

Draws come in blocks of four streams, two parameters at two steps of a run, which differ in their nonces as those of
an engine do; each block is reduced on the device to sums, and the sums are judged at the end. Every figure is a
number of standard errors from what independent standard normals give, or a probability under them; the limits leave
a sound generator a chance of some 1e-5 to fail one. The key is fixed, so that a result can be reproduced;
`--fresh-key` takes one from the operating system.

`tests/ops/test_many_normals.py` holds 10⁸ draws to the same properties in the test suite.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.harness import machine
from dpkernels.ops import chacha20_normal

KEY = bytes(range(100, 132))
STREAMS = ("parameter 0, step 0", "parameter 1, step 0", "parameter 0, step 1", "parameter 1, step 1")
LANES = 128
"""16 blocks of 8 normals: half of what a warp draws, and what a round of the widest CPU kernel does."""

REACH, PER_UNIT = 8, 256
"""Bins of 1/256 from -8 to 8; what is beyond falls into the outermost."""

LAGS = (1, 2, 3, 4, 7, 8, 9, 16, 127, 128, 255, 256, 1024, 16384)
TAILS = (4.0, 4.5, 5.0, 5.5, 6.0, 6.5)
MOMENTS = ((0, 1), (1, 2), (0, 15), (3, 96), (0, 945), (15, 10170), (0, 135135), (105, 2016000))
"""Of z to z⁸: mean and variance."""

SINGLE, OF_MANY, UNLIKELY = 5.0, 6.5, 1e-6
"""Standard errors for one figure and for the largest of some 10⁴; the least probability."""


@dataclass(frozen=True)
class Figure:
    """One judged figure: `value` in units of `unit`, sound where |value| ≤ limit (probabilities: ≥)."""

    name: str
    value: float
    limit: float
    unit: str = "standard errors"

    @property
    def sound(self) -> bool:
        """NaN is not."""
        return self.value >= self.limit if self.unit == "probability" else abs(self.value) <= self.limit


@dataclass
class Sums:
    """What is kept of the draws; all float64 or int64 tensors on their device."""

    device: str
    draws: int = 0
    largest: float = 0.0
    rows: int = 0  # of LANES
    columns: int = 0  # draws of one stream
    kept: dict[str, Tensor] = field(default_factory=dict)
    pairs: dict[int, int] = field(default_factory=dict)  # of each lag

    def _add(self, name: str, value: Tensor) -> None:
        self.kept[name] = self.kept[name] + value if name in self.kept else value

    def take(self, block: Tensor) -> None:
        """Add a block of draws, [streams, n] with n a multiple of LANES."""
        z = block.double()
        flat = z.reshape(-1)
        square = z * z
        cube = square * z
        self.draws += flat.numel()
        self.columns += z.shape[1]
        wide, wider = square.reshape(-1), cube.reshape(-1)
        fourth = wide * wide
        powers = torch.stack(
            (
                flat.sum(),
                wide.sum(),
                wider.sum(),
                fourth.sum(),
                wider @ wide,
                wider @ wider,
                fourth @ wider,
                fourth @ fourth,
            )
        )
        self._add("powers", powers)
        del wider, cube, fourth
        cell = ((flat + REACH) * PER_UNIT).clamp_(0, 2 * REACH * PER_UNIT - 1).nan_to_num_(0).int()
        self._add("bins", torch.bincount(cell, minlength=2 * REACH * PER_UNIT))
        del cell
        far = flat[flat.abs() > TAILS[0]]
        cuts = torch.tensor(TAILS, dtype=torch.float64, device=flat.device)
        self._add("upper", (far[:, None] > cuts).sum(0))
        self._add("lower", (far[:, None] < -cuts).sum(0))
        if far.numel():
            self.largest = max(self.largest, float(far.abs().max()))
        for lag in LAGS:
            if lag < z.shape[1]:
                self.pairs[lag] = self.pairs.get(lag, 0) + z.shape[0] * (z.shape[1] - lag)
                products = [row[lag:] @ row[:-lag] for row in z]
                self._add(f"lag {lag}", torch.stack(products).sum())
        spread = square.sub_(1)
        parts = math.gcd(
            z.shape[1] // LANES, 256
        )  # one product with so long a sum would fill a corner of a GPU
        for name, values in (("", z), ("squares of ", spread)):
            streams = values.reshape(len(z), parts, -1).transpose(0, 1)
            self._add(f"{name}streams", (streams @ streams.transpose(1, 2)).sum(0))
            lanes = values.reshape(parts, -1, LANES)
            self._add(f"{name}lanes", (lanes.transpose(1, 2) @ lanes).sum(0))
        self.rows += flat.numel() // LANES


def blocks(
    draws: int, device: str, dtype: torch.dtype, key: bytes = KEY, size: int | None = None
) -> Iterator[Tensor]:
    """Blocks [4, size] until there are that many draws; step and counter move on, as in a run."""
    size = size or (1 << 23 if device.startswith("cuda") else 1 << 17)
    for index in range(-(-draws // (len(STREAMS) * size))):
        run, part = divmod(index, 16)
        streams = []
        for stream in range(len(STREAMS)):
            step, parameter = 2 * run + stream // 2, stream % 2
            nonce = bytes([1, parameter]) + step.to_bytes(10, "little")
            counter = part * size // 8
            streams.append(
                chacha20_normal(size, key=key, nonce=nonce, counter=counter, device=device, dtype=dtype)
            )
        yield torch.stack(streams)


def of_poisson(count: int, mean: float) -> float:
    """Twice the smaller of P(X ≤ count) and P(X ≥ count), at most 1; X is Poisson, as rare draws are."""
    k, m = torch.tensor(float(count), dtype=torch.float64), torch.tensor(mean, dtype=torch.float64)
    at_most = float(torch.special.gammaincc(k + 1, m))
    at_least = 1.0 if count == 0 else float(torch.special.gammainc(k, m))
    return min(1.0, 2 * min(at_most, at_least))


def figures(sums: Sums) -> list[Figure]:
    """Everything that is judged."""
    n = sums.draws
    kept = {name: value.cpu() for name, value in sums.kept.items()}
    judged = []
    for power, (mean, variance) in enumerate(MOMENTS, start=1):
        off = float(kept["powers"][power - 1]) / n - mean
        judged.append(Figure(f"moment {power}", off / math.sqrt(variance / n), SINGLE))

    below = kept["bins"].cumsum(0)
    edges = torch.arange(1, len(below), dtype=torch.float64) / PER_UNIT - REACH
    cdf = torch.special.ndtr(edges)
    distance = float((below[:-1] / n - cdf).abs().max()) * math.sqrt(n)
    # Kolmogorov's limit law; over bins the distance is at most that over all draws.
    tail = 2 * sum((-1) ** (j - 1) * math.exp(-2 * j * j * distance * distance) for j in range(1, 101))
    tail = 1.0 if distance < 0.2 else min(1.0, tail)
    judged.append(Figure("Kolmogorov-Smirnov", tail, UNLIKELY, "probability"))
    expected = n * torch.diff(cdf, prepend=torch.zeros(1).double(), append=torch.ones(1).double())
    common = expected >= 20
    counts = torch.cat((kept["bins"][common], kept["bins"][~common].sum()[None])).double()
    means = torch.cat((expected[common], expected[~common].sum()[None]))
    filled = means >= 20
    statistic = ((counts - means).square() / means)[filled].sum()
    freedom = torch.tensor(float(filled.sum()) - 1, dtype=torch.float64)
    chance = float(torch.special.gammaincc(freedom / 2, statistic / 2))
    judged.append(Figure(f"chi-square of {int(filled.sum())} bins", chance, UNLIKELY, "probability"))
    for side in ("lower", "upper"):
        for cut, count in zip(TAILS, kept[side].tolist(), strict=True):
            mean = n * math.erfc(cut / math.sqrt(2)) / 2
            judged.append(
                Figure(
                    f"{side} tail beyond {cut}: {count} for {mean:.1f}",
                    of_poisson(count, mean),
                    UNLIKELY,
                    "probability",
                )
            )

    for lag, pairs in sums.pairs.items():
        judged.append(Figure(f"lag {lag}", float(kept[f"lag {lag}"]) / math.sqrt(pairs), SINGLE))
    for name, deviation in (("", 1.0), ("squares of ", 2.0)):
        lanes = kept[f"{name}lanes"] / (deviation * math.sqrt(sums.rows))
        apart = ~torch.eye(LANES, dtype=torch.bool)
        judged.append(Figure(f"{name}lanes, largest of 8,128", float(lanes[apart].abs().max()), OF_MANY))
        # Each lane has the variance of the whole: E z² = 1, E (z² - 1)² = 2; their variances are 2 and 56.
        lane_variances = (
            (lanes.diagonal() - math.sqrt(sums.rows)) * deviation / math.sqrt(2 if name == "" else 56)
        )
        judged.append(
            Figure(f"variance of {name}lanes, largest of 128", float(lane_variances.abs().max()), OF_MANY)
        )
        streams = kept[f"{name}streams"] / (deviation * math.sqrt(sums.columns))
        for i in range(len(STREAMS)):
            for j in range(i):
                title = f"{name}streams: {STREAMS[j]}; {STREAMS[i]}"
                judged.append(Figure(title, float(streams[i, j]), SINGLE))
    return judged


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.normals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draws", type=float, default=1e8)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop early after this long")
    parser.add_argument("--fresh-key", action="store_true")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch sees no CUDA device; fix: --device cpu", file=sys.stderr)
        return 2
    key = os.urandom(32) if options.fresh_key else KEY
    sums, start = Sums(options.device), time.monotonic()
    for block in blocks(int(options.draws), options.device, getattr(torch, options.dtype), key):
        sums.take(block)
        if time.monotonic() - start > options.seconds:
            break
    results = figures(sums)
    seconds = time.monotonic() - start
    result = {
        "about": machine.about(options.device),
        "draws": sums.draws,
        "dtype": options.dtype,
        "fresh_key": options.fresh_key,
        "seconds": round(seconds, 2),
        "largest": sums.largest,
        "figures": [vars(figure) | {"sound": figure.sound} for figure in results],
    }
    machine.save(result, "many_normals")
    for figure in results:
        mark = "ok " if figure.sound else "BAD"
        print(f"{mark} {figure.name:70} {figure.value:10.3g} {figure.unit}, limit {figure.limit:g}")
    print(f"{sums.draws:.3g} {options.dtype} draws, largest {sums.largest:.3f}, in {seconds:.1f} s")
    return 0 if all(figure.sound for figure in results) else 1


if __name__ == "__main__":
    sys.exit(main())
