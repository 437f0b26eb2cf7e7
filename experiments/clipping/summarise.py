"""Tables and plot of the runs in results/: `python -m experiments.clipping.summarise`.

Writes README.md here between its markers, and wer_against_epsilon as .svg and .png.
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
from experiments.clipping.run import (
    CHOSEN,
    CHOSEN_EPSILON,
    CLIPPED,
    CLIPPINGS,
    EPSILONS,
    RESULTS,
    Trial,
    every_trial,
    of_chosen_norm,
    of_clipping,
    of_sessions,
)
from experiments.small_scale.run import RECOGNISERS, SEEDS, ZERO_SHOT
from experiments.small_scale.summarise import METHODS, wer

HERE = Path(__file__).parent
TITLES = {
    "flat": "flat",
    "automatic": "automatic",
    "adaptive": "adaptive",
    "per_layer": "adaptive per layer",
}
LINES: dict[str, dict[str, Any]] = {
    "flat": {"color": plots.GREY, "marker": "o", "linestyle": "solid"},
    "automatic": {"color": plots.BLUE, "marker": "s", "linestyle": (0, (4, 1.5))},
    "adaptive": {"color": plots.ORANGE, "marker": "^", "linestyle": (0, (1, 1))},
    "per_layer": {"color": plots.GREEN, "marker": "D", "linestyle": (0, (4, 1, 1, 1))},
}
ADAPTED = ("adaptive", "per_layer")


def made(trials: list[Trial]) -> list[dict[str, Any]]:
    """The results that there are."""
    return [result for trial in trials if (result := runs.load(trial.results, trial.name)) is not None]


def cell(model: str, clipping: str, epsilon: str) -> list[dict[str, Any]]:
    """The results of the seeds."""
    return made([of_clipping(model, clipping, epsilon, seed) for seed in range(SEEDS)])


def grid() -> str:
    """WER of each clipping against ε."""
    rows = [
        f"| recogniser | clipping | {' | '.join(f'ε = {epsilon}' for epsilon in EPSILONS)} |",
        "|---|---|---|---|---|",
    ]
    for model, recogniser in RECOGNISERS.items():
        cells: dict[str, list[list[dict[str, Any]] | None]] = {
            TITLES[clipping]: [cell(model, clipping, epsilon) for epsilon in EPSILONS]
            for clipping in CLIPPINGS
        }
        if model in CHOSEN:
            chosen = made([of_chosen_norm(model, seed) for seed in range(SEEDS)])
            cells[f"flat, C = {CHOSEN[model]} instead of 1"] = [
                chosen if epsilon == CHOSEN_EPSILON else None for epsilon in EPSILONS
            ]
        for title, results_of in cells.items():
            rates = [
                "–" if results is None else runs.shown([wer(result) for result in results])
                for results in results_of
            ]
            rows.append(f"| {recogniser.title} | {title} | {' | '.join(rates)} |")
    return "\n".join(rows)


def norms() -> str:
    """σ, and where adaptive clipping took C."""
    rows = [
        f"| recogniser | | {' | '.join(f'ε = {epsilon}' for epsilon in EPSILONS)} |",
        "|---|---|--:|--:|--:|",
    ]
    for model, recogniser in RECOGNISERS.items():
        found = {
            "σ": [
                shown_sigma(results[0]["privacy"]["noise_multiplier"]) if results else "not run"
                for results in (cell(model, "automatic", epsilon) for epsilon in EPSILONS)
            ]
        }
        for clipping in ADAPTED:
            found[f"C at the end, {TITLES[clipping]}"] = [
                f"{mean(result['privacy']['clip_norm'] for result in results):.3g}" if results else "not run"
                for results in (cell(model, clipping, epsilon) for epsilon in EPSILONS)
            ]
        rows += [f"| {recogniser.title} | {name} | {' | '.join(cells)} |" for name, cells in found.items()]
    return "\n".join(rows)


def sessions() -> str:
    """Sessions protected: both ways of clipping."""
    rows = [
        "| recogniser | clipped to C = 1 | σ | noise on the sum, σ·S | WER, mean (each seed) |",
        "|---|---|--:|--:|---|",
    ]
    for model, recogniser in RECOGNISERS.items():
        for clipped in CLIPPED:
            results = made([of_sessions(model, clipped, seed) for seed in range(SEEDS)])
            if not results:
                rows.append(f"| {recogniser.title} | {_CLIPPED[clipped]} | | | not run |")
                continue
            privacy = results[0]["privacy"]
            sigma, each = privacy["noise_multiplier"], privacy["max_examples_per_speaker"]
            noise = sigma * (1 if clipped == "speaker" else each)
            rates = runs.shown([wer(result) for result in results])
            rows.append(
                f"| {recogniser.title} | {_CLIPPED[clipped]} | {shown_sigma(sigma)} | {noise:.2f} | {rates} |"
            )
    return "\n".join(rows)


_CLIPPED = {"example": "each recording", "speaker": "a session's recordings together"}


def counted() -> str:
    """How many runs there are of each recogniser, and what training began from."""
    start = runs.load(RESULTS, ZERO_SHOT)
    assert start is not None, f"results/{ZERO_SHOT}.json is missing; run run.py"
    counts = []
    for model, recogniser in RECOGNISERS.items():
        planned = [trial for trial in every_trial() if trial.model == model]
        counts.append(f"{len(made(planned))} of {len(planned)} of {recogniser.title}")
    return (
        f"Runs that were made: {', '.join(counts)}. Before training the small Parakeet has a WER of "
        f"{float(start['evaluation']['wer']):.1%}."
    )


def commands() -> str:
    """What was typed for one run of each kind, the first seed."""
    chosen = [of_clipping("parakeet", clipping, "3", 0) for clipping in CLIPPINGS]
    chosen += [of_sessions("parakeet", clipped, 0) for clipped in CLIPPED]
    return "\n".join(f"    {result['command']}" for result in made(chosen))


def figure() -> Figure:
    """A panel a recogniser, a line a clipping; every run is a point."""
    with plots._style():
        drawn = Figure(figsize=(8.2, 3.9))
        panels = drawn.subplots(1, 2)
        for panel, (model, recogniser) in zip(panels, RECOGNISERS.items(), strict=True):
            draw(panel, model)
            panel.set_title(f"{recogniser.title} ({METHODS[recogniser.method]}, batch {recogniser.batch})")
        panels[0].set_ylabel("WER on the test digits")
        drawn.supxlabel("ε (further right: more private)", fontsize=9)
        drawn.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=4,
            frameon=False,
            handlelength=3.5,
        )
    return drawn


def draw(panel: Axes, model: str) -> None:
    """The lines of one recogniser, side by side so that no point hides another."""
    shown: list[float] = []
    for number, (clipping, line) in enumerate(LINES.items()):
        places, means = [], []
        for place, epsilon in enumerate(EPSILONS):
            rates = [wer(result) for result in cell(model, clipping, epsilon)]
            if not rates:
                continue
            places.append(place + 0.11 * (number - 1.5))
            means.append(mean(rates))
            shown += rates
            panel.plot(
                [places[-1]] * len(rates),
                rates,
                line["marker"],
                color=line["color"],
                alpha=0.3,
                markeredgewidth=0,
            )
        panel.plot(places, means, **line, linewidth=1.4, label=TITLES[clipping])
    panel.set_xticks(range(len(EPSILONS)), EPSILONS)
    panel.set_xlim(-0.4, len(EPSILONS) - 0.6)
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    # From 0 on where that leaves the lines apart.
    panel.set_ylim(0 if low < 0.5 * high else low - 0.1 * (high - low), high + 0.1 * (high - low))
    panel.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def main() -> None:
    """Write the page and the plot."""
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    parts: dict[str, Callable[[], str]] = {
        "counted": counted,
        "grid": grid,
        "norms": norms,
        "sessions": sessions,
        "commands": commands,
    }
    for marker, content in parts.items():
        text = runs.between(text, marker, content())
    page.write_text(text, encoding="utf-8")
    runs.save(figure(), HERE / "wer_against_epsilon")


if __name__ == "__main__":
    main()
