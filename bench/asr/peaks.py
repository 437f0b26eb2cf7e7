"""Predicted against measured peak memory of private steps.

    python -m bench.asr.peaks --device cuda --output peaks.json            the 608.8 M Parakeet, LoRA, bfloat16
    python -m bench.asr.peaks --device cpu --case parakeet-full --frames 64 --sizes 2 4 --dtype float32
    python -m bench.asr.peaks --predict-only --output predicted.json       on any machine; then, with a GPU,
    python -m bench.asr.peaks --device cuda --predicted predicted.json --output peaks.json

Predicted: `dpkernels.memory.MemoryEstimator`. Measured on a GPU: `torch.cuda.max_memory_allocated` over the
second step (the first makes sums and optimizer state); on a CPU: the live bytes of the same step with real tensors,
and with --rss the peak resident memory of a fresh process (bench.harness.memory), which knows nothing of tensors.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpkernels
from bench.cases.models import CASES, Batch, Case, forward, trained, working_copy
from bench.contenders.rows import Rows
from bench.harness.machine import about
from bench.harness.memory import Job, Server
from bench.names import ours
from dpkernels.memory import LiveMemory, MemoryEstimator, cuda_size, held_bytes
from dpkernels.privacy import DPDataLoader, DPOptimizer
from dpkernels.privacy.keywords import STRATEGIES

Entry = dict[str, Any]


def predict(
    case: Case,
    model: nn.Module,
    frames: int,
    sizes: Sequence[int],
    strategy: str,
    dtype: torch.dtype,
    device: str,
) -> list[Entry]:
    """Return a predicted row for every size."""
    like = case.batch(2, frames, dtype)

    def losses(copy: nn.Module, size: int) -> Tensor:
        batch = {name: torch.empty((size, *t.shape[1:]), dtype=t.dtype) for name, t in like.items()}
        return case.losses(forward(copy, batch), batch["labels"])

    with MemoryEstimator(
        model, strategy=strategy, target="cuda" if device.startswith("cuda") else "cpu"
    ) as stage:
        peaks = [stage.peak(losses, size) for size in sizes]
    return [
        {
            "case": case.name,
            "strategy": strategy,
            "shape": {"B": peak.size, "T": frames},
            "dtype": str(dtype).removeprefix("torch."),
            "predicted": peak.total,
            "parts": {name: value for name, value in asdict(peak).items() if name != "size"},
        }
        for peak in peaks
    ]


def measure(
    case: Case, model: nn.Module, frames: int, size: int, strategy: str, dtype: torch.dtype, device: str
) -> Entry:
    """Peak bytes of the second of two private steps of a copy of the model, its weights included."""
    batch = case.batch(size, frames, dtype)
    if device.startswith("cuda"):
        frozen = held_bytes((p for p in model.parameters() if not p.requires_grad), cuda_size)
        gc.collect()  # the engine before: in reference cycles, and if freed later it would be missing from the peak
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        steps = _steps(case, working_copy(model), batch, strategy, device)
        next(steps)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        next(steps)
        torch.cuda.synchronize()
        return {
            "measured": torch.cuda.max_memory_allocated() - before + frozen,
            "reserved": torch.cuda.max_memory_reserved() - before + frozen,
        }
    with LiveMemory() as memory:
        copy = working_copy(model)
        for tensor in (*copy.parameters(), *copy.buffers()):
            memory.count(tensor)
        steps = _steps(case, copy, batch, strategy, device)
        next(steps)
        memory.restart()
        next(steps)
        return {"measured": memory.peak}


def _steps(case: Case, model: nn.Module, batch: Batch, strategy: str, device: str) -> Iterator[None]:
    """Private steps on the batch, without end; what they hold goes with the generator."""
    optimizer, loader = private(model, batch, strategy)
    while True:
        for logical_batch in loader:
            for part in logical_batch:
                moved = {name: value.to(device) for name, value in part.items()}
                optimizer.backward(case.losses(forward(model, moved), moved["labels"]))
                del moved
            optimizer.step()
            optimizer.zero_grad()
            yield


def private(model: nn.Module, batch: Batch, strategy: str) -> tuple[DPOptimizer, DPDataLoader]:
    """AdamW and loader of a private run in which every step takes the whole batch."""
    _, optimizer, loader = dpkernels.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.AdamW(trained(model).values(), lr=1e-4),
        data_loader=DataLoader(Rows(batch), batch_size=len(batch["labels"])),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        strategy=strategy,
    )
    return optimizer, loader


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Predict and measure every size and strategy; see the module."""
    case, dtype = CASES[options.case], getattr(torch, options.dtype)
    target = "cuda" if options.predict_only else options.device
    began = time.perf_counter()
    # On the device at once: 608.8 M random numbers take a CPU longer than all steps take a GPU.
    with torch.device("meta" if options.predict_only else options.device):
        model = case.model(options.frames, dtype, "meta" if options.predict_only else options.device)
    print(f"model: {time.perf_counter() - began:.1f} s", flush=True)
    known = json.loads(Path(options.predicted).read_text())["rows"] if options.predicted else []
    rows: list[Entry] = []
    for strategy in options.strategies:
        fresh = known or predict(case, model, options.frames, options.sizes, strategy, dtype, target)
        for row in fresh:
            if row["strategy"] != strategy or row["shape"]["B"] not in options.sizes:
                continue
            rows.append(row)
            if not options.predict_only:
                row |= _measured(case, model, row, dtype, options.device)
            if options.rss:
                row |= _resident(row)
            print(_line(row), flush=True)
    return {
        "group": "peaks",
        "about": about(options.device),
        "seconds": round(time.perf_counter() - began, 1),
        "rows": rows,
    }


