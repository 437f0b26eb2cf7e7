"""Fit the constants by which `strategy="auto"` chooses (`dpkernels/ops/costs.py`) on this machine.

    python -m bench.fit_costs              under two minutes; prints the constants, and how far the model is off
    python -m bench.fit_costs --write      also writes dpkernels/ops/costs.json

Norms, sums and materialised gradients of linear layers are timed shape by shape, of as many layers in turn as the
caches do not hold. Of LoRA layers, whose calls take as long as their arithmetic, whole forwards and backwards of a
stack are timed, kept and materialised. Times are the process's (all threads together), the least of the rounds, so that
other processes disturb them little. The constants minimise the sum of squared relative errors, and are at least 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.harness import machine
from dpkernels import ops
from dpkernels.backends import registry
from dpkernels.nn import (
    Choice,
    GhostLoRALinear,
    LayerSizes,
    LinearRecord,
    Record,
    add_weighted_sums,
    attach,
    detach,
    norms_sq,
    swap,
)
from dpkernels.ops.costs import FILE, GRAM_SHARE, Costs

BATCH = 4
PAIRS = 3
"""Of LoRA layers in a stack, the second of each back to the first one's width."""
CACHES = 2**26
"""Bytes of the tensors of all layers that are timed in turn, at least."""

LINEAR = ((64, 64), (256, 256), (1024, 256), (256, 1024), (512, 512), (384, 1536), (1024, 1024))
LORA = ((64, 64), (256, 256), (1024, 256), (512, 512))
RANKS = (2, 8, 32)
FRAMES = (25, 75, 150, 400)


class Part(NamedTuple):
    """One measurement: nanoseconds of an example, and the factor of each constant in the model's formula.

    scale: the nanoseconds that errors are relative to, if these are not it.
    """

    nanoseconds: float
    factors: dict[str, float]
    scale: float | None = None

    @property
    def unit(self) -> float:
        """The nanoseconds that errors are relative to."""
        return self.nanoseconds if self.scale is None else self.scale


