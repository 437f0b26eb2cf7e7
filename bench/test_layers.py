"""Group *layers*: forward, backward, clip and sum of one layer behind a LayerNorm; no noise, plain SGD."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cases.models import CASES
from bench.contenders import Settings, with_fastdp
from bench.harness.session import Bench
from bench.names import NON_PRIVATE, OPACUS_GHOST, OPACUS_HOOKS, OWN_LAYERS, TIMED_STRATEGIES, ours

SETTINGS = Settings(noise=0.0, optimizer="sgd")
SHOWN = (NON_PRIVATE, OWN_LAYERS, *map(ours, TIMED_STRATEGIES), OPACUS_HOOKS, OPACUS_GHOST)


@pytest.mark.parametrize("name", ["linear-layer", "lora-layer", "depthwise-layer"])
def test_layer(bench: Bench, name: str) -> None:
    for frames in (16,) if bench.quick else (50, 150, 500):
        size = 2 if bench.quick else 8
        bench.run("layers", CASES[name], size, frames, settings=SETTINGS, seconds=4)


@pytest.mark.parametrize("name", ["lstm-layer", "gru-layer"])
def test_recurrent_layer(bench: Bench, name: str) -> None:
    """Beside Opacus's DPLSTM and DPGRU, which its contenders have in place of torch's layer: tens of seconds a step."""
    size, frames = (2, 16) if bench.quick else (32, 100)
    case = replace(CASES[name], width=16) if bench.quick else CASES[name]
    shown = with_fastdp(SHOWN)
    bench.run("layers", case, size, frames, settings=SETTINGS, seconds=4, contenders=shown)


def test_attention(bench: Bench) -> None:
    """Beside Opacus's DPMultiheadAttention, which its contenders have in place of torch's layer."""
    size, frames = (2, 16) if bench.quick else (32, 100)
    case = replace(CASES["attention-layer"], width=16) if bench.quick else CASES["attention-layer"]
    shown = with_fastdp(SHOWN)
    bench.run("layers", case, size, frames, settings=SETTINGS, contenders=shown)
