"""Time and memory of every strategy, with and without activation checkpointing, on this CPU.

    python -m bench.asr.strategies                                    a few minutes; $OUT/<device>/strategies.json
    python -m bench.asr.strategies --cases parakeet-lora --rounds 3 --frames 64

The small Parakeet of `pytest --benchmark`. Time: CPU seconds of a forward and private backward on one thread, so that
what else the machine does counts little; all take turns, and the median of the rounds is saved. Memory: live bytes at
the highest point of a whole step with AdamW (`bench.asr.peaks`), weights, sums and state included; a CPU's allocator
takes more of the system.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.asr import peaks
from bench.cases.models import CASES, Batch, Case, forward, working_copy
from bench.harness.machine import about
from bench.harness.results import FOLDER
from dpkernels.blocks import checkpoint_blocks
from dpkernels.privacy.keywords import STRATEGIES

Way = tuple[str, bool]
"""A strategy, and whether blocks are recomputed."""


def prepared(model: nn.Module, *, checkpointing: bool) -> nn.Module:
    """A copy, its blocks recomputed where that is asked for."""
    copy = working_copy(model)
    if checkpointing:
        checkpoint_blocks(copy)
    return copy


def cpu_seconds(
    case: Case, model: nn.Module, batch: Batch, ways: Sequence[Way], rounds: int
) -> dict[Way, float]:
    """Of a forward and private backward, in turns; the first turn is not counted."""
    models = {way: prepared(model, checkpointing=way[1]) for way in ways}
    runs = {way: peaks.private(models[way], batch, way[0]) for way in ways}
    taken: dict[Way, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way in ways:
            optimizer, loader = runs[way]
            for logical_batch in loader:  # one, of everything
                for part in logical_batch:
                    began = time.process_time()
                    optimizer.backward(case.losses(forward(models[way], part), part["labels"]))
                    taken[way].append(time.process_time() - began)
                optimizer.step()
                optimizer.zero_grad()
    return {way: statistics.median(seconds[1:]) for way, seconds in taken.items()}


def rows(case: Case, size: int, frames: int, rounds: int) -> list[dict[str, Any]]:
    """A row for every strategy, with blocks kept and recomputed."""
    model, batch = case.model(frames), case.batch(size, frames)
    ways = [(strategy, again) for strategy in STRATEGIES for again in (False, True)]
    seconds = cpu_seconds(case, model, batch, ways, rounds)
    measured = []
    for way in ways:
        copy = prepared(model, checkpointing=way[1])
        peak = peaks.measure(case, copy, frames, size, way[0], torch.float32, "cpu")["measured"]
        measured.append(
            {
                "case": case.name,
                "title": case.title,
                "shape": {"B": size, "T": frames},
                "strategy": way[0],
                "checkpointing": way[1],
                "cpu_seconds": round(seconds[way], 4),
                "peak": peak,
            }
        )
        print(json.dumps(measured[-1]), flush=True)
    return measured


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.asr.strategies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cases", nargs="+", default=["parakeet-lora", "parakeet-full"], choices=sorted(CASES)
    )
    parser.add_argument("--size", type=int, default=8, help="micro-batch")
    parser.add_argument("--frames", type=int, default=150, help="encoder frames: 150 is 12 s")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: strategies.json of the device in $OUT"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = about("cpu")
    path: Path = (
        options.output or Path(os.environ.get("OUT", str(FOLDER))) / facts["slug"] / "strategies.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no self_check")
        measured = [
            row
            for name in options.cases
            for row in rows(CASES[name], options.size, options.frames, options.rounds)
        ]
    saved = {"about": facts, "rounds": options.rounds, "rows": measured}
    path.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
