"""The sweep of a private step on a GPU: bits, time, and what ChaCha20 costs over Philox, in half a minute.

    python -m bench.sweep_gpu                     builds bench/native by nvcc; JSON to $OUT (default bench/results)
    python -m bench.sweep_gpu --sizes 2e7 --rounds 5

Needs nvcc, and the native libraries in dpkernels/lib (`python setup.py build_ext --inplace`). "queued" is the time
between two CUDA events while the GPU was kept busy until both the work and they were queued: launches and Python are
not in it. "called" has them in. Each entry of a sweep moves 40 bytes: its float64 sum is read and cleared, float32
parameter and moments are read and written; of torch's AdamW 28, of torch.normal + add + AdamW 28 + 4 + 12.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine, native_bench, sweep_cases
from bench.timer import Samples
from dpkernels import ops
from dpkernels.backends import native_chacha20, native_sweep

SWEEP_BYTES, ADAM_BYTES, APART_BYTES = 40, 28, 44
VARIANTS = {
    "2 pairs": {"DPK_GROUP": 2, "DPK_PREFETCH": 0, "DPK_STREAM": 0},
    "2 pairs, prefetched": {"DPK_GROUP": 2, "DPK_PREFETCH": 1, "DPK_STREAM": 0},  # as the library has it
    "2 pairs, prefetched, streamed": {"DPK_GROUP": 2, "DPK_PREFETCH": 1, "DPK_STREAM": 1},
    "4 pairs": {"DPK_GROUP": 4, "DPK_PREFETCH": 0, "DPK_STREAM": 0},
    "4 pairs, prefetched": {"DPK_GROUP": 4, "DPK_PREFETCH": 1, "DPK_STREAM": 0},
    "1 pair, prefetched": {"DPK_GROUP": 1, "DPK_PREFETCH": 1, "DPK_STREAM": 0},
}
"""What is measured side by side until one is chosen."""

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


def called(function: Callable[[], object]) -> float:
    """Seconds from an idle GPU to the end of the work."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
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
            one = measure(function)
            if turn >= 2:
                taken[name].append(one)
    return {name: Samples(tuple(own)) for name, own in taken.items()}


class Buffers:
    """`tensors` equal parameters of together `count` entries, their sums and moments, and the call's table."""

    def __init__(self, count: int, tensors: int, device: str, dtype: torch.dtype = torch.float32) -> None:
        def fill(dtype: torch.dtype, scale: float) -> list[Tensor]:
            whole = torch.empty(count, device=device, dtype=dtype).normal_().mul_(scale)
            return list(whole.chunk(tensors))

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
        self.table = native_sweep._table(*buffers, [], [3.0] * count, nonces, nonces)
        key = torch.tensor(list(sweep_cases.KEY), dtype=torch.uint8)
        rounding = nonces if self.params[0].dtype == torch.bfloat16 else nonces[:0]
        self.noise = native_sweep._noise(
            key, sweep_cases.SCALE, sweep_cases.GRID, sweep_cases.DIVISOR, False, rounding
        )
        self.options = native_sweep._Adam(*sweep_cases.HYPER.values(), 1)

    def library(self) -> None:
        """The sweep that is installed."""
        native_sweep._run("noise_adamw", self.params[0].device, self.table, self.noise, self.options)

    def everything(self) -> list[Tensor]:
        return [*self.params, *self.sums, *self.firsts, *self.seconds]


def awkward(device: str, dtype: torch.dtype, most: int = 300_032) -> Buffers:
    """Odd lengths, odd addresses, and second moments for which a short root or quotient would be wrong."""
    made = Buffers(8, 1, "cpu", dtype)
    for name in ("params", "sums", "firsts", "seconds"):
        generator = torch.Generator().manual_seed(len(name))
        tensors = []
        counts = [c for c in (1, 255, 256, 257, 1024, 5000, 70_001, 300_032) if c <= most]
        for count in (*counts, 4099):
            one = torch.randn(count + 3, generator=generator, dtype=torch.float64)
            if name == "seconds":
                one = one.square() * 10.0 ** torch.randint(-44, 20, one.shape, generator=generator)
            elif name != "params":
                powers = (-44, 20) if name == "firsts" else (-3, 16)
                one = one * 10.0 ** torch.randint(*powers, one.shape, generator=generator)
            kept = {"params": dtype, "sums": torch.float64}.get(name, torch.float32)
            whole = one.to(kept).to(device)
            tensors.append(whole[3:] if count == 4099 else whole[:count].clone())
        setattr(made, name, tensors)
    made.retable()
    return made


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


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """The same bits, the signs of zeros included."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return all(
        torch.equal(x.cpu().view(kinds[x.element_size()]), y.cpu().view(kinds[y.element_size()]))
        for x, y in zip(a, b, strict=True)
    )


def checks(builds: dict[str, native_bench.Bench]) -> dict[str, bool]:
    """Whether the GPU makes the CPU's bits, for the installed library and every build."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        on_cpu = awkward("cpu", dtype)
        on_cpu.library()
        runs: dict[str, Callable[[Buffers], None]] = {"installed": lambda b: b.library()}
        for name, build in builds.items():
            runs[name] = lambda b, build=build: build.sweep("chacha20", b.table, b.noise, b.options)  # type: ignore[misc]
        for name, run in runs.items():
            on_gpu = awkward("cuda", dtype)
            run(on_gpu)
            found[f"sweep, {dtype}, {name}"] = same(on_gpu.everything(), on_cpu.everything())
    words = extreme_words()
    exact = native_chacha20.box_muller(words)
    for name, build in builds.items():
        found[f"normals of extreme words, {name}"] = same([build.box_muller(words)], [exact])
    drawn = [
        ops.chacha20_normal(3_000_001, key=bytes(32), nonce=bytes(12), device=d) for d in ("cpu", "cuda")
    ]
    found["3,000,001 normals"] = same(drawn[:1], drawn[1:])
    first = next(iter(builds.values()))
    # Random123's known answers: of zeros, and of digits of pi.
    zeros = first.philox([0, 0, 0, 0], [0, 0])[:4]
    found["Philox's known answer"] = zeros == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    return found


