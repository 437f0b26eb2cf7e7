"""The fused step on a GPU: bits, time, and what ChaCha20 costs over Philox, in half a minute.

    python -m bench.gpu.optim                     builds bench/native by nvcc; $OUT/<device>/sweep.json
    python -m bench.gpu.optim --sizes 2e7 --rounds 5

OUT defaults to bench/results. The module needs nvcc, and the native libraries in dpkernels/lib (`python setup.py
build_ext --inplace`). "queued" is the time between two CUDA events, with the GPU kept busy until all work is
queued, so that it excludes launches and Python. "called" includes them. The fused step moves 40 bytes an entry: it
reads and clears the float64 sum, and reads and writes float32 parameter and moments. torch's AdamW moves 28 bytes
an entry, and torch.normal + add + AdamW move 28 + 4 + 12.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.cases import native as native_bench
from bench.cases import optim as optim_cases
from bench.cases.optim import FUSED, NON_PRIVATE, PHILOX, PLAIN
from bench.harness import machine
from bench.harness.timer import Samples, device_seconds
from bench.reports import kernel as kernel_report
from dpkernels import ops
from dpkernels.backends.native_ops import chacha20 as native_chacha20
from dpkernels.backends.native_ops import optim as native_optim

BYTES = {FUSED: 40, PHILOX: 40, NON_PRIVATE: 28, PLAIN: 44}
"""What an entry moves at least: see above."""

HOLD = 12_000_000
"""Clock cycles that the GPU spins while work is queued: some 7 ms."""


def queued(function: Callable[[], object]) -> float:
    """Seconds on the GPU alone."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(HOLD)
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def in_turns(
    contenders: dict[str, Callable[[], object]], rounds: int, measure: Callable[[Callable[[], object]], float]
) -> dict[str, Samples]:
    """Each contender once a round, after two rounds that are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, function in contenders.items():
            duration = measure(function)
            if turn >= 2:
                taken[name].append(duration)
    return {name: Samples(tuple(durations)) for name, durations in taken.items()}


class Buffers:
    """`tensors` equal parameters of together `count` entries, their sums and moments, and the call's table."""

    def __init__(self, count: int, tensors: int, device: str, dtype: torch.dtype = torch.float32) -> None:
        def fill(dtype: torch.dtype, scale: float) -> list[Tensor]:
            values = torch.empty(count, device=device, dtype=dtype).normal_().mul_(scale)
            return list(values.chunk(tensors))

        self.params, self.sums = fill(dtype, 1.0), fill(torch.float64, 5.0)
        self.firsts = fill(torch.float32, 0.01)
        self.seconds = [v.square_() for v in fill(torch.float32, 0.01)]
        self.retable()

    def retable(self) -> None:
        """After tensors were replaced."""
        count = len(self.params)
        nonces = torch.tensor(
            list(b"".join(i.to_bytes(12, "little") for i in range(count))), dtype=torch.uint8
        )
        buffers = (self.params, self.sums, self.firsts, self.seconds)
        self.table = native_optim._table(*buffers, [], [3.0] * count, nonces, nonces)
        key = torch.tensor(list(optim_cases.KEY), dtype=torch.uint8)
        rounding = nonces if self.params[0].dtype == torch.bfloat16 else nonces[:0]
        self.noise = native_optim._noise(
            key, optim_cases.SCALE, optim_cases.GRID, optim_cases.DIVISOR, False, rounding
        )
        self.options = native_optim._Adam(*optim_cases.HYPER.values(), 1)

    def library(self) -> None:
        """The library's fused step."""
        native_optim._run("noise_adamw", self.params[0].device, self.table, self.noise, self.options)

    def everything(self) -> list[Tensor]:
        return [*self.params, *self.sums, *self.firsts, *self.seconds]


def awkward(device: str, dtype: torch.dtype, most: int = 300_032) -> Buffers:
    """Odd lengths, odd addresses, little noise, and moments for which a short root or quotient would be wrong."""
    buffers = Buffers(8, 1, "cpu", dtype)
    for name in ("params", "sums", "firsts", "seconds"):
        generator = torch.Generator().manual_seed(len(name))
        tensors = []
        counts = [c for c in (1, 255, 256, 257, 1024, 5000, 70_001, 300_032) if c <= most]
        for count in (*counts, 4099):
            entries = torch.randn(count + 3, generator=generator, dtype=torch.float64)
            if name == "seconds":
                entries = entries.square() * 10.0 ** torch.randint(
                    -44, 36, entries.shape, generator=generator
                )
            elif name != "params":
                powers = (-44, 20) if name == "firsts" else (-40, 16)
                entries = entries * 10.0 ** torch.randint(*powers, entries.shape, generator=generator)
            kept = {"params": dtype, "sums": torch.float64}.get(name, torch.float32)
            values = entries.to(kept).to(device)
            tensors.append(values[3:] if count == 4099 else values[:count].clone())
        setattr(buffers, name, tensors)
    buffers.retable()
    buffers.noise.noise_scale, buffers.noise.grid, buffers.options.eps = 1e-24, 2.0**-92, 1e-30
    return buffers


