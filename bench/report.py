"""The README's table and the plots, from the results files: `python -m bench.report [--device SLUG]`.

The table stands in README.md between `<!-- bench -->` and `<!-- /bench -->`; what is between them is replaced, and
nothing in it is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import kernel_report, plots, profile, table
from bench.checker import OK
from bench.contenders import OPACUS_GHOST, OPACUS_HOOKS
from bench.machine import ROOT
from bench.results import FOLDER, GROUPS, Results, Row, load
from bench.table import milliseconds, times

START, END = "<!-- bench -->", "<!-- /bench -->"
README = ROOT / "README.md"
_SHOWN = ("step", "model")
_NOT_RUN = "not run"


def found(folder: Path, device: str | None = None) -> list[Results]:
    """All results under a folder (of one device), in the order of the groups."""
    paths = sorted(folder.glob(f"{device or '*'}/*.json"))
    results = [load(path) for path in paths if path.stem in GROUPS]
    return sorted(results, key=lambda one: (one.about["slug"], GROUPS.index(one.group)))


def main_rows(results: Results) -> list[Row]:
    """The rows that are not points of a curve."""
    return [row for row in results.rows if row.axis is None]


def largest_batches(results: Iterable[Results]) -> dict[tuple[str, str], Row]:
    """(case, contender) -> the row that holds its largest batch."""
    return {(r.case, r.contender): r for one in results for r in one.rows if r.largest_batch is not None}


def markdown(all_results: Sequence[Results]) -> str:
    """The README's section: for each device a line that says what it is, and a table of whole steps."""
    parts = []
    for device in dict.fromkeys(one.about["slug"] for one in all_results):
        own = [one for one in all_results if one.about["slug"] == device and one.group in _SHOWN]
        rows = [row for one in own for row in main_rows(one)]
        if rows:
            parts += [_header(own), _table(rows), *_notes(rows), *_not_run(rows), *_batches(own)]
    return "\n\n".join(parts)


def _header(own: Sequence[Results]) -> str:
    about = own[0].about
    cores = "" if about.get("cuda") and about["load"] is None else f", {about['threads']} threads"
    versions = ", ".join(
        f"{name} {about['versions'][name]}"
        for name in ("torch", "opacus", "peft", "transformers")
        if about["versions"].get(name)
    )
    state = " with changes" if about.get("dirty") else ""
    return (
        f"**{about['device']}{cores}** ({versions}; commit {about['commit']}{state}, {about['date'][:10]}). A whole "
        "optimizer step: forward, backward, clip, noise, AdamW. Time: median ± half the interquartile range. "
        "× non-private: smaller is better; faster than Opacus: larger is better. Memory: peak of the step beyond "
        "model and batch."
    )


def _table(rows: Sequence[Row]) -> str:
    head = (
        "step",
        "contender",
        "time, ms",
        "× non-private",
        "faster than Opacus ghost",
        "… hooks",
        "memory, MiB",
    )
    rated = any(row.rate is not None for row in rows)
    if rated:
        head = (*head, "utterances a second", "model FLOPs, of the matrix rate")
    lines = []
    place = None
    absent = _absent(rows)
    for row in rows:
        first = row.place != place
        place = row.place
        shape = _shape(row)
        memory = ""
        if row.peak_mib is not None:
            share = "" if row.memory_ratio is None else f" ({row.memory_ratio:.2f}×)"
            memory = f"{row.peak_mib:.0f}{share}"
        own = row.contender.startswith("dpkernels")
        ratios = [
            _NOT_RUN if base in absent[row.place] else times(value)
            for base, value in ((OPACUS_GHOST, row.over_ghost), (OPACUS_HOOKS, row.over_hooks))
        ]
        cells = [milliseconds(row), times(row.ratio), *ratios, memory]
        if rated:
            cells.append("" if row.rate is None else f"{row.rate:.0f}")
            cells.append("" if row.matrix_share is None else f"{row.matrix_share:.0%}")
        cells = [f"**{cell}**" if own and cell not in ("", _NOT_RUN) else cell for cell in cells]
        name = f"**{row.contender}**" if own else row.contender
        lines.append([f"{row.title}, {shape}" if first else "", name, *cells])
    return table.markdown(head, lines, "ll" + "r" * (len(head) - 2))


