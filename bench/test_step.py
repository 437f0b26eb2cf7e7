"""Group *step*: a whole optimizer step of small recognisers, and how its time and memory grow.

Every contender: gradients cleared, forward, backward, clip, sum, noise (the private ones), AdamW.
"""

from __future__ import annotations

import pytest
import torch

from bench.cases.models import CASES, Case
from bench.harness import memory
from bench.harness.checker import OK
from bench.harness.results import Row
from bench.harness.session import Bench

MODELS = ("parakeet-lora", "parakeet-full", "whisper-lora", "whisper-full")
SIZE, FRAMES = 8, 150
# The largest batch is searched with shorter utterances: it takes some seven steps a contender.
LIMIT_MIB, LIMIT_FRAMES = 256, 75


@pytest.mark.parametrize("name", MODELS)
def test_step(bench: Bench, name: str) -> None:
    if bench.quick:
        if name != "parakeet-lora":
            pytest.skip("--benchmark-quick: one case")
        bench.run("step", CASES["tiny-lora"], 2, 32, with_memory=True)
        return
    rows = bench.run("step", CASES[name], SIZE, FRAMES, with_memory=True)
    assert any(row.status == OK for row in rows), "no contender gives the right gradient"


@pytest.mark.parametrize("name", ["parakeet-lora", "whisper-lora"])
def test_compiled_step(bench: Bench, name: str) -> None:
    """A step under torch.compile beside eager code. Its rows have an axis of their own, apart from the main tables."""
    if bench.quick:
        pytest.skip("--benchmark-quick: compiling takes longer than all other cases")
    torch._dynamo.reset()
    rows = bench.run("step", CASES[name], SIZE, FRAMES, axis="compiled", compiled=True)
    assert all(row.status == OK for row in rows)


@pytest.mark.parametrize("name", ["parakeet-lora"])
def test_largest_batch(bench: Bench, name: str) -> None:
    if bench.quick or bench.device.startswith("cuda"):
        pytest.skip("searched on a CPU, in fresh processes")
    case = CASES[name]
    shape = {"T": LIMIT_FRAMES} | ({} if case.rank is None else {"r": case.rank})
    rows = []
    for contender, verdict in bench.verdicts(case).items():
        row = Row(case.name, case.title, shape, contender, "limit", verdict.status, verdict.reason)
        if verdict.status == OK:

            def peak(size: int, contender: str = contender) -> float | None:
                return bench.peak(case, contender, size, LIMIT_FRAMES)

            row.largest_batch = memory.largest_batch(peak, LIMIT_MIB, most=64)
            row.limit_mib = LIMIT_MIB
        rows.append(row)
    bench.record("step", rows, {})


def _curve(bench: Bench, case: Case, axis: str, points: list[tuple[Case, int, int]]) -> None:
    for point_case, size, frames in points:
        bench.run("step", point_case, size, frames, axis=axis, rounds=3, seconds=12, with_memory=True)


@pytest.mark.parametrize("name", ["parakeet-lora"])
def test_growth_over_time(bench: Bench, name: str) -> None:
    case = CASES["tiny-lora" if bench.quick else name]
    frames = [32] if bench.quick else [32, 75, 150, 400, 1500]
    _curve(bench, case, "T", [(case, 1, t) for t in frames])


@pytest.mark.parametrize("name", ["parakeet-lora"])
def test_growth_over_batch(bench: Bench, name: str) -> None:
    case = CASES["tiny-lora" if bench.quick else name]
    _curve(bench, case, "batch", [(case, size, 75) for size in ([2] if bench.quick else [1, 2, 4, 8, 16])])


@pytest.mark.parametrize("name", ["parakeet-lora"])
def test_growth_over_rank(bench: Bench, name: str) -> None:
    case = CASES["tiny-lora" if bench.quick else name]
    ranks = [2] if bench.quick else [2, 8, 32, 128]
    _curve(bench, case, "rank", [(case.at_rank(rank), 4, 75) for rank in ranks])
