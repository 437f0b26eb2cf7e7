"""Configurations of the Triton kernels, timed on this GPU one beside the other: what `triton_ops/configs.py` is from.

    python -m bench.tune                              all kernels; bench/results/<device>/tune.json
    python -m bench.tune grouped_norms linear_gram    some of them

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
import torch.nn.functional as F
from torch import Tensor

from bench import machine
from bench.floor import Ceilings, measure
from dpkernels.backends import triton_ops
from dpkernels.backends.triton_ops import configs, launching

RANK = 16
Shape = tuple[int, int, int, int]  # B, T, d, p
LINEAR: tuple[Shape, ...] = ((32, 188, 1024, 1024), (16, 750, 1024, 1024), (16, 750, 1024, 4096))
LORA: tuple[Shape, ...] = ((64, 188, 1024, 1024), (64, 188, 1024, 4096), (16, 750, 1024, 1024))
NARROW: tuple[Shape, ...] = ((32, 750, 1024, 1024),)
PLAIN = "plain torch"


def _config(warps: int, stages: int, **tiles: int) -> configs.Config:
    return configs.Config(tiles, warps, stages)


CANDIDATES: dict[str, tuple[tuple[Shape, ...], tuple[configs.Config, ...]]] = {
    "linear_gram": (
        LINEAR,
        (
            _config(8, 4, BS=128, BT=128, BK=64),
            _config(8, 3, BS=128, BT=128, BK=64),
            _config(4, 4, BS=64, BT=128, BK=64),
            _config(4, 4, BS=64, BT=64, BK=64),
        ),
    ),
    "linear_direct": (
        LINEAR,
        (
            _config(4, 3, BT=64, BP=128, BD=64),
            _config(8, 4, BT=64, BP=128, BD=128),
            _config(8, 3, BT=128, BP=128, BD=128),
        ),
    ),
    "linear_sum": (
        LINEAR,
        (
            _config(4, 4, BT=64, BP=64, BD=64),
            _config(8, 3, BT=64, BP=128, BD=64),
            _config(16, 4, BT=64, BP=128, BD=128),
        ),
    ),
    "lora_pieces": (
        LORA,
        (_config(4, 4, BT=64, BN=64, SAMPLES=4), _config(4, 3, BT=64, BN=128, SAMPLES=4)),
    ),
    "lora_forms": (LORA, (_config(4, 4, BT=64, BN=64), _config(4, 3, BT=64, BN=128))),
    "grouped_norms": (LORA, (_config(4, 2, BT=64, BN=128), _config(4, 3, BT=64, BN=128))),
    "grouped_sums": (LORA, (_config(4, 3, BT=64, BN=64), _config(4, 3, BT=64, BN=128))),
    "bias_sums": (
        NARROW,
        (_config(4, 1, BT=128, BN=64), _config(4, 1, BT=64, BN=64), _config(4, 1, BT=256, BN=32)),
    ),
    "layer_norm_sums": (
        NARROW,
        (_config(4, 1, BT=64, BN=32), _config(4, 1, BT=128, BN=32), _config(4, 1, BT=64, BN=64)),
    ),
    "depthwise_conv1d_sums": (
        NARROW,
        (
            _config(4, 1, BC=8, BT=16, EACH=2, AHEAD=8, SPAN=1024),
            _config(4, 1, BC=4, BT=32, EACH=2, AHEAD=8, SPAN=1024),
            _config(4, 1, BC=16, BT=8, EACH=4, AHEAD=8, SPAN=512),
            _config(2, 1, BC=4, BT=16, EACH=2, AHEAD=8, SPAN=1024),
        ),
    ),
}
TAPS = 9
GROUPED_LAYERS = 24


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


@dataclass(frozen=True)
class Job:
    """What is called to run a kernel, by the number of the call, and the same in plain PyTorch."""

    call: Callable[[int], object]
    plain: Callable[[int], object] | None


def job(kernel: str, shape: Shape, device: str = "cuda") -> Job:
    """Fresh inputs, more than the cache holds, and the two calls."""
    batch, frames, d, p = shape
    sets = 2 if device == "meta" else max(2, int(120e6 / (batch * frames * (d + p) * 2)) + 1)
    if kernel.startswith("grouped"):
        sets = GROUPED_LAYERS  # each its own: what two layers read would come from the cache the second time

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device).to(torch.bfloat16)

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(*sizes, device=device, dtype=torch.float64)

    factors = torch.rand(batch, device=device) + 0.1
    x, g = ([normal(batch, frames, n) for _ in range(sets)] for n in (d, p))
    if kernel in ("linear_gram", "linear_direct"):
        method = kernel.removeprefix("linear_")
        plain = {
            "gram": lambda i: (
                torch.bmm(x[i % sets], x[i % sets].mT) * torch.bmm(g[i % sets], g[i % sets].mT)
            ).sum((1, 2)),
            "direct": lambda i: torch.bmm(g[i % sets].mT, x[i % sets]).square().sum((1, 2)),
        }[method]
        return Job(lambda i: triton_ops.linear_norm_sq(x[i % sets], g[i % sets], method=method), plain)
    if kernel == "linear_sum":
        out = zeros(p, d)
        return Job(
            lambda i: triton_ops.linear_weighted_sum(x[i % sets], g[i % sets], factors, out),
            lambda i: (
                (g[i % sets] * factors[:, None, None].bfloat16()).flatten(0, 1).T @ x[i % sets].flatten(0, 1)
            ),
        )
    if kernel == "bias_sums":
        return Job(
            lambda i: triton_ops.bias_norm_sq(g[i % sets]), lambda i: g[i % sets].sum(1).square().sum(1)
        )
    if kernel == "layer_norm_sums":
        return Job(
            lambda i: triton_ops.layer_norm_norm_sq(x[i % sets], g[i % sets]),
            lambda i: (x[i % sets] * g[i % sets]).sum(1).square().sum(1),
        )
    if kernel == "depthwise_conv1d_sums":
        # frames adjacent, as convolutions have them
        xs, gs = ([t.mT.contiguous() for t in tensors] for tensors in (x, g))
        return Job(
            lambda i: triton_ops.depthwise_conv1d_norm_sq(
                xs[i % sets], gs[i % sets], kernel_size=TAPS, padding=TAPS // 2
            ),
            lambda i: (
                torch.einsum(
                    "bctk,bct->bck", F.pad(xs[i % sets], (TAPS // 2,) * 2).unfold(2, TAPS, 1), gs[i % sets]
                )
                .square()
                .sum((1, 2))
            ),
        )
    h, dh = ([normal(batch, frames, RANK) for _ in range(sets)] for _ in range(2))

    def both(i: int) -> tuple[Tensor, Tensor]:
        i %= sets
        return torch.bmm(dh[i].mT, x[i]), torch.bmm(g[i].mT, h[i])

    if kernel == "lora_forms":
        return Job(lambda i: triton_ops.lora_gradients(*(t[i % sets] for t in (x, h, g, dh))), both)
    if kernel == "lora_pieces":
        return Job(
            lambda i: triton_ops.lora_norm_sq(*(t[i % sets] for t in (x, h, g, dh))),
            lambda i: [part.square().sum((1, 2)) for part in both(i)],
        )
    return _grouped(kernel, batch, (x, h, g, dh), factors, zeros)


def _grouped(
    kernel: str, batch: int, tensors: Sequence[list[Tensor]], factors: Tensor, zeros: Callable[..., Tensor]
) -> Job:
    """GROUPED_LAYERS layers, which read the same few sets of tensors in turn."""
    xs, hs, gs, dhs = ([tensor[i % len(tensor)] for i in range(GROUPED_LAYERS)] for tensor in tensors)
    kinds, scalings = ["lora"] * GROUPED_LAYERS, [1.0] * GROUPED_LAYERS
    if kernel == "grouped_norms":
        nothing: tuple[list[int], ...] = ([],) * 5
        return Job(lambda i: triton_ops.total_norm_sq(xs, gs, kinds, hs, dhs, scalings, *nothing), None)
    shapes = [(RANK, xs[0].shape[2]), (gs[0].shape[2], RANK)] * GROUPED_LAYERS
    outs, key = [zeros(*shape) for shape in shapes], torch.empty(0, dtype=torch.uint8)
    return Job(
        lambda i: triton_ops.clip_and_noise(
            xs, gs, kinds, factors, outs, hs, dhs, scalings, [], [], [], [], key, key, 0.0, 0.0, 1.0
        ),
        None,
    )


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
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(CANDIDATES)}; default: all"
    )
    parser.add_argument("--output", type=Path, help="folder; default: $OUT, or bench/results")
    options = parser.parse_args(arguments)
    unknown = set(options.kernels) - set(CANDIDATES)
    if unknown:
        parser.error(f"no such kernel: {', '.join(sorted(unknown))}; they are {', '.join(CANDIDATES)}")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; run this on a machine with a GPU")
    names = options.kernels or list(CANDIDATES)
    items = [(name, CANDIDATES[name][0][0], config) for name in names for config in CANDIDATES[name][1]]
    with multiprocessing.get_context("spawn").Pool(min(len(items), os.cpu_count() or 1)) as pool:
        tried = list(zip(items, pool.map(compiled, items, 1), strict=True))
    for _, error in tried:
        if error:
            print(error)
    ceilings = measure("cuda", torch.bfloat16)
    rows: list[Row] = []
    for name in names:
        fit = [config for (kernel, _, config), error in tried if kernel == name and not error]
        for shape in CANDIDATES[name][0]:
            calls, first = job(name, shape), len(rows)
            if calls.plain is not None:
                rows.append(row(name, shape, None, median_seconds(calls.plain, None), ceilings))
            for config in fit:
                use(name, config)
                rows.append(row(name, shape, config, median_seconds(calls.call, name), ceilings))
            for one in rows[first:]:
                figures = f"{one.microseconds} µs, {one.share:.0%}"
                print(f"{one.kernel} {one.shape}: {one.config}: {figures}", flush=True)
    about = machine.about("cuda")
    folder = (options.output or Path(os.environ.get("OUT", "bench/results"))) / about["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(one)) for one in rows)
    head = about | {"ceilings": asdict(ceilings)}
    (folder / "tune.json").write_text(
        f'{json.dumps(head)[:-1]},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
