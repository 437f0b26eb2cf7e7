"""Tables and plots of the runs in results/: `python -m experiments.small_scale.summarise`.

Writes README.md here between its markers, and wer_against_epsilon, _batch and _method as .svg and .png.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from asr_finetune.report import plots
from dpkernels.rounding import shown_sigma
from experiments import runs
from experiments.small_scale.run import (
    BASE_EPSILON,
    RECOGNISERS,
    RESULTS,
    SEEDS,
    ZERO_SHOT,
    Run,
    along,
    controls,
    every_run,
)

HERE = Path(__file__).parent
COLOURS = {"parakeet": plots.BLUE, "whisper": plots.ORANGE}
AXES = {
    "epsilon": "ε (further right: more private)",
    "batch": f"expected batch, at ε = {BASE_EPSILON} and the same number of steps",
    "method": f"what is trained, at ε = {BASE_EPSILON}",
}
METHODS = {"full": "full", "lora": "LoRA", "dp_rp": "DP-RP", "bitfit": "BitFit", "head": "head"}


def load(run: Run) -> dict[str, Any] | None:
    """The run's result, or None where it was not made."""
    return runs.load(RESULTS, run.name)


def cells(model: str, axis: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """What the axis calls each of its cells, and the results that there are of it, by seed."""
    found = []
    for runs_of_cell in zip(*(along(model, axis, seed) for seed in range(SEEDS)), strict=True):
        results = [result for run in runs_of_cell if (result := load(run)) is not None]
        found.append((label(runs_of_cell[0], axis), results))
    return found


def clipped() -> list[tuple[str, list[dict[str, Any]]]]:
    """The control of the ε axis, as a cell."""
    controlled = [run for seed in range(SEEDS) for run in controls(seed)]
    return [("∞, clipped, no noise", [result for run in controlled if (result := load(run)) is not None])]


def label(run: Run, axis: str) -> str:
    """What is different about the run on this axis, for people."""
    if axis == "epsilon":
        return run.epsilon.replace("inf", "∞")
    return str(run.batch) if axis == "batch" else METHODS[run.method]


def wer(result: dict[str, Any]) -> float:
    """WER after training."""
    return float(result["evaluation"]["after"]["wer"])


def table(axis: str) -> str:
    """One row a cell and model; every seed's WER is in it."""
    heading = {"epsilon": "ε", "batch": "batch", "method": "method"}[axis]
    rows = [
        f"| recogniser | {heading} | trained parameters | learning rate | σ | WER, mean (each seed) |",
        "|---|---|--:|--:|--:|---|",
    ]
    for model, recogniser in RECOGNISERS.items():
        found = cells(model, axis)
        if (model, axis) == ("parakeet", "epsilon"):
            found[1:1] = clipped()
        for name, results in found:
            if not results:
                rows.append(f"| {recogniser.title} | {name} | | | | not run |")
                continue
            first = results[0]
            sigma = shown_sigma(first["privacy"]["noise_multiplier"]) if first["privacy"]["enabled"] else "–"
            parameters = f"{first['model']['trained_parameters']:,}"
            rate = f"{first['training']['learning_rate']:g}"
            values = runs.shown([wer(result) for result in results])
            rows.append(f"| {recogniser.title} | {name} | {parameters} | {rate} | {sigma} | {values} |")
    return "\n".join(rows)


def counted() -> str:
    """How many runs there are, and which are missing."""
    planned = list(every_run())
    missing = [run.name for run in planned if load(run) is None]
    done = [result for run in planned if (result := load(run)) is not None]
    text = f"{len(done)} of {len(planned)} runs were made"
    return text + (f"; not made: {', '.join(f'`{name}`' for name in missing)}." if missing else ".")


def before() -> str:
    """WER before training."""
    parakeet = runs.load(RESULTS, ZERO_SHOT)
    assert parakeet is not None, f"results/{ZERO_SHOT}.json is missing; run run.py"
    whisper = [
        float(result["evaluation"]["wer"])
        for name in ("zero_shot", "zero_shot_digits")
        if (result := runs.load(HERE.parent / "fsdd" / "results", name)) is not None
    ]
    return (
        f"Before training: small Parakeet {float(parakeet['evaluation']['wer']):.1%}; whisper-tiny.en "
        f"{whisper[0]:.1%}, or {whisper[1]:.1%} when its decoding is held to the ten digits."
    )


def commands() -> str:
    """What was typed for one run of each recogniser and method, first seed."""
    chosen = [run for model in RECOGNISERS for run in along(model, "method", 0)]
    return "\n".join(f"    {result['command']}" for run in chosen if (result := load(run)) is not None)


def figure(axis: str) -> Figure:
    """A panel a recogniser: every run a point, the mean of a cell written beside it."""
    with plots._style():
        made = Figure(figsize=(8.2, 3.2))
        panels = made.subplots(1, 2)
        for panel, (model, recogniser) in zip(panels, RECOGNISERS.items(), strict=True):
            draw(panel, cells(model, axis), COLOURS[model], axis)
            settings = [f"batch {recogniser.batch}"] if axis != "batch" else []
            settings += [METHODS[recogniser.method]] if axis != "method" else []
            panel.set_title(f"{recogniser.title} ({', '.join(settings)})", color=COLOURS[model])
        panels[0].set_ylabel("WER on the test digits")
        made.supxlabel(AXES[axis], fontsize=9)
    return made


def draw(panel: Axes, found: list[tuple[str, list[dict[str, Any]]]], colour: str, axis: str) -> None:
    """The cells side by side, evenly: neither ∞ nor a method's name has a place on a scale."""
    points = {
        place: [wer(result) for result in results] for place, (_, results) in enumerate(found) if results
    }
    means = {place: mean(rates) for place, rates in points.items()}
    if axis != "method":
        panel.plot(list(means), list(means.values()), color=colour, linewidth=1.4)
    # Where no line goes by: below a rising one, above a falling one.
    offset, side, height = {
        "epsilon": ((6, -4), "left", "top"),
        "batch": ((6, 4), "left", "bottom"),
        "method": ((0, 6), "center", "bottom"),
    }[axis]
    shown = [rates for rates in points.values() if max(rates) <= 1] or [[1.0]]
    top = 1.18 * max(max(rates) for rates in shown)
    for place, rates in points.items():
        if max(rates) > 1:  # more wrong words than words said: named, not drawn to scale
            text = f"{means[place]:.0%}\n(off the scale)"
            panel.annotate(text, (place, 0.96 * top), ha="center", va="top", fontsize=8.5, color=colour)
            continue
        panel.plot([place] * len(rates), rates, "o", color=colour, alpha=0.45, markeredgewidth=0)
        if axis == "method":
            panel.plot([place - 0.22, place + 0.22], [means[place]] * 2, color=colour, linewidth=1.8)
        panel.annotate(
            f"{means[place]:.1%}",
            (place, max(rates) if axis == "method" else means[place]),
            xytext=offset,
            textcoords="offset points",
            ha=side,
            va=height,
            fontsize=8.5,
            color=colour,
        )
    panel.set_xticks(range(len(found)), [name for name, _ in found])
    panel.set_xlim(-0.45, len(found) - 0.3)
    panel.set_ylim(0, top)
    panel.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def main() -> None:
    """Write the page and the plots."""
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    parts: dict[str, Callable[[], str]] = {"counted": counted, "before": before, "commands": commands}
    for marker, content in parts.items():
        text = runs.between(text, marker, content())
    for axis in AXES:
        text = runs.between(text, axis, table(axis))
        runs.save(figure(axis), HERE / f"wer_against_{axis}")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