def build_all(variants: dict[str, dict[str, int]]) -> dict[str, native_bench.Bench]:
    """All variants, compiled side by side."""
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda defines: native_bench.load(**defines), variants.values())
        return dict(zip(variants, made, strict=True))


def bandwidth(rounds: int) -> float:
    """Bytes a second, read plus written, of a large device-to-device copy."""
    source = torch.empty(2**29, device="cuda").normal_()
    target = torch.empty_like(source)
    taken = in_turns({"copy": lambda: target.copy_(source)}, rounds, queued)
    return 2 * 4 * source.numel() / taken["copy"].median


def time_sweeps(
    count: int, tensors: int, builds: dict[str, native_bench.Bench], rounds: int
) -> dict[str, Any]:
    """Seconds of every contender: {name: {"queued", "called", "bytes"}}."""
    ours = Buffers(count, tensors, "cuda")
    contenders: dict[str, Callable[[], object]] = {"dpkernels": ours.library}
    for name, build in builds.items():
        for generator in native_bench.GENERATORS:
            contenders[f"{generator}, {name}"] = lambda b=build, g=generator: b.sweep(  # type: ignore[misc]
                g, ours.table, ours.noise, ours.options
            )
    parts = [(contenders, SWEEP_BYTES)]
    torchs = {
        n: sweep_cases.Update(n, count, tensors, torch.float32, "cuda") for n in (sweep_cases.NON_PRIVATE,)
    }
    plain = next(iter(torchs.values()))
    plain.run()

    def apart() -> None:
        with torch.no_grad():
            for parameter in plain.params:
                noise = torch.normal(
                    0.0, sweep_cases.SCALE / sweep_cases.DIVISOR, parameter.shape, device="cuda"
                )
                parameter.grad.add_(noise)  # type: ignore[union-attr]
        plain.run()

    parts += [({sweep_cases.NON_PRIVATE: plain.run}, ADAM_BYTES), ({sweep_cases.PLAIN: apart}, APART_BYTES)]
    everyone = {name: run for group, _ in parts for name, run in group.items()}
    moved = {name: each for group, each in parts for name in group}
    on_gpu = in_turns(everyone, rounds, queued)
    few = {n: everyone[n] for n in ("dpkernels", sweep_cases.NON_PRIVATE, sweep_cases.PLAIN)}
    whole = in_turns(few, max(3, rounds // 3), called)
    return {
        name: {
            "queued": samples.median,
            "iqr": samples.iqr,
            "called": whole[name].median if name in whole else None,
            "bytes": moved[name] * count,
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


def table(result: dict[str, Any]) -> str:
    """What is printed."""
    copy = result["copy_bytes_per_s"]
    lines = [
        f"{result['about']['device']}, commit {result['about']['commit']}: a copy moves {copy / 1e12:.3f} TB/s"
    ]
    lines += [f"  {'ok ' if good else 'BAD'} {what}" for what, good in result["checks"].items()]
    for size, rows in result["sweeps"].items():
        lines.append(f"{float(size):.0e} entries in {result['tensors']} tensors")
        for name, row in rows.items():
            other = rows.get(name.replace("chacha20", "philox", 1))
            ratio = f"{row['queued'] / other['queued']:6.3f} × Philox" if other and other is not row else ""
            whole = f"{row['called'] * 1e3:8.3f} ms called" if row["called"] else " " * 18
            share = row["bytes"] / row["queued"] / copy
            taken = f"{row['queued'] * 1e3:8.3f} ms ±{row['iqr'] * 1e3:.3f}"
            lines.append(f"  {name:42} {taken} {whole} {share:6.1%} of copy {ratio}")
    for name, seconds in result["normals"].items():
        lines.append(f"  {name:42} {seconds * 1e3:8.3f} ms for {result['normals_count']:.0e} float32 normals")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweep_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", nargs="+", type=float, default=[2e7, 2e8])
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device; mend: run this on a machine with a GPU", file=sys.stderr)
        return 2
    builds = build_all(VARIANTS)
    result: dict[str, Any] = {
        "about": machine.about("cuda"),
        "checks": checks(builds),
        "copy_bytes_per_s": bandwidth(options.rounds),
        "tensors": options.tensors,
        "variants": VARIANTS,
        "sweeps": {},
        "normals_count": 10**8,
        "normals": time_normals(10**8, options.rounds),
    }
    for size in options.sizes:
        rows = time_sweeps(int(size), options.tensors, builds, options.rounds)
        result["sweeps"][str(int(size))] = rows
        torch.cuda.empty_cache()
    folder = Path(os.environ.get("OUT", "bench/results"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep_gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0 if all(result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