def _measured(case: Case, model: nn.Module, row: Entry, dtype: torch.dtype, device: str) -> Entry:
    try:
        peak = measure(case, model, row["shape"]["T"], row["shape"]["B"], row["strategy"], dtype, device)
    except torch.OutOfMemoryError as error:
        return {"reason": str(error).splitlines()[0]}
    return peak | {"error": round(row["predicted"] / peak["measured"] - 1, 4)}


def _resident(row: Entry) -> Entry:
    """Measure peak RSS beyond that before the step, to be compared with the prediction without weights."""
    with Server() as server:
        shape = row["shape"]
        peak = server.peak(Job(row["case"], ours(row["strategy"]), shape["B"], shape["T"]))
    if peak is None:
        return {}
    beyond = row["predicted"] - row["parts"]["weights"]
    return {"rss": round(peak * 2**20), "rss_error": round(beyond / (peak * 2**20) - 1, 4)}


def _line(row: Entry) -> str:
    text = f"{row['case']} {row['strategy']:12} {row['shape']} predicted {row['predicted'] / 2**20:,.1f} MiB"
    if "measured" in row:
        text += f", measured {row['measured'] / 2**20:,.1f} MiB ({row['error']:+.2%})"
    if "rss" in row:
        text += f", resident {row['rss'] / 2**20:,.1f} MiB beyond the weights ({row['rss_error']:+.2%})"
    return text + (f", {row['reason']}" if "reason" in row else "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.asr.peaks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", default="parakeet-600m-lora", choices=sorted(CASES))
    parser.add_argument("--frames", type=int, default=188, help="encoder frames: 188 is 15 s")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32], help="micro-batches")
    parser.add_argument("--strategies", nargs="+", default=["bookkeeping", "mixed"], choices=list(STRATEGIES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--predicted", help="predictions of an earlier --predict-only")
    parser.add_argument("--predict-only", action="store_true", help="for CUDA, with no device")
    parser.add_argument(
        "--rss", action="store_true", help="also a fresh process's memory; float32, on the CPU"
    )
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no self_check")
        results = run(options)
    if options.output:
        Path(options.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
