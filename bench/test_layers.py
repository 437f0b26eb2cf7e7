"""Group *layers*: forward, backward, clip and sum of one layer behind a LayerNorm; no noise, plain SGD."""

from __future__ import annotations

import pytest

from bench.cases import CASES
from bench.contenders import Settings
from bench.session import Bench

SETTINGS = Settings(noise=0.0, optimizer="sgd")


@pytest.mark.parametrize("name", ["linear-layer", "lora-layer", "depthwise-layer"])
def test_layer(bench: Bench, name: str) -> None:
    for frames in (16,) if bench.quick else (50, 150, 500):
        size = 2 if bench.quick else 8
        bench.run("layers", CASES[name], size, frames, settings=SETTINGS, seconds=4)
