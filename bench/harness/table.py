"""Results as tables, for the terminal and in Markdown."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.table import Table

from bench.harness.checker import OK
from bench.harness.results import Results, Row

_WIDTH = 118


def milliseconds(row: Row) -> str:
    """Median ± half the interquartile range, or why there is no time."""
    if row.status != OK:
        return row.status
    if row.median_ms is None:
        return ""
    digits = 3 if row.median_ms < 1 else 2 if row.median_ms < 10 else 1 if row.median_ms < 100 else 0
    return f"{row.median_ms:.{digits}f} ± {(row.iqr_ms or 0) / 2:.{digits}f}"


def times(value: float | None) -> str:
    """A ratio, "1.23×", or nothing."""
    return "" if value is None else f"{value:.2f}×"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """A Markdown table; align: "l" or "r" for each column."""
    rule = "".join("---|" if side == "l" else "--:|" for side in align)
    lines = ["| " + " | ".join(head) + " |", f"|{rule}"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("median ± IQR/2, ms", milliseconds),
    ("ratio", lambda row: times(row.ratio)),
    ("vs ghost", lambda row: times(row.over_ghost)),
    ("vs hooks", lambda row: times(row.over_hooks)),
    ("peak MiB", lambda row: "" if row.peak_mib is None else f"{row.peak_mib:.0f}"),
    ("memory", lambda row: times(row.memory_ratio)),
    ("largest B", lambda row: "" if row.largest_batch is None else str(row.largest_batch)),
    ("utt/s", lambda row: "" if row.rate is None else f"{row.rate:.0f}"),
    ("of matrix rate", lambda row: "" if row.matrix_share is None else f"{row.matrix_share:.0%}"),
    ("of floor", lambda row: "" if row.floor_share is None else f"{row.floor_share:.0%}"),
    ("error", lambda row: "" if row.error is None else f"{row.error:.0e}"),
)


def show(results: Results) -> str:
    """All rows, a table a place; columns without a value are left out. "vs ghost": times faster than Opacus ghost."""
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, force_terminal=False)
    disturbed = results.disturbed()
    for place, rows in results.places().items():
        shape = " ".join(f"{name}={value}" for name, value in rows[0].shape.items())
        table = Table(title=f"{rows[0].title} ({shape})", title_justify="left", box=None, pad_edge=False)
        table.add_column("contender", no_wrap=True)
        shown = [(name, of) for name, of in _COLUMNS if any(of(row) for row in rows)]
        for name, _ in shown:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row.contender, *(of(row) for _, of in shown))
        console.print(table)
        for row in rows:
            if row.reason:
                console.print(f"{row.contender}: {row.status}: {row.reason}", highlight=False, markup=False)
        if place in disturbed:
            console.print(f"WORTH NOTHING: {disturbed[place]}", highlight=False, markup=False)
        console.print()
    return text.getvalue()
