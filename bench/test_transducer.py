"""Group *transducer*: the fused loss beside losses on the joint network's logits, and the floor of its products."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cases import transducer
from bench.cases.transducer import COMPOSED, CONTENDERS, FLOOR, TITLES, CannotLoad, Problem
from bench.harness import loss_memory, memory
from bench.harness.checker import CANNOT, OK, WRONG
from bench.harness.results import Row, compare_rows
from bench.harness.session import Bench
from bench.harness.timer import Call, interleave, stopwatch

KINDS = tuple(CONTENDERS)
TOLERANCE = 1e-4
LARGEST = Problem("rnnt", B=8, T=188, U=50, V=8198)
"""Eight utterances of 15 s, as Parakeet-TDT 0.6B sees them."""

MIDDLE = replace(LARGEST, B=1, T=94, U=25)
"""One utterance of 7.5 s: from it one field at a time grows."""

CURVES = {
    "batch": ("B", (1, 2, 4)),
    "T": ("T", (47, 94, 188)),
    "U": ("U", (12, 25, 50)),
    "V": ("V", (1026, 4098, 8198)),
}
"""By axis the field that varies; the others are those of MIDDLE."""


@pytest.mark.parametrize("size", [1, 8], ids="B{}".format)
@pytest.mark.parametrize("kind", KINDS)
def test_loss(bench: Bench, kind: str, size: int) -> None:
    if bench.quick and size > 1:
        pytest.skip("--benchmark-quick: one size")
    # the composition's time per utterance is the same in any batch, and at eight takes minutes a round
    left_out = (COMPOSED,) if size > 1 else ()
    _run(bench, replace(LARGEST, kind=kind, B=size), None, left_out)


@pytest.mark.parametrize("axis", CURVES)
@pytest.mark.parametrize("kind", KINDS)
def test_growth(bench: Bench, kind: str, axis: str) -> None:
    field, values = CURVES[axis]
    for value in values[:1] if bench.quick else values:
        problem = replace(MIDDLE, **{"kind": kind, field: value})  # type: ignore[arg-type]
        _run(bench, problem, axis, (COMPOSED,))


def _run(bench: Bench, problem: Problem, axis: str | None, left_out: tuple[str, ...]) -> None:
    problem = replace(problem, device=bench.device)
    if bench.quick:
        problem = replace(problem, B=1, T=5, U=2, V=32)
    rows, runners = {}, {}
    for name in [name for name in CONTENDERS[problem.kind] if name not in left_out]:
        row = rows[name] = Row(problem.kind, TITLES[problem.kind], problem.shape, name, axis)
        try:
            if name != FLOOR:
                row.error = float(f"{transducer.error(name, problem):.1e}")
            step = transducer.step_of(name, problem)
        except CannotLoad as failure:
            row.status, row.reason = CANNOT, str(failure)
            continue
        if row.error is not None and not row.error <= TOLERANCE:
            row.status, row.reason = WRONG, f"off by {row.error:.1e} (limit {TOLERANCE:.0e})"
            continue
        runners[name] = Call(step)
    taken = interleave(
        runners,
        rounds=bench.rounds,
        seconds=bench.seconds,
        least=2 if bench.quick else 3,
        measure=stopwatch(bench.device),
    )
    for name, samples in taken.items():
        rows[name].timed(samples)
        if name == FLOOR:
            continue
        if bench.device.startswith("cuda"):
            rows[name].peak_mib = round(memory.cuda_peak(runners[name].step), 1)
        else:
            rows[name].peak_mib = loss_memory.peak(name, problem)
    compare_rows(rows.values(), base=FLOOR)
    # two files: `-k loss` and `-k growth` take minutes each, and neither overwrites the other's results
    bench.record("transducer" if axis is None else "transducer_growth", rows.values(), taken)
    assert rows[FLOOR].status == OK
