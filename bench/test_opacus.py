"""Group *opacus*: a whole optimizer step of each of Opacus's examples, beside Opacus's hooks and ghost clipping."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cases.models import CASES
from bench.contenders import registry, with_fastdp
from bench.harness.checker import OK, check
from bench.harness.session import Bench
from bench.names import FASTDP, NON_PRIVATE, OPACUS_GHOST, OPACUS_HOOKS, ours

SIZES = {
    # name: (B, side of the image or length of the text), as in Opacus's scripts
    "mnist": (64, 28),
    "cifar10": (512, 32),
    "resnet18": (32, 64),
    "imdb": (64, 256),
    "char-lstm": (800, 15),
    "bert": (8, 128),
}
SHOWN = (NON_PRIVATE, ours("bookkeeping"), OPACUS_HOOKS, OPACUS_GHOST)


@pytest.mark.parametrize("name", SIZES)
def test_example(bench: Bench, name: str) -> None:
    case, (size, frames) = CASES[name], SIZES[name]
    if bench.quick:
        if name in ("resnet18", "bert"):
            pytest.skip("--benchmark-quick: the small models")
        size, frames = 2, 28
    # BERT's verdicts from two of its layers: the float64 copy of all twelve is 900 MB.
    small, where = replace(case, layers=min(case.layers, 2)), (bench.dtype, bench.device)
    shown = with_fastdp(SHOWN)
    factories = {contender: factory for contender, factory in registry().items() if contender in shown}
    bench.adopt(case, check(factories, small, small.model(28, *where), small.batch(3, 28, *where)))
    with_memory = not bench.quick
    rows = bench.run("opacus", case, size, frames, seconds=20, contenders=shown, with_memory=with_memory)
    assert all(row.status == OK for row in rows if row.contender != FASTDP), "a contender has wrong gradients"
