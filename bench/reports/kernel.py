"""Measurements of single kernels outside of `pytest --benchmark`, as Markdown for docs/benchmarks.md.

Each function takes the result that its module saved: `sweep`, `many_normals`, `transducer_loss` and `tensor_cores`
under bench/results/<device>, and `triton_table`. `section` includes the files that exist.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.cases.optim import FUSED, NON_PRIVATE
from bench.harness.table import markdown

Saved = Mapping[str, Any]


def fused_step(saved: Saved) -> str:
    """The fused step beside Philox's and torch's, and the normals on their own."""
    copy = saved["copy_bytes_per_s"]
    wrong = [what for what, good in saved["checks"].items() if not good]
    right = len(saved["checks"]) - len(wrong)
    bits = f"**wrong bits: {'; '.join(wrong)}**" if wrong else f"{right} checks of its bits passed"
    head = (
        f"**Noise and AdamW in one fused step, {saved['about']['device']}** ({_origin(saved)}): float32 parameters and "
        f"state in {saved['tensors']} tensors, {bits}. Time on the GPU: median ± half the interquartile range. Share "
        f"of copy bandwidth: of the {copy / 1e12:.2f} TB/s that a large copy reads and writes, for the least that a "
        "contender must move."
    )
    rows = []
    for size, by_contender in sorted(saved["sweeps"].items(), key=lambda item: int(item[0])):
        base = by_contender.get(NON_PRIVATE)
        for i, (name, row) in enumerate(by_contender.items()):
            cells = [
                f"{row['queued'] * 1e3:.3f} ± {row['iqr'] / 2 * 1e3:.3f}",
                f"{row['bytes'] / row['queued'] / copy:.1%}",
                f"{row['queued'] / base['queued']:.2f}×" if base else "",
            ]
            line = [name, *cells]
            if name == FUSED:
                line = [f"**{cell}**" if cell else "" for cell in line]
            rows.append([f"{int(size):,}" if i == 0 else "", *line])
    table = markdown(
        ["entries", "contender", "time, ms", "share of copy bandwidth", "× non-private"], rows, "llrrr"
    )
    alone, torchs = saved["normals"]["chacha20_normal"], saved["normals"]["torch.randn"]
    normals = (
        f"The noise alone, which this step never writes to memory: {saved['normals_count']:,} float32 normals take "
        f"{alone * 1e3:.3f} ms, torch.randn's {torchs * 1e3:.3f} ms ({alone / torchs:.1f}×)."
    )
    return f"{head}\n\n{table}\n\n{normals}"


def tune(saved: Saved) -> str:
    """The Triton kernels in the configuration that is used, the first of each, beside plain PyTorch."""
    ceilings = saved["ceilings"]
    flops, bandwidth = ceilings["flops"] / 1e12, ceilings["bandwidth"] / 1e12
    head = (
        f"**Triton kernels, {saved['device']}** ({_origin({'about': saved})}): bfloat16, r = 16, inputs larger than "
        f"the cache; grouped: 24 layers a launch. Share: of {flops:.0f} TFLOP/s, the rate of a large matrix product, "
        f"counting executed tiles, or of {bandwidth:.2f} TB/s, the bandwidth of a large copy, counting each input "
        "once. Plain PyTorch: the shortest expression, with no bound on its rounding."
    )
    plain = {(r["kernel"], str(r["shape"])): r for r in saved["rows"] if r["config"] == "plain torch"}
    rows: list[list[str]] = []
    seen: set[tuple[str, str]] = set()
    for row in saved["rows"]:
        place = (row["kernel"], str(row["shape"]))
        if row["config"] == "plain torch" or place in seen:
            continue
        seen.add(place)
        shape = ", ".join(f"{name} = {value}" for name, value in row["shape"].items())
        unit = "matrix rate" if row["teraflops"] else "copy bandwidth"
        beside = plain.get(place)
        times = f"{beside['microseconds'] / row['microseconds']:.1f}×" if beside else ""
        rows.append(
            [
                f"`{row['kernel']}`",
                shape,
                f"{row['microseconds']:.1f}",
                f"{row['share']:.0%} of {unit}",
                times,
            ]
        )
    return f"{head}\n\n" + markdown(
        ["kernel", "shape", "time, µs", "share", "faster than plain PyTorch"], rows, "llrrr"
    )


def peaks(saved: Saved) -> str:
    """Predicted against measured peak memory; of GPUs only: docs/memory.md has a CPU's."""
    if not saved["about"]["slug"].startswith("nvidia"):
        return ""
    rows = [row for row in saved["rows"] if "measured" in row]
    worst = max(abs(row["error"]) for row in rows)
    lines = [
        [
            row["case"],
            row["strategy"],
            ", ".join(f"{name} = {value}" for name, value in row["shape"].items()),
            f"{row['predicted'] / 2**20:,.0f}",
            f"{row['measured'] / 2**20:,.0f}",
            f"{row['error']:+.1%}",
        ]
        for row in rows
    ]
    head = (
        f"**Peak memory of a private step, predicted and measured, {saved['about']['device']}** ({_origin(saved)}), "
        f"weights included; the largest error is {worst:.1%}:"
    )
    return f"{head}\n\n" + markdown(
        ["model", "strategy", "micro-batch", "predicted, MiB", "measured, MiB", "error"], lines, "lllrrr"
    )