def extreme_words() -> Tensor:
    """Words at both ends, at every power of two and beside it, and 4 million drawn ones: int64 [pairs, 2]."""
    edges = {0, 2**64 - 1}
    for power in range(64):
        for near in (-2, -1, 0, 1, 2):
            edges |= {(2**power + near) % 2**64, (2**64 - 2**power + near) % 2**64}
    signed = torch.tensor(sorted(e - 2**64 if e >= 2**63 else e for e in edges))
    pairs = torch.cartesian_prod(signed, signed)
    drawn = ops.chacha20_keystream(bytes(32), 0, bytes(12), 2**20).view(torch.int64).view(-1, 2)
    return torch.cat([pairs, drawn])


def all_mantissas() -> tuple[Tensor, Tensor]:
    """(a, b), float32: every b of [1, 4), each beside an a drawn from [1, 2) or near a tie of a/b."""
    b = torch.arange(0x3F800000, 0x40800000, dtype=torch.int32).view(torch.float32)
    drawn = torch.rand(b.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tie = 1 + (drawn * 2**23).floor() * 2.0**-23 + 2.0**-24
    odd = torch.arange(len(b)) % 2 == 1
    return torch.where(odd, tie * b.double(), 1 + drawn).float(), b


def rounded(a: Tensor, b: Tensor) -> list[Tensor]:
    """√b and a/b, correctly rounded: float64 has more than twice the bits, and torch's own √ may be a unit off."""
    return [b.double().sqrt().float(), (a.double() / b.double()).float()]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """The same bits, the signs of zeros included."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return all(
        torch.equal(x.cpu().view(kinds[x.element_size()]), y.cpu().view(kinds[y.element_size()]))
        for x, y in zip(a, b, strict=True)
    )


def checks(build: native_bench.Bench) -> dict[str, bool]:
    """Whether the GPU makes the CPU's bits."""
    passed = {}
    for dtype in (torch.float32, torch.bfloat16):
        on_cpu, on_gpu = (awkward(device, dtype) for device in ("cpu", "cuda"))
        on_cpu.library()
        on_gpu.library()
        passed[f"sweep, {dtype}"] = same(on_gpu.everything(), on_cpu.everything())
    words = extreme_words()
    passed["normals of extreme words"] = same([build.box_muller(words)], [native_chacha20.box_muller(words)])
    drawn = [
        ops.chacha20_normal(3_000_001, key=bytes(32), nonce=bytes(12), device=d) for d in ("cpu", "cuda")
    ]
    passed["3,000,001 normals"] = same(drawn[:1], drawn[1:])
    a, b = all_mantissas()
    passed["float32 roots and quotients, every mantissa"] = same(build.short(a, b), rounded(a, b))
    # Random123's known answer.
    zeros = build.philox([0, 0, 0, 0], [0, 0])[:4]
    passed["Philox's known answer"] = zeros == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    return passed


def bandwidth(rounds: int) -> float:
    """Bytes a second, read plus written, of a large device-to-device copy."""
    source = torch.empty(2**29, device="cuda").normal_()
    target = torch.empty_like(source)
    taken = in_turns({"copy": lambda: target.copy_(source)}, rounds, queued)
    return 2 * 4 * source.numel() / taken["copy"].median


def time_steps(count: int, tensors: int, build: native_bench.Bench, rounds: int) -> dict[str, Any]:
    """Seconds of every contender: {name: {"queued", "iqr", "called", "bytes"}}."""
    ours = Buffers(count, tensors, "cuda")
    plain, apart = (
        optim_cases.Update(n, count, tensors, torch.float32, "cuda") for n in (NON_PRIVATE, PLAIN)
    )
    contenders: dict[str, Callable[[], object]] = {
        FUSED: ours.library,
        PHILOX: lambda: build.philox_step(ours.table, ours.noise, ours.options),
        NON_PRIVATE: plain.run,
        PLAIN: apart.run,
    }
    on_gpu = in_turns(contenders, rounds, queued)
    called = in_turns(contenders, max(3, rounds // 3), device_seconds)
    return {
        name: {
            "queued": samples.median,
            "iqr": samples.iqr,
            "called": called[name].median,
            "bytes": BYTES[name] * count,
        }
        for name, samples in on_gpu.items()
    }


def time_normals(count: int, rounds: int) -> dict[str, float]:
    """Seconds for that many float32 normals."""
    target = torch.empty(count, device="cuda")
    contenders: dict[str, Callable[[], object]] = {
        "chacha20_normal": lambda: ops.chacha20_normal(
            count, key=bytes(32), nonce=bytes(12), device="cuda", dtype=torch.float32
        ),
        "torch.randn": lambda: target.normal_(),
    }
    return {name: samples.median for name, samples in in_turns(contenders, rounds, queued).items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.optim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", nargs="+", type=float, default=[2e7, 2e8])
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device; fix: run this on a machine with a GPU", file=sys.stderr)
        return 2
    build = native_bench.load()
    result: dict[str, Any] = {
        "about": machine.about("cuda"),
        "checks": checks(build),
        "copy_bytes_per_s": bandwidth(options.rounds),
        "tensors": options.tensors,
        "sweeps": {},
        "normals_count": 10**8,
        "normals": time_normals(10**8, options.rounds),
    }
    for size in options.sizes:
        result["sweeps"][str(int(size))] = time_steps(int(size), options.tensors, build, options.rounds)
        torch.cuda.empty_cache()
    machine.save(result, "sweep")
    for what, good in result["checks"].items():
        print(f"{'ok ' if good else 'BAD'} {what}")
    print(kernel_report.fused_step(result))
    return 0 if all(result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
