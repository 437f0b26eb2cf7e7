"""Group *model*: the 608.8 M-parameter Parakeet-CTC with LoRA, random weights, one micro-batch a step."""

from __future__ import annotations

import pytest

from bench.cases import CASES
from bench.checker import check
from bench.contenders import registry
from bench.session import Bench

CASE = CASES["parakeet-600m-lora"]
FRAMES = 188  # 15 s


def test_model(bench: Bench) -> None:
    if not bench.model or bench.quick:
        pytest.skip("--benchmark-model runs the 608.8 M model on a CPU")
    # float64 one-by-one gradients of 608.8 M parameters are 5 GB and minutes: the same layers at two of the 24
    # blocks are checked instead.
    on_gpu = bench.device.startswith("cuda")
    small = type(CASE)(CASE.name, CASE.title, CASE.family, CASE.rank, CASE.width, 2)
    model = small.model(32, bench.dtype, bench.device)
    bench.adopt(CASE, check(registry(), small, model, small.batch(2, 32, bench.dtype, bench.device)))
    bench.run("model", CASE, 16 if on_gpu else 1, FRAMES, with_memory=on_gpu, rounds=9 if on_gpu else 3)
