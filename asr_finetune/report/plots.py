"""Plots in one style, for the report, the demo and the experiments' page.

Colours are from Okabe and Ito's palette, which can be distinguished with any colour vision and in grey print (lines
also differ in dash and marker). Curves are labelled at their ends instead of in a legend.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from dpkernels.rounding import shown_epsilon

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
# Text and axes are black on a white page and white on a dark one: `svg` turns this colour into CSS's `currentColor`.
_INK = "#010203"
_SIZE = (6.4, 3.1)  # inches; the width of the report's column
_STYLE: Any = {
    "figure.figsize": _SIZE,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titlecolor": _INK,
    "axes.labelsize": 9,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.fonttype": "path",  # the same on every machine, and in print
}


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):
        yield


def wer_over_steps(curve: Sequence[Mapping[str, Any]], *, before: float | None = None) -> Figure:
    """WER on public validation data over the steps of a run.

    Args:
        curve: points with "step" and "wer", and "wer_lo" and "wer_hi" (95 % interval) or None for both.
        before: WER at step 0.

    Raises:
        ValueError: no points.
    """
    if not curve:
        raise ValueError("curve=[]: there is nothing to plot; set train.eval_every and data.valid")
    points = sorted(curve, key=lambda point: point["step"])
    with _style():
        figure, axes = _axes("training step", "WER on public validation data")
        steps = [point["step"] for point in points]
        rates = [point["wer"] for point in points]
        if before is not None:
            steps, rates = [0, *steps], [before, *rates]
        ranged = [point for point in points if point.get("wer_lo") is not None]
        if ranged:
            axes.fill_between(
                [point["step"] for point in ranged],
                [point["wer_lo"] for point in ranged],
                [point["wer_hi"] for point in ranged],
                color=BLUE,
                alpha=0.15,
                linewidth=0,
            )
        axes.plot(steps, rates, color=BLUE, marker="o", clip_on=False)
        highest = max([*rates, *(point["wer_hi"] for point in ranged)])
        _rates(axes, highest)
        _whole_steps(axes, steps)
        _label_end(axes, steps[-1], rates[-1], f"{rates[-1]:.1%}", BLUE)
    return figure


def epsilon_over_steps(points: Sequence[tuple[int, float]], *, target: float | None = None) -> Figure:
    """ε spent over the steps of a run, at its δ.

    Args:
        points: (step, ε).
        target: the target ε of the run.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("points=[]: there is nothing to plot")
    with _style():
        figure, axes = _axes("training step", "ε spent")
        steps, values = zip(*sorted(points), strict=True)
        axes.plot(steps, values, color=BLUE, clip_on=False)
        _label_end(axes, steps[-1], values[-1], shown_epsilon(values[-1], 2), BLUE)
        if target is not None:
            _level(axes, target, f"target {target:g}", ORANGE)
        axes.set_ylim(0, 1.15 * max(values[-1], target or 0.0))
        _whole_steps(axes, steps)
    return figure


