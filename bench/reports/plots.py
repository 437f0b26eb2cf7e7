"""Plots of the results: time over T, memory over batch, ratio bars. SVG and PNG, readable on light and dark pages.

Colours are Okabe and Ito's, lines also differ in dash and marker, and each is named where it ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from bench.harness.results import Results, Row
from bench.names import (
    FASTDP,
    NON_PRIVATE,
    OPACUS_GHOST,
    OPACUS_HOOKS,
    OPACUS_OURS,
    OWN_LAYERS,
    TIMED_STRATEGIES,
    TORCH_FUNC,
    ours,
)

_STYLES: dict[str, tuple[str, Any, str]] = {
    NON_PRIVATE: ("#595959", (0, (1, 1.2)), "s"),
    OPACUS_HOOKS: ("#D55E00", (0, (5, 1.5)), "^"),
    OPACUS_GHOST: ("#CC79A7", (0, (4, 1.2, 1, 1.2)), "D"),
    OPACUS_OURS: ("#7A3E9D", (0, (6, 1.2, 1, 1.2, 1, 1.2)), "d"),
    TORCH_FUNC: ("#B8860B", (0, (2, 1.2)), "v"),
    FASTDP: ("#4B7A1E", (0, (3, 1, 1, 1)), "<"),
}
_OURS = ("#0072B2", "solid", "o"), ("#009E73", "solid", "P"), ("#56B4E9", "solid", "X")
_NAMES = {"T": "encoder frames T (12.5 a second)", "batch": "physical batch", "rank": "LoRA rank r"}
_SHAPE_KEY = {"T": "T", "batch": "B", "rank": "r"}
_STYLE: Any = {
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "grid.color": "#767676",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "font.family": "sans-serif",
    "font.size": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "bench",
}


@contextmanager
def style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):
        yield


def draw(results: Iterable[Results], folder: Path) -> list[Path]:
    """Every plot that the results have points for; the paths written."""
    written = []
    for result in results:
        slug = result.about["slug"]
        if result.group == "step":
            for axis in ("T", "batch", "rank"):
                rows = [row for row in result.rows if row.axis == axis]
                for quantity in ("median_ms", "peak_mib"):
                    figure = curve(rows, axis, quantity)
                    if figure is not None:
                        what = "time" if quantity == "median_ms" else "memory"
                        written += save(figure, folder / f"{slug}-{what}-over-{axis}")
        if result.group in ("step", "model"):
            figure = ratios([row for row in result.rows if row.axis is None], _subtitle(result))
            if figure is not None:
                written += save(figure, folder / f"{slug}-{result.group}-ratios")
    return written


def curve(rows: Sequence[Row], axis: str, quantity: str) -> Figure | None:
    """A quantity of every contender over T, batch or rank, both axes logarithmic; None without two points."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        value = getattr(row, quantity)
        if value is not None and row.contender != OWN_LAYERS:
            lines.setdefault(row.contender, []).append((row.shape[_SHAPE_KEY[axis]], value))
    lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    with style():
        # Fixed margins: labels are placed by where the line ends are on the page.
        figure = Figure(figsize=(6.4, 3.6))
        axes = figure.subplots(gridspec_kw={"left": 0.1, "right": 0.745, "bottom": 0.135, "top": 0.92})
        ends = []
        for name, points in lines.items():
            color, dash, marker = _look(name)
            xs, ys = zip(*points, strict=True)
            wide = 2.4 if name.startswith("dpkernels") else 1.6
            axes.plot(xs, ys, color=color, linestyle=dash, marker=marker, linewidth=wide, clip_on=False)
            ends.append((name, xs[-1], ys[-1], color))
        axes.set_xscale("log")
        axes.set_yscale("log")
        xs = sorted({x for points in lines.values() for x, _ in points})
        axes.xaxis.set_major_locator(FixedLocator(xs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _decades(axes)
        axes.set_xlabel(_NAMES[axis])
        what = "time of a step, ms" if quantity == "median_ms" else "peak memory of a step, MiB"
        shape = rows[0].shape
        kept = ", ".join(f"{k} = {v}" for k, v in shape.items() if k not in (_SHAPE_KEY[axis], "r"))
        title = rows[0].title.partition(" r=")[0] if axis == "rank" else rows[0].title
        axes.set_ylabel(what)
        axes.set_title(f"{title}, {kept}")
        _label_ends(figure, axes, ends)
    return figure


def ratios(rows: Sequence[Row], subtitle: str) -> Figure | None:
    """Bars: every contender's time over the non-private step's, a panel a case; a note where there is no time."""
    cases: dict[str, list[Row]] = {}
    sizes = {(row.title, row.shape["B"]) for row in rows}
    several = len(sizes) > len({title for title, _ in sizes})  # of one case: the panels say which
    for row in rows:
        if row.contender != NON_PRIVATE:
            title = f"{row.title}\nB = {row.shape['B']}" if several else row.title
            cases.setdefault(title, []).append(row)
    if not any(row.ratio is not None for row in rows):
        return None
    with style():
        pairs = list(cases.items())
        lines = [pairs[start : start + 2] for start in range(0, len(pairs), 2)]
        # Side by side the same contenders; a line of panels has no place for one that was not run in it.
        names = [
            list(dict.fromkeys(row.contender for _, case_rows in line for row in case_rows)) for line in lines
        ]
        heights = [0.3 * len(each) + 0.55 for each in names]
        figure = Figure(figsize=(7.2, 0.55 + sum(heights)), layout="constrained")
        panels = figure.subplots(
            len(lines),
            min(2, len(cases)),
            squeeze=False,
            sharex=True,
            sharey="row",
            height_ratios=[len(each) for each in names],
        )
        highest = max(row.ratio for row in rows if row.ratio is not None)
        for place, (title, case_rows) in enumerate(pairs):
            _panel(panels.flat[place], title, names[place // 2], case_rows)
            panels.flat[place].set_xlim(0, 1.18 * highest)
        for axes in list(panels.flat)[len(cases) :]:
            axes.set_visible(False)
        figure.supxlabel(f"time of a step, × non-private ({subtitle})", fontsize=9)
    return figure


def _panel(axes: Axes, title: str, names: Sequence[str], panel_rows: Sequence[Row]) -> None:
    axes.grid(False)
    axes.set_title(title)
    axes.axvline(1.0, color="#595959", linewidth=1.0, linestyle=(0, (1, 1.5)))
    for place, name in enumerate(names):
        _bar(axes, place, name, next((row for row in panel_rows if row.contender == name), None))
    axes.set_yticks(range(len(names)), names)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("dpkernels") else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _bar(axes: Axes, place: int, name: str, row: Row | None) -> None:
    if row is None or row.ratio is None:
        text = "not run" if row is None else row.status
        axes.annotate(
            text, (0.0, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5
        )
        return
    axes.barh(place, row.ratio, height=0.66, color=_look(name)[0])
    axes.annotate(
        f"{row.ratio:.2f}",
        (row.ratio, place),
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
    )


def _look(name: str) -> tuple[str, Any, str]:
    if name in _STYLES:
        return _STYLES[name]
    if name == OWN_LAYERS:
        return "#8FA3B0", "solid", "o"
    known = [ours(strategy) for strategy in TIMED_STRATEGIES]
    return _OURS[known.index(name) % len(_OURS)] if name in known else _OURS[-1]


def _decades(axes: Axes) -> None:
    """Plain numbers at 1, 2 and 5 times powers of ten, as many as the range needs."""
    low, high = axes.get_ylim()
    marks = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axes.yaxis.set_major_locator(FixedLocator(marks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Each line's name right of its end, moved apart where ends are close."""
    to_points = 72 / figure.dpi
    ends = sorted(ends, key=lambda end: end[2])
    heights = [float(axes.transData.transform((x, y))[1]) * to_points for _, x, y, _ in ends]
    for (name, x, y, color), end_height, height in zip(ends, heights, spread(heights, 11.5), strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(9, height - end_height),
            textcoords="offset points",
            color=color,
            fontsize=8.5,
            fontweight="bold" if name.startswith("dpkernels") else "normal",
            va="center",
            annotation_clip=False,
        )


def spread(heights: Sequence[float], least: float) -> list[float]:
    """Ascending heights moved as little as it takes (in squares) to be `least` apart."""
    groups: list[list[float]] = []  # each: heights that touch, placed around their mean
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _places(groups[-1], least)[0] - _places(groups[-2], least)[-1] < least:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [place for group in groups for place in _places(group, least)]


def _places(group: Sequence[float], least: float) -> list[float]:
    middle = sum(group) / len(group)
    return [middle + (i - (len(group) - 1) / 2) * least for i in range(len(group))]


def _subtitle(results: Results) -> str:
    shapes = [row.shape for row in results.rows if row.axis is None]
    common = {k: v for k, v in shapes[0].items() if k != "r" and all(s[k] == v for s in shapes)}
    threads = f", {results.about['threads']} threads" if results.about.get("load") is not None else ""
    return f"{', '.join(f'{k} = {v}' for k, v in common.items())}; {results.about['device']}{threads}"


def save(figure: Figure, stem: Path) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    with style():
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=160, metadata={"Software": None})
    return paths
