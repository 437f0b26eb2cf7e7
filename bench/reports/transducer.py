"""The transducer loss, as Markdown and as a plot from results files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.cases.transducer import COMPOSED, FLOOR, OURS, TORCHAUDIO, TRANSFORMERS
from bench.harness.checker import OK
from bench.harness.results import Results, Row
from bench.harness.table import markdown as table
from bench.harness.table import milliseconds, times
from bench.reports.plots import save, style

_LOGITS = (TORCHAUDIO, TRANSFORMERS)
_COLORS = {
    OURS: "#0072B2",
    COMPOSED: "#56B4E9",
    TORCHAUDIO: "#D55E00",
    TRANSFORMERS: "#CC79A7",
    FLOOR: "#595959",
}
_MARKERS = {OURS: "o", COMPOSED: "P", TORCHAUDIO: "^", TRANSFORMERS: "D", FLOOR: "s"}
_AXES = {"batch": "B", "T": "T", "U": "U", "V": "V"}
_QUANTITIES = {"median_ms": "time, ms", "peak_mib": "peak memory, MiB"}


def _of_group(results: Iterable[Results], group: str = "transducer") -> list[Results]:
    return [result for result in results if result.group == group and result.rows]


def _beside(row: Row, rows: Sequence[Row]) -> Row | None:
    """The loss on logits of the same place."""
    return next((r for r in rows if r.place == row.place and r.contender in _LOGITS and r.status == OK), None)


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def section(results: Iterable[Results]) -> list[str]:
    """A table a device: time beside the products', memory beside that of the loss on logits."""
    parts = []
    for result in _of_group(results):
        about = result.about
        changed = " with changes" if about.get("dirty") else ""
        load = "" if about.get("load") is None else f", {about['threads']} threads; load {about['load']}"
        head = (
            f"**The transducer loss, {about['device']}{load}** (torch {about['versions']['torch']}; commit "
            f"{about['commit']}{changed}, {about['date'][:10]}): loss and gradient by the encoder's and the "
            "predictor's states, the output layer frozen, float32. Time: median ± half the interquartile range. "
            "The products are the floor: logits, logits again and the derivative by the joint state, of as many "
            "rows as there are cells, in blocks. Memory: peak beyond the inputs."
        )
        rows = [row for row in result.rows if row.axis is None]
        lines, place = [], None
        for row in rows:
            shape = ", ".join(f"{name} = {value:,}" for name, value in row.shape.items())
            beside = _beside(row, rows)
            memory = _quotient(row.peak_mib, beside.peak_mib if beside else None)
            cells = [
                milliseconds(row),
                times(row.ratio),
                times(_quotient(row.median_ms, beside.median_ms if beside else None)),
                "" if row.peak_mib is None else f"{row.peak_mib:,.0f}",
                "" if memory is None else f"{memory:.3f}×",
            ]
            if row.contender == OURS:
                cells = [f"**{cell}**" if cell else "" for cell in cells]
            name = f"**{row.contender}**" if row.contender == OURS else row.contender
            lines.append([f"{row.title}, {shape}" if row.place != place else "", name, *cells])
            place = row.place
        columns = ["loss", "contender", "time, ms", "× products", "× time on logits", "memory, MiB"]
        parts.append(f"{head}\n\n" + table([*columns, "× memory on logits"], lines, "llrrrrr"))
        notes = dict.fromkeys(f"- {row.contender}: {row.status}: {row.reason}" for row in rows if row.reason)
        parts += ["\n".join(notes)] if notes else []
    return parts


def targets(results: Iterable[Results]) -> list[str]:
    """The stated targets on two CPU threads at the largest batch, each with what was measured."""
    lines = []
    for result in _of_group(results):
        rows = [row for row in result.rows if row.axis is None]
        for row in rows:
            if row.contender != OURS or row.status != OK or row.shape["B"] != 8:
                continue
            beside = _beside(row, rows)
            wanted = [("time, × the three products", row.ratio, 1.3)]
            if beside is not None:
                wanted.append(
                    (f"time, × {beside.contender}", _quotient(row.median_ms, beside.median_ms), 1.0)
                )
                wanted.append(
                    (f"memory, × {beside.contender}", _quotient(row.peak_mib, beside.peak_mib), 0.1)
                )
            for what, value, limit in wanted:
                if value is not None:
                    verdict = "met   " if value <= limit else "MISSED"
                    words = f"{row.title}: {what} {value:.2f} (≤ {limit})"
                    lines.append(f"{verdict} {result.about['slug']}: {words}")
    return lines


def draw(results: Iterable[Results], folder: Path) -> list[Path]:
    """A figure a device and kind of loss: time and memory over batch, T, U and V."""
    written = []
    for result in _of_group(results, "transducer_growth"):
        for kind in dict.fromkeys(row.case for row in result.rows):
            figure = curves([row for row in result.rows if row.case == kind])
            if figure is not None:
                written += save(figure, folder / f"{result.about['slug']}-{kind}")
    return written


def curves(rows: Sequence[Row]) -> Figure | None:
    """Time (above) and memory (below) over each axis that has two points; None without one."""
    axes_names = [
        axis for axis in _AXES if len({row.shape[_AXES[axis]] for row in rows if row.axis == axis}) > 1
    ]
    if not axes_names:
        return None
    with style():
        figure = Figure(figsize=(2.3 * len(axes_names) + 0.6, 4.6), layout="constrained")
        panels = figure.subplots(len(_QUANTITIES), len(axes_names), squeeze=False, sharex="col", sharey="row")
        for line, quantity in enumerate(_QUANTITIES):
            for place, axis in enumerate(axes_names):
                _panel(panels[line][place], [row for row in rows if row.axis == axis], axis, quantity)
            panels[line][0].set_ylabel(_QUANTITIES[quantity])
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(rows[0].title, x=0.01, ha="left", fontsize=10)
    return figure


def _panel(axes: Axes, rows: Sequence[Row], axis: str, quantity: str) -> None:
    key = _AXES[axis]
    for name, color in _COLORS.items():
        points = [
            (row.shape[key], getattr(row, quantity))
            for row in rows
            if row.contender == name and getattr(row, quantity) is not None
        ]
        if points:
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, color=color, marker=_MARKERS[name], label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({row.shape[key] for row in rows})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(key)
