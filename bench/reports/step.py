"""Whole steps, as Markdown from results files: all contenders for docs/benchmarks.md, the README's short table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.harness import table
from bench.harness.checker import OK
from bench.harness.results import Results, Row
from bench.harness.table import milliseconds, times
from bench.names import NON_PRIVATE, OPACUS_GHOST, OPACUS_HOOKS

_SHOWN = ("step", "model")
_NOT_RUN = "not run"
_DEFAULT = "dpkernels bookkeeping"


def main_rows(results: Results) -> list[Row]:
    """The rows that are not points of a curve."""
    return [row for row in results.rows if row.axis is None]


def largest_batches(results: Iterable[Results]) -> dict[tuple[str, str], Row]:
    """(case, contender) -> the row that holds its largest batch."""
    return {
        (r.case, r.contender): r for result in results for r in result.rows if r.largest_batch is not None
    }


def markdown(all_results: Sequence[Results]) -> str:
    """For each device a line that says what it is, and a table of all contenders."""
    parts = []
    for device_results, rows in _by_device(all_results):
        units = (
            " A whole optimizer step: forward, backward, clip, noise, AdamW. Time: median ± half the interquartile "
            "range. × non-private: smaller is better; faster than Opacus: larger is better. Memory: peak of the step "
            "beyond model and batch."
        )
        parts += [
            _header(device_results) + units,
            _table(rows),
            *_notes(rows),
            *_not_run(rows),
            *_batches(device_results),
        ]
    return "\n\n".join(parts)


def summary(all_results: Sequence[Results]) -> str:
    """One table: of each case, device by device, the private step of the default strategy; then what each device is."""
    lines, notes = [], []
    for device_results, rows in _by_device(all_results):
        absent = _absent(rows)
        base = {row.place: row for row in rows if row.contender == NON_PRIVATE}
        private = [row for row in rows if row.contender == _DEFAULT]
        for row in private:
            plain = base.get(row.place)
            lines.append(
                [
                    _device(device_results) if row is private[0] else "",
                    f"{row.title}, {_shape(row)}",
                    milliseconds(plain) if plain else "",
                    milliseconds(row),
                    f"**{times(row.ratio)}**",
                    times(row.memory_ratio),
                    *_over_opacus(row, absent),
                ]
            )
        if private:
            notes.append(_header(device_results))
    return "\n\n".join([table.markdown(_SUMMARY, lines, "llrrrrrr"), " ".join(notes)]) if lines else ""


_SUMMARY = (
    "on",
    "step",
    "non-private, ms",
    "private, ms",
    "× its time",
    "× its memory",
    "faster than Opacus ghost",
    "… hooks",
)


def _by_device(all_results: Sequence[Results]) -> Iterable[tuple[list[Results], list[Row]]]:
    """A device's results of whole steps, and their rows."""
    for device in dict.fromkeys(result.about["slug"] for result in all_results):
        device_results = [
            result for result in all_results if result.about["slug"] == device and result.group in _SHOWN
        ]
        rows = [row for result in device_results for row in main_rows(result)]
        if rows:
            yield device_results, rows


def _over_opacus(row: Row, absent: dict[tuple[Any, ...], list[str]]) -> list[str]:
    return [
        _NOT_RUN if base in absent[row.place] else times(value)
        for base, value in ((OPACUS_GHOST, row.over_ghost), (OPACUS_HOOKS, row.over_hooks))
    ]


def _device(device_results: Sequence[Results]) -> str:
    about = device_results[0].about
    cores = "" if about.get("cuda") and about["load"] is None else f", {about['threads']} threads"
    return f"{about['device']}{cores}"


def _header(device_results: Sequence[Results]) -> str:
    about = device_results[0].about
    versions = ", ".join(
        f"{name} {about['versions'][name]}"
        for name in ("torch", "opacus", "peft", "transformers")
        if about["versions"].get(name)
    )
    state = " with changes" if about.get("dirty") else ""
    disturbed = [reason for result in device_results for reason in result.disturbed().values()]
    warning = f" **{len(disturbed)} cases are worth nothing**: {disturbed[0]}." if disturbed else ""
    return (
        f"**{_device(device_results)}** ({versions}; commit {about['commit']}{state}, {about['date'][:10]})."
        f"{warning}"
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
        is_dpkernels = row.contender.startswith("dpkernels")
        cells = [milliseconds(row), times(row.ratio), *_over_opacus(row, absent), memory]
        if rated:
            cells.append("" if row.rate is None else f"{row.rate:.0f}")
            cells.append("" if row.matrix_share is None else f"{row.matrix_share:.0%}")
        cells = [f"**{cell}**" if is_dpkernels and cell not in ("", _NOT_RUN) else cell for cell in cells]
        name = f"**{row.contender}**" if is_dpkernels else row.contender
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


def _batches(device_results: Sequence[Results]) -> list[str]:
    """A sentence a case: the largest physical batch of each contender within the limit."""
    lines: dict[str, tuple[str, list[str]]] = {}
    for (case, _), row in largest_batches(device_results).items():
        frames = row.shape["T"]
        start = f"Largest physical batch within {row.limit_mib} MiB, {row.title}, T = {frames}: "
        lines.setdefault(case, (start, []))[1].append(f"{row.contender} {row.largest_batch}")
    return ["\n".join(f"{start}{', '.join(each)}." for start, each in lines.values())] if lines else []


def _notes(rows: Iterable[Row]) -> list[str]:
    notes = [
        f"- {row.title}, {row.contender}: {row.status}: {row.reason}" for row in rows if row.status != OK
    ]
    return ["\n".join(notes)] if notes else []