def _shape(row: Row) -> str:
    return ", ".join(f"{name} = {value}" for name, value in row.shape.items() if name != "r")


def _absent(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[str]]:
    """place -> which of Opacus's ways have no row there, not even one that says why it has no time."""
    there: dict[tuple[Any, ...], set[str]] = {}
    for row in rows:
        there.setdefault(row.place, set()).add(row.contender)
    return {
        place: [base for base in (OPACUS_HOOKS, OPACUS_GHOST) if base not in names]
        for place, names in there.items()
    }


def _not_run(rows: Sequence[Row]) -> list[str]:
    """A sentence a place: what its cells are not compared with."""
    absent = _absent(rows)
    places = {row.place: f"{row.title}, {_shape(row)}" for row in rows}
    lines = [
        f"{title}: {' and '.join(absent[place])} not run at this size."
        for place, title in places.items()
        if absent[place]
    ]
    return ["\n".join(lines)] if lines else []


def _batches(own: Sequence[Results]) -> list[str]:
    """A sentence a case: the largest physical batch of each contender within the limit."""
    lines: dict[str, tuple[str, list[str]]] = {}
    for (case, _), row in largest_batches(own).items():
        frames = row.shape["T"]
        start = f"Largest physical batch within {row.limit_mib} MiB, {row.title}, T = {frames}: "
        lines.setdefault(case, (start, []))[1].append(f"{row.contender} {row.largest_batch}")
    return ["\n".join(f"{start}{', '.join(each)}." for start, each in lines.values())] if lines else []


def _notes(rows: Iterable[Row]) -> list[str]:
    notes = [
        f"- {row.title}, {row.contender}: {row.status}: {row.reason}" for row in rows if row.status != OK
    ]
    return ["\n".join(notes)] if notes else []


def replace_section(text: str, section: str) -> str:
    """`text` with what stands between the markers replaced.

    Raises:
        ValueError: not exactly one pair of markers.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"README.md must hold {START} and, after it, {END}, each once")
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n\n{section}\n\n{END}{after}"


def targets(all_results: Sequence[Results]) -> list[str]:
    """The stated targets of a step at T = 150 on a CPU, each with what was measured and whether it is met."""
    lines = []
    for one in all_results:
        for row in main_rows(one):
            if one.group != "step" or not row.contender.startswith("dpkernels") or row.status != OK:
                continue
            lora = "r" in row.shape
            wanted = [("time, × non-private", row.ratio, 1.10 if lora else 1.25, False)]
            wanted += [("faster than Opacus ghost", row.over_ghost, 2.0 if lora else 1.5, True)]
            if lora:
                wanted += [("memory, × non-private", row.memory_ratio, 1.10, False)]
                wanted += [("faster than Opacus hooks", row.over_hooks, 1.2, True)]
            for what, value, limit, more in wanted:
                if value is None:
                    continue
                met = value >= limit if more else value <= limit
                words = f"{row.title}: {what} {value:.2f} ({'≥' if more else '≤'} {limit})"
                lines.append(f"{'met   ' if met else 'MISSED'} {one.about['slug']}: {words}")
    return lines


def profiles(folder: Path, device: str | None = None) -> list[str]:
    """What `python -m bench.profile` saved, as Markdown."""
    paths = sorted(folder.glob(f"{device or '*'}/profile.json"))
    return [profile.markdown(json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="only this folder of bench/results")
    parser.add_argument("--results", type=Path, default=FOLDER, help="default: bench/results")
    parser.add_argument(
        "--print", action="store_true", help="print the table; leave README.md and the plots alone"
    )
    options = parser.parse_args(arguments)
    results = found(options.results, options.device)
    parts = [markdown(results)] if results else []
    parts += profiles(options.results, options.device) + kernel_report.section(
        options.results, options.device
    )
    if not parts:
        print(f"nothing under {options.results}: run pytest --benchmark first", file=sys.stderr)
        return 1
    section = "\n\n".join(parts)
    if options.print:
        print(section)
    else:
        for path in plots.draw(results, options.results / "plots"):
            print(f"drew {path.relative_to(options.results)}")
        try:
            README.write_text(replace_section(README.read_text(encoding="utf-8"), section), encoding="utf-8")
            print("README.md: table replaced")
        except ValueError as error:
            print(f"README.md was left alone: {error}; --print shows the table", file=sys.stderr)
    print("\n".join(targets(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
