"""Group *model*: the 608.8 M-parameter Parakeet-CTC with LoRA, random weights, one micro-batch a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from bench.cases.models import CASES, Case
from bench.contenders import registry, with_fastdp
from bench.harness.checker import check
from bench.harness.session import Bench
from bench.names import NON_PRIVATE, OPACUS_GHOST, OPACUS_HOOKS, ours

CASE = CASES["parakeet-600m-lora"]
MIXED = CASES["parakeet-600m-lora-mixed"]
FRAMES = 188  # 15 s
SHOWN = (NON_PRIVATE, ours("bookkeeping"), ours("mixed"), OPACUS_HOOKS, OPACUS_GHOST)
ON_GPU = (
    (64, SHOWN),
    (128, SHOWN[:3]),  # where the GPU, and no longer the host that feeds it, sets the pace
)


def test_mixed_precision(bench: Bench) -> None:
    """Float32 adapters on a bfloat16 base, as the recipes and most trainers have it, beside the same of PEFT."""
    if not bench.device.startswith("cuda"):
        pytest.skip("of a GPU")
    names = (NON_PRIVATE, ours("bookkeeping"))
    _check(bench, MIXED, names)
    for size, _ in ON_GPU:
        bench.run(
            "model",
            MIXED,
            size,
            FRAMES,
            with_memory=True,
            with_rates=True,
            rounds=9,
            seconds=6,
            contenders=names,
        )


def test_model(bench: Bench) -> None:
    if not bench.model or bench.quick:
        pytest.skip("--benchmark-model runs the 608.8 M model on a CPU")
    on_gpu = bench.device.startswith("cuda")
    _check(bench, CASE, with_fastdp(SHOWN) if on_gpu else tuple(registry()))
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


def _check(bench: Bench, case: Case, names: Sequence[str]) -> None:
    """Verdicts from two of the 24 blocks: float64 one-by-one gradients of 608.8 M parameters are 5 GB and minutes."""
    small = replace(case, layers=2)
    model = small.model(32, bench.dtype, bench.device)
    factories = {name: factory for name, factory in registry().items() if name in names}
    bench.adopt(case, check(factories, small, model, small.batch(2, 32, bench.dtype, bench.device)))
