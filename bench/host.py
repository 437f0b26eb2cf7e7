"""The host's time of a private step beside that of PEFT's: Python, torch's dispatcher, the arguments of kernels.

    python -m bench.host                       a minute; prints milliseconds and ratios
    python -m bench.host --write               also writes bench/results/<machine>/host.json

Steps of 192 LoRA layers take turns on one thread, in processor time. B, T and the layers are so small that torch's
kernels are little more than their dispatch, and the native library's are stubs (`bench.harness.stubs`). PEFT's AdamW
runs in two ways: torch's default of a CPU, a loop over the parameters, and its default of a GPU, `foreach=True`, which
calls the host less often.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import AdamW

from bench.cases.models import CASES
from bench.contenders import Contender, Settings, registry
from bench.contenders.plain import NonPrivate
from bench.harness import machine
from bench.harness.stubs import kernels_stubbed
from bench.harness.timer import Samples, host_seconds, interleave
from bench.names import NON_PRIVATE, ours

HOST_CASES = ("host-lora", "host-parakeet-lora")
FOREACH = f"{NON_PRIVATE}, foreach"
SIZE = FRAMES = 2


class ForeachNonPrivate(NonPrivate):
    """Without privacy, with the AdamW that torch chooses on a GPU."""

    def new_optimizer(self) -> torch.optim.Optimizer:
        return AdamW(self.parameters.values(), lr=self.settings.lr, foreach=True)


def contenders(case: str, strategies: Sequence[str]) -> dict[str, Contender]:
    """The steps without privacy and those of this package, by name."""
    known = registry()
    factories = {NON_PRIVATE: known[NON_PRIVATE], FOREACH: ForeachNonPrivate}
    factories |= {ours(name): known[ours(name)] for name in strategies}
    chosen = CASES[case]
    return {
        name: factory(chosen, chosen.model(FRAMES), chosen.batch(SIZE, FRAMES), Settings())
        for name, factory in factories.items()
    }


def measure(case: str, strategies: Sequence[str], rounds: int) -> dict[str, Samples]:
    """Processor seconds of each contender's steps, in turns, with the kernels stubbed."""
    with kernels_stubbed():
        clock = partial(host_seconds, clock=time.process_time)
        return interleave(contenders(case, strategies), rounds=rounds, warmup=3, measure=clock)


def row(case: str, taken: Mapping[str, Samples]) -> dict[str, Any]:
    """One case of the results: each contender's median, and the median ratio of the pairs of a round."""

    def over(base: str, name: str) -> float:
        pairs = zip(taken[name].seconds, taken[base].seconds, strict=True)
        return round(statistics.median(mine / theirs for mine, theirs in pairs), 4)

    return {
        "case": case,
        "title": CASES[case].title,
        "rounds": len(taken[NON_PRIVATE].seconds),
        "contenders": {
            name: {
                "median_ms": round(samples.median * 1e3, 3),
                "iqr_ms": round(samples.iqr * 1e3, 3),
                "ratio": over(NON_PRIVATE, name),
                "ratio_foreach": over(FOREACH, name),
            }
            for name, samples in taken.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and, if asked, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(HOST_CASES), help="default: %(default)s")
    parser.add_argument("--strategies", default="bookkeeping,auto", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=41, help="default: %(default)s")
    parser.add_argument(
        "--write", action="store_true", help="write the results beside those of pytest --benchmark"
    )
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for case in options.cases.split(","):
        rows.append(row(case, measure(case, options.strategies.split(","), options.rounds)))
        print(f"{rows[-1]['title']}, B = {SIZE}, T = {FRAMES}")
        for name, found in rows[-1]["contenders"].items():
            print(
                f"  {name:24} {found['median_ms']:8.2f} ± {found['iqr_ms'] / 2:.2f} ms, {found['ratio']:.2f} × "
                f"non-private, {found['ratio_foreach']:.2f} × with foreach"
            )
    document = {"about": machine.about("cpu"), "rows": rows}
    if options.write:
        machine.save(document, "host")
    else:
        print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
