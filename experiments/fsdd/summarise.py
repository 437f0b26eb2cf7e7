"""Table and plots of the runs in results/: `python -m experiments.fsdd.summarise`.

Writes README.md here between its markers, the same table in docs/recordings.md, and wer_against_epsilon.svg and .png.
"""

from pathlib import Path
from typing import Any

from asr_finetune.report.plots import wer_against_epsilon
from dpkernels.rounding import shown_epsilon, shown_sigma
from experiments import runs
from experiments.fsdd.run import PRIVACY, RESULTS, SPEAKERS
from experiments.runs import ROOT, between, save, shown

HERE = Path(__file__).parent
PRIVATE = [epsilon for epsilon in PRIVACY if epsilon != "inf"]


def load(name: str) -> dict[str, Any] | None:
    """A run's result, or None where it was not made."""
    return runs.load(RESULTS, name)


def after(name: str) -> float | None:
    """WER after training."""
    result = load(name)
    return None if result is None else float(result["evaluation"]["after"]["wer"])


def rates(names: list[str]) -> list[float]:
    """WER of those of the runs that were made."""
    return [wer for name in names if (wer := after(name)) is not None]


def seeds(epsilon: str) -> list[str]:
    """Names of the runs that differ in the seed."""
    return [f"eps{epsilon}_seed{seed}" for seed in range(3)]


def zero_shot(name: str) -> float:
    """WER of the untrained checkpoint."""
    result = load(name)
    assert result is not None, f"results/{name}.json is missing; run run.py"
    return float(result["evaluation"]["wer"])


def main_table() -> str:
    """WER against ε."""
    rows = ["| | ε | σ | steps | WER, mean (each seed) |", "|---|---|---|---|---|"]
    rows.append(f"| the checkpoint, free decoding | – | – | – | {zero_shot('zero_shot'):.1%} |")
    rows.append(
        f"| the checkpoint, held to the ten digits | – | – | – | {zero_shot('zero_shot_digits'):.1%} |"
    )
    for epsilon in ("inf", *PRIVATE):
        done = [result for name in seeds(epsilon) if (result := load(name)) is not None]
        if not done:
            continue
        privacy, steps = done[0]["privacy"], done[0]["steps"]
        values = [float(run["evaluation"]["after"]["wer"]) for run in done]
        spent = (
            shown_epsilon(max(run["privacy"]["epsilon"] for run in done), 2) if privacy["enabled"] else "∞"
        )
        label = "private" if privacy["enabled"] else "without privacy"
        sigma = shown_sigma(privacy["noise_multiplier"]) if privacy["enabled"] else "–"
        rows.append(f"| {label} | {spent} | {sigma} | {steps} | {shown(values)} |")
    return "\n".join(rows)


def speakers_table() -> str:
    """Leave one speaker out: trained on three, tested on the fourth."""
    rows = ["| speaker left out | without privacy | ε = 8 |", "|---|---|---|"]
    for speaker in SPEAKERS:
        cells = [shown(rates([f"without_{speaker}_eps{epsilon}"])) for epsilon in ("inf", "8")]
        rows.append(f"| {speaker} | {' | '.join(cells)} |")
    return "\n".join(rows)


def commands() -> str:
    """What was typed for each setting, first seed."""
    names = ["zero_shot", "zero_shot_digits", *(seeds(epsilon)[0] for epsilon in PRIVACY)]
    return "\n".join(f"    {result['command']}" for name in names if (result := load(name)) is not None)


def plot() -> None:
    """WER against ε, every run a point."""
    results = [
        {"epsilon": float(epsilon), "wer": wer} for epsilon in PRIVATE for wer in rates(seeds(epsilon))
    ]
    figure = wer_against_epsilon(
        results,
        non_private=rates(seeds("inf")) or None,
        title="Spoken digits, whisper-tiny.en, LoRA: word error rate after training",
    )
    save(figure, HERE / "wer_against_epsilon")


def main() -> None:
    """Write the pages and the plot."""
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    for marker, content in (
        ("results", main_table()),
        ("speakers", speakers_table()),
        ("commands", commands()),
    ):
        text = between(text, marker, content)
    page.write_text(text, encoding="utf-8")
    guide = ROOT / "docs" / "recordings.md"
    guide.write_text(between(guide.read_text(encoding="utf-8"), "digits", main_table()), encoding="utf-8")
    plot()


if __name__ == "__main__":
    main()