def wer_against_epsilon(
    results: Sequence[Mapping[str, Any]],
    *,
    non_private: float | Sequence[float] | None = None,
    zero_shot: float | None = None,
    title: str = "",
) -> Figure:
    """WER of several private runs against their ε: a point for every run, and a line through the means.

    Args:
        results: one mapping for each run, with "epsilon" and "wer"; runs of one ε differ in "seed".
        non_private: WER of the same recipe without clipping and noise; several runs are averaged.
        zero_shot: WER before training.
        title: the plot's title.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("results=[]: there is nothing to plot")
    groups: dict[float, list[float]] = defaultdict(list)
    for result in results:
        groups[float(shown_epsilon(float(result["epsilon"]), 2))].append(float(result["wer"]))
    budgets = sorted(groups)
    means = [sum(groups[budget]) / len(groups[budget]) for budget in budgets]
    with _style():
        figure, axes = _axes("ε (smaller: more private)", "WER")
        axes.set_title(title)
        axes.plot(budgets, means, color=BLUE, linewidth=1.4)
        for budget in budgets:
            axes.plot(
                [budget] * len(groups[budget]),
                groups[budget],
                "o",
                color=BLUE,
                alpha=0.55,
                markeredgewidth=0,
                clip_on=False,
            )
        _label_end(axes, budgets[-1], means[-1], "mean of runs", BLUE)
        highest = max(wer for rates in groups.values() for wer in rates)
        if len(budgets) > 1:
            axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(budgets))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if zero_shot is not None:
            highest = max(highest, zero_shot)
            _level(axes, zero_shot, f"before training {zero_shot:.1%}", GREY, beside=True)
        if non_private is not None:
            plain = [non_private] if isinstance(non_private, int | float) else list(non_private)
            level = sum(plain) / len(plain)
            _level(axes, level, f"without privacy {level:.1%}", ORANGE, beside=True)
        _rates(axes, highest)
    return figure


def canary_scores(edges: Sequence[float], included: Sequence[int], excluded: Sequence[int]) -> Figure:
    """The scores of an audit's canaries, as two histograms on common bins.

    Args:
        edges: of the bins, one more than there are bins.
        included: canaries in each bin that the run was trained on.
        excluded: the others.

    Raises:
        ValueError: no canaries.
    """
    if not sum(included) + sum(excluded):
        raise ValueError("included and excluded hold no canaries: there is nothing to plot")
    with _style():
        figure, axes = _axes("score: by how much training lowered the canary's loss", "canaries")
        for counts, label, color, dash, height in (
            (excluded, "excluded", ORANGE, (0, (3, 1)), 0.86),
            (included, "included", BLUE, "solid", 0.94),
        ):
            axes.stairs(counts, edges, color=color, linewidth=1.6, linestyle=dash)
            axes.annotate(
                f"{label} ({sum(counts):,})",
                (0.02, height),
                xycoords="axes fraction",
                color=color,
                fontsize=8.5,
            )
        axes.set_ylim(0, 1.25 * max(*included, *excluded))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for an HTML page; equal figures give equal text.

    Args:
        figure: a figure from a function of this module.
        name: the figure's name on its page, which makes its ids unique; also its accessible name.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Glyph ids ("DejaVuSans-30") are unique on the page only together with the figure's name.
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{slug}-", text)
    width = re.search(r'width="([\d.]+)pt"', text)
    assert width is not None  # matplotlib's SVG has one
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure()
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _rates(axes: Axes, highest: float) -> None:
    axes.set_ylim(0, max(1.12 * highest, 0.01))
    axes.yaxis.set_major_locator(
        MaxNLocator(nbins=7, steps=[1, 2, 5, 10])
    )  # ticks that need one decimal at most
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if highest > 0.04 else 1))


def _whole_steps(axes: Axes, steps: Sequence[int]) -> None:
    axes.set_xlim(0, max(steps))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _level(axes: Axes, height: float, label: str, color: str, *, beside: bool = False) -> None:
    """A horizontal line, with its name above its left end, or beside its right end if `beside`."""
    axes.axhline(height, color=color, linewidth=1.2, linestyle=(0, (1, 1.5)))
    axes.annotate(
        label,
        (1.0 if beside else 0.0, height),
        xycoords=("axes fraction", "data"),
        xytext=(7, 0) if beside else (4, 3),
        textcoords="offset points",
        color=color,
        fontsize=8.5,
        verticalalignment="center" if beside else "baseline",
        annotation_clip=False,
    )


def _label_end(axes: Axes, x: float, y: float, label: str, color: str) -> None:
    axes.annotate(
        label,
        (x, y),
        xytext=(7, 0),
        textcoords="offset points",
        color=color,
        fontsize=8.5,
        verticalalignment="center",
        annotation_clip=False,
    )
