"""Configurations of the Triton kernels, timed on this GPU one beside the other: what `triton_ops/configs.py` is from.

    python -m bench.gpu.tune                              all kernels; bench/results/<device>/tune.json
    python -m bench.gpu.tune grouped_norms linear_gram    some of them

Candidates are compiled in parallel first, then timed kernel by kernel (CUDA events, the launch queued behind a busy
GPU, medians of 9, more inputs in turn than the second-level cache holds), beside the shortest PyTorch expression. The
share is of this GPU's matrix rate, counting the operations that are executed, or of its copy bandwidth, counting each
input read once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.tune_kernels import GROUPED_LAYERS, KERNELS, Shape, job
from bench.harness import machine
from bench.harness.floor import Ceilings, measure
from dpkernels.backends.triton_ops import configs, launching

PLAIN = "plain torch"


@dataclass(frozen=True)
class Row:
    """One configuration (or "plain torch") of one kernel on one shape. share: of the matrix rate or of copying."""

    kernel: str
    shape: dict[str, int]
    config: str
    microseconds: float
    teraflops: float | None
    gigabytes_a_second: float | None
    share: float | None


def work(kernel: str, shape: Shape, config: configs.Config | None) -> tuple[float, float]:
    """(operations that the kernel, or plain PyTorch, executes; bytes of its inputs); 0 for what does not bound it."""
    batch, frames, d, p = shape
    layers = GROUPED_LAYERS if kernel.startswith("grouped") else 1
    if kernel == "linear_gram":
        if config is None:
            return 2.0 * batch * frames**2 * (d + p), 0.0
        tile = config.tiles["BT"]
        blocks = -(-frames // tile)
        return batch * blocks * (blocks + 1) / 2 * tile**2 * 2.0 * (d + p), 0.0
    if kernel in ("linear_direct", "linear_sum"):
        tile = 1 if config is None else config.tiles["BT"]
        return 2.0 * batch * -(-frames // tile) * tile * p * d, 0.0
    width = p if kernel == "bias_sums" else d + p
    return 0.0, layers * batch * frames * width * 2.0


def use(kernel: str, config: configs.Config) -> None:
    """Make it the kernel's configuration for 16-bit aligned tensors."""
    configs.CONFIGS[kernel] = {**configs.CONFIGS[kernel], (2, configs.ANY): config}


def compiled(item: tuple[str, Shape, configs.Config]) -> str | None:
    """Run a candidate once on a short batch, which leaves it in Triton's cache; what went wrong, or None."""
    kernel, (_, _, d, p), config = item
    use(kernel, config)
    try:
        job(kernel, (2, 70, d, p)).call(0)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - a candidate that does not fit is a finding, not a failure
        return f"{kernel} {config.options}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def median_seconds(function: Callable[[int], object], kernel: str | None, rounds: int = 9) -> float:
    """Of the launches of `kernel` within the calls, or of the whole calls (None)."""
    events: list[tuple[Any, Any]] = []
    real = launching.execute

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(launched: Any, *rest: Any) -> None:
        if launched.__name__ != kernel:
            return real(launched, *rest)
        start = mark()
        real(launched, *rest)
        events.append((start, mark()))

    launching.execute = timed if kernel else real
    try:
        for i in range(rounds + 2):
            torch.cuda._sleep(400_000)
            start = mark()
            function(i)
            if kernel is None:
                events.append((start, mark()))
            if i == 1:
                events.clear()
        torch.cuda.synchronize()
    finally:
        launching.execute = real
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def row(kernel: str, shape: Shape, config: configs.Config | None, seconds: float, ceilings: Ceilings) -> Row:
    """The row of one measurement."""
    flops, moved = work(kernel, shape, config)
    name = PLAIN if config is None else " ".join(f"{n}={v}" for n, v in config.options.items())
    share = flops / seconds / ceilings.flops if flops else moved / seconds / ceilings.bandwidth
    return Row(
        kernel,
        dict(zip(("B", "T", "d", "p"), shape, strict=True)),
        name,
        round(seconds * 1e6, 2),
        round(flops / seconds / 1e12, 1) if flops else None,
        round(moved / seconds / 1e9, 1) if moved else None,
        round(share, 4),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, time, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(KERNELS)}; default: all")
    parser.add_argument("--output", type=Path, help="folder; default: $OUT, or bench/results")
    options = parser.parse_args(arguments)
    unknown = set(options.kernels) - set(KERNELS)
    if unknown:
        parser.error(f"no such kernel: {', '.join(sorted(unknown))}; they are {', '.join(KERNELS)}")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; run this on a machine with a GPU")
    names = options.kernels or list(KERNELS)
    items = [(name, KERNELS[name].shapes[0], config) for name in names for config in KERNELS[name].candidates]
    with multiprocessing.get_context("spawn").Pool(min(len(items), os.cpu_count() or 1)) as pool:
        tried = list(zip(items, pool.map(compiled, items, 1), strict=True))
    for _, error in tried:
        if error:
            print(error)
    ceilings = measure("cuda", torch.bfloat16)
    rows: list[Row] = []
    for name in names:
        fit = [config for (kernel, _, config), error in tried if kernel == name and not error]
        for shape in KERNELS[name].shapes:
            calls, first = job(name, shape), len(rows)
            if calls.plain is not None:
                rows.append(row(name, shape, None, median_seconds(calls.plain, None), ceilings))
            for config in fit:
                use(name, config)
                rows.append(row(name, shape, config, median_seconds(calls.call, name), ceilings))
            for entry in rows[first:]:
                figures = f"{entry.microseconds} µs, {entry.share:.0%}"
                print(f"{entry.kernel} {entry.shape}: {entry.config}: {figures}", flush=True)
    about = machine.about("cuda")
    folder = (options.output or Path(os.environ.get("OUT", "bench/results"))) / about["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in rows)
    head = about | {"ceilings": asdict(ceilings)}
    (folder / "tune.json").write_text(
        f'{json.dumps(head)[:-1]},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