def process_nanoseconds(call: Callable[[], object], rounds: int) -> float:
    """The least processor time of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(rounds):
        start = time.process_time_ns()
        call()
        times.append(time.process_time_ns() - start)
    return min(times)


def fit(parts: Sequence[Part]) -> dict[str, float]:
    """Constants >= 0 that minimise the sum of squared relative errors."""
    names = sorted({name for part in parts for name in part.factors})
    rows = np.array([[part.factors.get(name, 0.0) / part.unit for name in names] for part in parts])
    wanted = np.array([part.nanoseconds / part.unit for part in parts])
    kept = list(range(len(names)))
    while True:
        found = np.linalg.lstsq(rows[:, kept], wanted, rcond=None)[0]
        if (found >= 0).all():
            return dict.fromkeys(names, 0.0) | {
                names[i]: float(value) for i, value in zip(kept, found, strict=True)
            }
        del kept[int(found.argmin())]


def errors(parts: Sequence[Part], constants: dict[str, float]) -> list[float]:
    """Model minus measurement, relative to its unit, of each."""
    return [
        (sum(constants[name] * factor for name, factor in part.factors.items()) - part.nanoseconds)
        / part.unit
        for part in parts
    ]


def _copies(size: int) -> int:
    return max(1, min(64, -(-CACHES // size)))


def _zero_sums(records: Sequence[Record]) -> dict[nn.Parameter, Tensor]:
    return {p: torch.zeros(p.shape, dtype=torch.float64) for record in records for p in record.parameters}


def linear_parts(outputs: int, inputs: int, frames: int, rounds: int) -> dict[str, list[Part]]:
    """Measurements of one shape of linear layer, by the formula that they belong to."""
    entries, both = outputs * inputs, outputs + inputs
    count = _copies(4 * BATCH * (frames * both + entries))
    tensors = [
        (torch.randn(BATCH, frames, inputs), torch.randn(BATCH, frames, outputs)) for _ in range(count)
    ]
    records = [
        LinearRecord(str(i), nn.Parameter(torch.zeros(outputs, inputs)), x, g)
        for i, (x, g) in enumerate(tensors)
    ]
    sums, factors = _zero_sums(records), torch.rand(BATCH)

    def norms(method: str) -> float:
        def call() -> None:
            for x, g in tensors:
                ops.linear_norm_sq(x, g, method=method)

        return process_nanoseconds(call, rounds) / (count * BATCH)

    found: dict[str, list[Part]] = {}
    if frames * both < GRAM_SHARE * 2 * entries:
        found["gram"] = [Part(norms("gram"), {"gram": frames**2 * both, "gram_frame": frames * both})]
    else:
        found["direct"] = [Part(norms("direct"), {"direct": frames * entries, "direct_frame": frames * both})]
    summed = process_nanoseconds(lambda: add_weighted_sums(records, factors, sums), rounds) / (count * BATCH)
    found["sum"] = [Part(summed, {"summed": frames * entries, "widened": entries})]

    def materialise() -> None:
        held = [part for record in records for part in record.materialised()]
        norms_sq(held)
        add_weighted_sums(held, factors, sums)

    made = process_nanoseconds(materialise, rounds) / (count * BATCH)
    found["made"] = [Part(made, {"product": frames * entries, "entry": entries})]
    return found


class Always(Choice):
    """Materialises everything."""

    def least_frames(self, layer: LayerSizes, device_type: str = "cpu") -> int | None:
        """From the first frame on."""
        return 1


def lora_parts(outputs: int, inputs: int, rank: int, frames: int, rounds: int) -> dict[str, list[Part]]:
    """The measurement of one shape of LoRA layer: what materialising saves of a whole forward and backward."""
    both, layers = outputs + inputs, []
    for _ in range(PAIRS):
        layers += [
            GhostLoRALinear(inputs, outputs, r=rank),
            nn.Tanh(),
            GhostLoRALinear(outputs, inputs, r=rank),
        ]
    model, x, factors = swap(nn.Sequential(*layers)), torch.randn(BATCH, frames, inputs), torch.rand(BATCH)
    sums = {p: torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters() if p.requires_grad}
    tape = attach(model)

    def step() -> None:
        losses = model(x).square().sum((1, 2))
        tape.open(BATCH)
        losses.sum().backward()
        records = tape.close()
        with torch.no_grad():
            norms_sq(records)
            add_weighted_sums(records, factors, sums)

    times = []
    for choice in (Choice(), Always()):
        tape.choice = choice
        times.append(process_nanoseconds(step, rounds) / (2 * PAIRS * BATCH))
    detach(model)
    kept, made = times
    # A constant of what is saved less one of what is added: both are at least 0.
    saved = {"lora_product": frames * rank * both, "lora_frame": frames * both}
    added = {"lora_entry": -rank * both, "lora_call": -1.0}
    return {"lora": [Part(kept - made, saved | added, scale=kept)]}


def measure(
    rounds: int, linear: Sequence[tuple[int, int]], lora: Sequence[tuple[int, int]]
) -> dict[str, list[Part]]:
    """All measurements by formula."""
    parts: dict[str, list[Part]] = {}
    for frames in FRAMES:
        found = [linear_parts(*shape, frames, rounds) for shape in linear]
        found += [lora_parts(*shape, rank, frames, rounds) for shape in lora for rank in RANKS]
        for formulas in found:
            for formula, some in formulas.items():
                parts.setdefault(formula, []).extend(some)
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, fit, print and, if asked, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.fit_costs", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help=f"write the constants to {FILE.name}")
    parser.add_argument("--shapes", type=int, help="only the first of the shapes")
    options = parser.parse_args(arguments)
    backend = registry.backend_of("linear_norm_sq", "cpu")
    parts = measure(options.rounds, LINEAR[: options.shapes], LORA[: options.shapes])
    constants: dict[str, float] = {}
    for formula, some in parts.items():
        fitted = fit(some)
        constants |= fitted
        off = [abs(error) for error in errors(some, fitted)]
        print(
            f"{formula:10} {len(some):3} shapes, off by {statistics.median(off):.0%} (median), {max(off):.0%} at most"
        )
    costs = Costs(**{name: float(f"{value:.3g}") for name, value in constants.items()})
    for outputs, inputs, rank in [*((*shape, 0) for shape in LINEAR), *((*shape, 8) for shape in LORA)]:
        crossing = costs.crossing(outputs, inputs, rank)
        print(f"{outputs:5} × {inputs:<5} r = {rank}: materialised from {crossing} frames on")
    row = {"machine": machine.device_name("cpu"), "nanoseconds": vars(costs)}
    print(json.dumps({backend: row}, indent=1))
    if options.write:
        FILE.write_text(json.dumps(json.loads(FILE.read_text()) | {backend: row}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
