"""A small transducer beside CTC on real spoken digits: a public warm start, then ε = 8, three seeds.

    python -m experiments.transducer.run --speech FOLDER [--only TEXT]

`--speech` is the folder of `manifest.jsonl` (the Free Spoken Digit Dataset). Both models have the same small Parakeet
encoder, are made here, and are first trained without privacy on public synthetic digits, as in
`experiments/small_scale`. Each run is `asr-finetune` as a person would type it. A run whose result exists is skipped;
the first seed of every run comes first. The results' table in README.md is written anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from asr_finetune.demo.demo import DIGITS
from asr_finetune.models.loading import Recognizer, tiny_parakeet, tiny_transducer
from dpkernels.rounding import shown_sigma
from experiments import runs
from experiments.small_scale.public import CONFIG, speech

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"
PRIVATE = "experiments/small_scale/parakeet.yaml"
SEEDS, EPSILONS, BATCH, RATE = 3, ("8", "inf"), 256, 2e-3
ENCODER: dict[str, Any] = {"hidden": 96, "layers": 2, "channels": 16, "intermediate_size": 256}
# Ours: a prediction network as narrow as ten words allow, durations of the published model.
MODELS: dict[str, Callable[[], Recognizer]] = {
    "ctc": lambda: tiny_parakeet(DIGITS, **ENCODER),
    "tdt": lambda: tiny_transducer(DIGITS, decoder=64, **ENCODER),
}


def warm_start(model: str, work: Path) -> Path:
    """The folder of a model that was trained on the synthetic digits, where that was not done yet."""
    finished = work / f"public_{model}" / "model"
    if not finished.is_dir():
        fresh = work / f"fresh_{model}"
        MODELS[model]().save(fresh)
        paths: list[str | Path] = ["--model", fresh, "--train", speech(work / "public_speech")]
        runs.asr_finetune(["train", "--config", CONFIG], [*paths, "--output", finished.parent])
    return finished


def zero_shot(model: str, data: Path, work: Path) -> dict[str, Any]:
    """Error rates on real speech before any was heard."""
    return runs.zero_shot(
        ["--set=data.corpus=fsdd", "--set=data.text_case=lower"],
        model=warm_start(model, work),
        data=data,
        out=work / f"{model}_zero_shot.json",
    )


def train(model: str, epsilon: str, seed: int, data: Path, work: Path) -> dict[str, Any]:
    """The record of one training run."""
    arguments = [
        f"--config={PRIVATE}",
        "--not-private" if epsilon == "inf" else f"--epsilon={epsilon}",
        f"--batch-size={BATCH}",
        "--method=full",
        f"--learning-rate={RATE:g}",
        f"--seed={seed}",
    ]
    return runs.train(
        arguments,
        model=warm_start(model, work),
        data=data,
        output=work / f"{model}_eps{epsilon}_seed{seed}",
        title=f"small Parakeet, {model}",
    )


def table() -> str:
    """The results as a table."""
    lines = ["| model | ε | trained parameters | σ | WER, mean (each seed) |", "|---|---|--:|--:|---|"]
    for model in MODELS:
        start = runs.load(RESULTS, f"{model}_zero_shot")
        if start is not None:
            lines.append(f"| {model} | before | – | – | {start['evaluation']['wer']:.1%} |")
        for epsilon in EPSILONS:
            names = [f"{model}_eps{epsilon}_seed{seed}" for seed in range(SEEDS)]
            records = [record for name in names if (record := runs.load(RESULTS, name)) is not None]
            if not records:
                continue
            sigma = records[0]["privacy"]["noise_multiplier"]
            rates = [record["evaluation"]["after"]["wer"] for record in records]
            lines.append(
                f"| {model} | {'∞' if epsilon == 'inf' else epsilon} | "
                f"{records[0]['model']['trained_parameters']:,} | {'–' if epsilon == 'inf' else shown_sigma(sigma)} | "
                f"{runs.shown(rates)} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, do what is missing, and write the table."""
    options = runs.options(__doc__, work="runs/transducer", checkpoint=False)
    data, work = options.speech / "manifest.jsonl", options.work
    results: dict[str, Callable[[], dict[str, Any]]] = {
        f"{model}_zero_shot": lambda model=model: zero_shot(model, data, work) for model in MODELS
    }
    for seed in range(SEEDS):
        for epsilon in EPSILONS:
            for model in MODELS:
                results[f"{model}_eps{epsilon}_seed{seed}"] = lambda model=model, epsilon=epsilon, seed=seed: (
                    train(model, epsilon, seed, data, work)
                )
    runs.make_missing(RESULTS, results, options.only)
    text = README.read_text(encoding="utf-8")
    README.write_text(runs.between(text, "results", table()), encoding="utf-8")


if __name__ == "__main__":
    main()