def strategies(saved: Saved) -> str:
    """Every strategy's time and memory, with activations kept and computed again."""
    head = (
        f"**Strategies and activation checkpointing, {saved['about']['device']}** ({_origin(saved)}), one thread. "
        f"Time: CPU seconds of a forward and private backward, median of {saved['rounds']}. Memory: live bytes at the "
        "highest point of a whole step with AdamW, weights included."
    )
    rows = []
    by_way = {(row["case"], row["strategy"], row["checkpointing"]): row for row in saved["rows"]}
    for case, strategy in dict.fromkeys((row["case"], row["strategy"]) for row in saved["rows"]):
        kept, again = by_way[case, strategy, False], by_way[case, strategy, True]
        shape = ", ".join(f"{name} = {value}" for name, value in kept["shape"].items())
        cells = [f"{row['cpu_seconds']:.2f}" for row in (kept, again)]
        cells += [f"{row['peak'] / 2**20:.0f}" for row in (kept, again)]
        rows.append([f"{kept['title']}, {shape}", f"`{strategy}`", *cells])
    names = ["model", "strategy", "kept, s", "recomputed, s", "kept, MiB", "recomputed, MiB"]
    return f"{head}\n\n{markdown(names, rows, 'llrrrr')}"


def many_normals(saved: Saved) -> str:
    """A sentence: how many draws were judged, and whether they are sound."""
    unsound = [figure["name"] for figure in saved["figures"] if not figure["sound"]]
    count = len(saved["figures"])
    verdict = (
        f"**{len(unsound)} of {count} figures are out of their limits: {'; '.join(unsound)}**"
        if unsound
        else f"all {count} figures (moments, tails, goodness of fit, independence) are within their limits"
    )
    return (
        f"{saved['draws']:,} draws of the noise in {saved['dtype']} on {saved['about']['device']} "
        f"({_origin(saved)}): {verdict}; the largest draw is {saved['largest']:.2f} σ."
    )


def tensor_cores(saved: Saved) -> str:
    """A sentence: whether this GPU's tensor cores round as its bound assumes."""
    assumed = saved["assumed"]
    verdict = (
        f"**coarser than assumed: {'; '.join(saved['faults'])}**"
        if saved["faults"]
        else "as assumed or finer"
    )
    worst = max(experiment["worst"] for experiment in saved["found"])
    return (
        f"Tensor cores of {saved['about']['device']} ({_origin(saved)}), {len(saved['found'])} experiments: {verdict} "
        f"(blocks of {assumed['block']} products, {assumed['extra']} extra bits, {assumed['roundings']:.2f} roundings "
        f"a product); the largest error that a search found is {worst:.2f} of the bound."
    )


def triton_table(saved: Saved) -> str:
    """A sentence: how many Triton kernels compile for how many architectures, and how many of them spill."""
    architectures = ", ".join(f"sm_{architecture}" for architecture in saved["architectures"])
    spill = f"**{saved['spilling']} spill**" if saved["spilling"] else "none spills a register"
    faulty = f", **{saved['faulty']} have faults**" if saved["faulty"] else ""
    return (
        f"Triton {saved['triton']} compiles {saved['compiled']:,} variants of {saved['kernels']} kernels for "
        f"{architectures}: {spill}{faulty} (`python -m bench.gpu.triton_table`; compiled, not run)."
    )


def transducer_loss(saved: Saved) -> str:
    """The transducer loss beside torchaudio's and transformers', and beside its three products."""
    head = (
        f"**The transducer loss, {saved['about']['device']}** ({_origin(saved)}): forward and backward by the states, "
        f"bfloat16, H = {saved['hidden']}, without padding. Floor: the three products by torch.mm."
    )
    rows = []
    for row in saved["rows"]:
        size = ", ".join(f"{letter} = {n:,}" for letter, n in zip("BTUV", row["size"], strict=True))
        floor = row["contenders"]["floor"]["seconds"]
        for i, (name, of) in enumerate(row["contenders"].items()):
            cells = ["", "", ""]
            if "seconds" in of:
                peak = f"{of['peak_mib']:,.0f}" if "peak_mib" in of else ""
                time = f"{of['seconds'] * 1e3:.1f} ± {of['iqr'] / 2 * 1e3:.1f}"
                cells = [time, f"{of['seconds'] / floor:.2f}×", peak]
            else:
                cells[0] = of["status"]
            rows.append([f"{row['kind']}, {size}" if i == 0 else "", name, *cells])
    return f"{head}\n\n{markdown(['on', 'contender', 'time, ms', '× floor', 'peak MiB'], rows, 'llrrr')}"


_OF_A_DEVICE: dict[str, Callable[[Saved], str]] = {
    "tune": tune,
    "transducer_loss": transducer_loss,
    "sweep": fused_step,
    "peaks": peaks,
    "strategies": strategies,
    "many_normals": many_normals,
    "tensor_cores": tensor_cores,
}


def section(folder: Path, device: str | None = None) -> list[str]:
    """Everything that is under a folder (of one device)."""
    parts = [
        of(json.loads(path.read_text(encoding="utf-8")))
        for name, of in _OF_A_DEVICE.items()
        for path in sorted(folder.glob(f"{device or '*'}/{name}.json"))
    ]
    parts = [part for part in parts if part]
    path = folder / "triton_table.json"
    return [*parts, triton_table(json.loads(path.read_text(encoding="utf-8")))] if path.exists() else parts


def _origin(saved: Saved) -> str:
    about = saved["about"]
    changed = " with changes" if about.get("dirty") else ""
    return f"torch {about['versions']['torch']}; commit {about['commit']}{changed}, {about['date'][:10]}"
