"""Group *model*: the 608.8 M-parameter Parakeet-CTC with LoRA, random weights, one micro-batch a step."""

from __future__ import annotations

import pytest

from bench.cases import CASES
from bench.checker import check
from bench.contenders import NON_PRIVATE, OPACUS_GHOST, OPACUS_HOOKS, ours, registry
from bench.session import Bench

CASE = CASES["parakeet-600m-lora"]
FRAMES = 188  # 15 s
SHOWN = (NON_PRIVATE, ours("bookkeeping"), ours("keep_small"), OPACUS_HOOKS, OPACUS_GHOST)
ON_GPU = (
    (64, SHOWN),
    (128, SHOWN[:3]),  # where the GPU, and no longer the host that feeds it, sets the pace
)


def test_model(bench: Bench) -> None:
    if not bench.model or bench.quick:
        pytest.skip("--benchmark-model runs the 608.8 M model on a CPU")
    # float64 one-by-one gradients of 608.8 M parameters are 5 GB and minutes: the same layers at two of the 24
    # blocks are checked instead.
    on_gpu = bench.device.startswith("cuda")
    small = type(CASE)(CASE.name, CASE.title, CASE.family, CASE.rank, CASE.width, 2)
    model = small.model(32, bench.dtype, bench.device)
    factories = {name: factory for name, factory in registry().items() if not on_gpu or name in SHOWN}
    bench.adopt(CASE, check(factories, small, model, small.batch(2, 32, bench.dtype, bench.device)))
    if not on_gpu:
        bench.run("model", CASE, 1, FRAMES, rounds=3, with_rates=True)
        return
    for size, names in ON_GPU:
        bench.run(
            "model",
            CASE,
            size,
            FRAMES,
            with_memory=True,
            with_rates=True,
            rounds=11,
            seconds=12,
            contenders=names,
        )
