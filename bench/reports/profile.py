"""Where the time of a step goes: `python -m bench.reports.profile` writes bench/results/<device>/profile.json.

Self times of every operator in torch's profiler, over a few steps of each contender, added up by what they are for.
Profiling slows a step down, and more so one of many small operators: read shares, and take times from `step`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from bench.cases.models import CASES, Case, working_copy
from bench.contenders import Settings, registry
from bench.harness import machine
from bench.harness.results import FOLDER
from bench.names import NON_PRIVATE, OPACUS_GHOST, OPACUS_HOOKS, TIMED_STRATEGIES, ours

CONTENDERS = (NON_PRIVATE, *(ours(name) for name in TIMED_STRATEGIES), OPACUS_HOOKS, OPACUS_GHOST)
# (what for, parts of the operators' names); the first that fits.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("per-sample norms", ("_norm_sq", "clip_factors")),
    ("per-sample gradients", ("lora_gradients",)),
    ("weighted sums", ("_weighted_sum", "weighted_sums")),
    ("noise and optimizer", ("noise_", "chacha20", "Optimizer.", "normal_", "addcmul", "addcdiv", "lerp")),
    ("convolutions", ("convolution",)),
    ("matrix products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addbmm")),
)
OTHER = "other"


def kind_of(operator: str) -> str:
    """Return the purpose of an operator."""
    return next((kind for kind, parts in KINDS if any(part in operator for part in parts)), OTHER)


def of_case(case: Case, size: int, frames: int, *, steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step by contender and kind, the largest first."""
    model, batch = case.model(frames), case.batch(size, frames)
    profiles = {}
    for name in CONTENDERS:
        contender = registry()[name](case, working_copy(model), batch, Settings())
        for _ in range(2):
            contender.prepare()
            contender.step()
        times: dict[str, float] = {}
        for _ in range(steps):
            contender.prepare()
            with profile(activities=[ProfilerActivity.CPU]) as taken:
                contender.step()
            for row in taken.key_averages():
                kind = kind_of(row.key)
                times[kind] = times.get(kind, 0.0) + row.self_cpu_time_total / 1e3 / steps
        profiles[name] = {kind: round(ms, 2) for kind, ms in sorted(times.items(), key=lambda item: -item[1])}
    return profiles


def show(cases: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Sequence[Table]:
    """A table a case: kinds down, contenders across, in milliseconds."""
    tables = []
    for name, profiles in cases.items():
        table = Table(title=f"{CASES[name].title}, ms a step", title_justify="left", box=None, pad_edge=False)
        table.add_column("self time in", no_wrap=True)
        for contender in profiles:
            table.add_column(contender, justify="right")
        kinds = dict.fromkeys(kind for times in profiles.values() for kind in times)
        for kind in kinds:
            table.add_row(
                kind, *(f"{times[kind]:.1f}" if kind in times else "" for times in profiles.values())
            )
        table.add_row("all", *(f"{sum(times.values()):.1f}" for times in profiles.values()))
        tables.append(table)
    return tables


def markdown(saved: Mapping[str, Any]) -> str:
    """The same as Markdown tables, with what it was measured on."""
    parts = [
        f"Where the time goes, {saved['about']['device']}, {saved['shape']}: self times by torch's profiler, ms a "
        f"step (profiling adds some; commit {saved['about']['commit']}, {saved['about']['date'][:10]})."
    ]
    for name, profiles in saved["cases"].items():
        kinds = dict.fromkeys(kind for times in profiles.values() for kind in times)
        lines = [f"| {CASES[name].title} | " + " | ".join(profiles) + " |", "|---|" + "--:|" * len(profiles)]
        for kind in kinds:
            cells = (f"{times[kind]:.0f}" if kind in times else "" for times in profiles.values())
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reports.profile", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--cases", default="parakeet-lora,parakeet-full", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=8, help="utterances; default: %(default)s")
    parser.add_argument("--frames", type=int, default=150, help="encoder frames; default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="profiled steps; default: %(default)s")
    parser.add_argument("--output", type=Path, default=FOLDER, help="default: bench/results")
    options = parser.parse_args(arguments)
    names = options.cases.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"--cases: no case {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    cases = {name: of_case(CASES[name], options.size, options.frames, steps=options.steps) for name in names}
    about = machine.about("cpu")
    saved = {"about": about, "shape": f"B = {options.size}, T = {options.frames}", "cases": cases}
    path = options.output / about["slug"] / "profile.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console = Console(width=118)
    for table in show(cases):
        console.print(table)
        console.print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
