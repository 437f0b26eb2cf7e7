"""The largest physical batch of one step on this GPU, contender by contender.

    python -m bench.asr.largest --output bench/results/DEVICE/largest.json
    python -m bench.asr.largest --contenders "Opacus ghost" "dpkernels mixed" --checkpointing off

The 608.8 M Parakeet with LoRA in bfloat16, utterances of 15 s, an optimizer step on a batch of B. Peaks of two small
batches give the cost of an utterance; from there B is raised or lowered by `--step` until one fits and the next does
not. With checkpointing each block's activations are recomputed (transformers' own, non-reentrant).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asr_finetune.models.recognizer import base_model
from bench.cases.models import CASES, Case, working_copy
from bench.contenders import Settings, registry
from bench.harness.machine import about
from bench.harness.timer import device_seconds
from bench.names import NON_PRIVATE, OPACUS_GHOST, OPACUS_HOOKS, ours

FRAMES = 188  # 15 s
DEFAULT = (NON_PRIVATE, OPACUS_GHOST, OPACUS_HOOKS, ours("bookkeeping"), ours("mixed"), ours("two_pass"))
_SMALL = (16, 32)

Entry = dict[str, Any]


def largest(fits: Callable[[int], bool], guess: int, step: float) -> int:
    """Return the largest size that fits, within a factor 1 + step of one that does not; 0 if size 1 does not fit.

    Args:
        fits: whether a size does; asked as seldom as possible, since a step of the largest takes seconds.
        guess: where to begin, >= 1.
        step: relative.
    """
    good, size = 0, max(guess, 1)
    if fits(size):
        while fits(larger := max(size + 1, int(size * (1 + step)))):
            size = larger
        return size
    while size > 1 and not good:
        size = min(size - 1, int(size / (1 + step)))
        good = size if fits(size) else 0
    return good


class Steps:
    """Steps of one contender on batches of any size, each on a model of its own."""

    def __init__(self, case: Case, name: str, model: nn.Module, dtype: torch.dtype, device: str) -> None:
        self.case, self.name, self.model, self.dtype, self.device = case, name, model, dtype, device
        self.seconds: dict[int, float] = {}

    def peak(self, size: int) -> int:
        """Bytes at the highest point of the second of two steps; raises torch.OutOfMemoryError."""
        gc.collect()
        torch.cuda.empty_cache()
        # Copies of a few: what is in them changes no memory, and drawing 2,000 of them takes longer than the steps.
        rows = torch.arange(size, device=self.device) % min(size, _SMALL[0])
        few = self.case.batch(min(size, _SMALL[0]), FRAMES, self.dtype, self.device)
        batch = {name: value[rows] for name, value in few.items()}
        contender = registry()[self.name](self.case, working_copy(self.model), batch, Settings())
        contender.prepare()
        contender.step()
        contender.prepare()
        torch.cuda.reset_peak_memory_stats()
        self.seconds[size] = device_seconds(contender.step)
        return torch.cuda.max_memory_allocated()

    def fits(self, size: int) -> bool:
        """Whether two steps of that size run."""
        try:
            self.peak(size)
        except torch.OutOfMemoryError:
            return False
        return True


def of(steps: Steps, step: float) -> Entry:
    """The row of one contender."""
    try:
        peaks = [steps.peak(size) for size in _SMALL]
    except (ValueError, NotImplementedError, RuntimeError) as error:  # what Opacus raises with checkpointing
        return {"reason": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    cost = (peaks[1] - peaks[0]) / (_SMALL[1] - _SMALL[0])
    room = torch.cuda.mem_get_info()[1] - peaks[1]
    largest_size = largest(steps.fits, _SMALL[1] + int(0.97 * room / cost), step)
    return {
        "largest": largest_size,
        "seconds": steps.seconds.get(largest_size),
        "rate": round(largest_size / steps.seconds[largest_size], 1) if largest_size else None,
        "bytes_an_utterance": round(cost),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.asr.largest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--contenders", nargs="+", default=DEFAULT, choices=sorted(registry()), metavar="NAME"
    )
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--case", default="parakeet-600m-lora", choices=sorted(CASES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--step", type=float, default=0.03, help="relative; default: %(default)s")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    case, dtype = CASES[options.case], getattr(torch, options.dtype)
    rows = []
    for checkpointing in options.checkpointing:
        model = case.model(FRAMES, dtype, "cuda")
        if checkpointing == "on":
            base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
        for name in options.contenders:
            row: Entry = {"contender": name, "checkpointing": checkpointing == "on"}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows.append(row | of(Steps(case, name, model, dtype, "cuda"), options.step))
            print(json.dumps(rows[-1]), flush=True)
        del model
    if options.output:
        shape = {"case": case.name, "T": FRAMES, "dtype": options.dtype}
        total = torch.cuda.mem_get_info()[1]
        saved = {"about": about("cuda"), "shape": shape, "memory": total, "step": options.step, "rows": rows}
        options.output.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
