"""What a case draws: sizes, element types, hostile values and layouts in memory, all from the case's own generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.memory import Strided, strided

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Around the sizes of vectors, tiles (32), chunks (64), strips (128) and blocks (512).
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 20, 31, 32, 33, 47, 63, 64, 65, 70)
LARGE = (100, 127, 128, 129, 200, 255, 257, 511, 512, 513, 600)
_EXPONENTS = {torch.float32: 18.0, torch.bfloat16: 18.0, torch.float16: 3.0, torch.float64: 160.0}
VALUES = ("normal", "scaled", "extreme", "not finite", "zero")


@dataclass(frozen=True)
class Values:
    """Drawn numbers and how they were drawn: a name of VALUES."""

    tensor: Tensor
    kind: str


class Draw:
    """The generator of one case; `notes` says what it drew, for the message of a failure."""

    def __init__(self, seed: int, case: int) -> None:
        self.rng = np.random.default_rng([seed, case])
        self.notes: dict[str, Any] = {}

    def note(self, name: str, value: Any) -> Any:
        """Keep a drawn value for the message, and return it."""
        self.notes[name] = value
        return value

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def one_of(self, values: Sequence[Any]) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def integer(self, least: int, most: int) -> int:
        return int(self.rng.integers(least, most + 1))

    def sizes(self, count: int, most: int) -> tuple[int, ...]:
        """Sizes whose product is at most `most`; a large one now and then."""
        drawn: list[int] = []
        for _ in range(count):
            room = most // max(1, int(np.prod(drawn, dtype=np.int64)) if drawn else 1)
            pool = LARGE if self.chance(0.12) else SIZES
            fitting = [size for size in pool if size <= room] or [1]
            drawn.append(self.one_of(fitting))
        self.rng.shuffle(drawn)
        return tuple(drawn)

    def dtype(self) -> torch.dtype:
        return DTYPES[int(self.rng.choice(4, p=(0.45, 0.15, 0.15, 0.25)))]

    def values(self, shape: Sequence[int], dtype: torch.dtype, kind: str | None = None) -> Values:
        """Numbers of one kind of VALUES."""
        kind = kind or VALUES[int(self.rng.choice(5, p=(0.5, 0.17, 0.2, 0.1, 0.03)))]
        tensor = torch.from_numpy(self.rng.standard_normal(tuple(shape)))
        if kind == "scaled":
            tensor = tensor * self._scale(dtype)
        elif kind == "zero":
            tensor = torch.zeros_like(tensor) * tensor.sign()
        elif kind in ("extreme", "not finite") and tensor.numel():
            pool = self._pool(dtype) if kind == "extreme" else np.array([np.nan, np.inf, -np.inf])
            share = self.rng.uniform(0, 1) if kind == "extreme" else 2.0 / tensor.numel()
            chosen = torch.from_numpy(self.rng.random(tuple(shape)) < share)
            tensor = torch.where(chosen, torch.from_numpy(self.rng.choice(pool, tuple(shape))), tensor)
        return Values(tensor.to(dtype), kind)

    def _scale(self, dtype: torch.dtype) -> float:
        return float(10.0 ** self.rng.uniform(-_EXPONENTS[dtype], _EXPONENTS[dtype]))

    @staticmethod
    def _pool(dtype: torch.dtype) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Zeros, subnormal numbers, and the ends of the range, of both signs."""
        info = torch.finfo(dtype)
        subnormal = info.smallest_normal * info.eps
        pool = [0.0, subnormal, 3 * subnormal, info.smallest_normal, info.smallest_normal**0.5]
        pool += [info.eps, 1.0, info.max**0.5, info.max / 4, info.max]
        return np.array([*pool, *(-value for value in pool)])

    def layout(self, dense: Tensor) -> Strided:
        """The same values elsewhere: axes in any order, steps, gaps, reversed axes; NaN in between."""
        rng, axes = self.rng, dense.dim()
        plain = self.chance(0.4)
        order = list(range(axes)) if plain else [int(axis) for axis in rng.permutation(axes)]
        step = 1 if plain or self.chance(0.6) else self.integer(2, 3)
        gaps = [0 if plain else self.integer(0, 2) for _ in order]
        reverse = [not plain and self.chance(0.2) for _ in order]
        return strided(dense, order, step, gaps, reverse)
