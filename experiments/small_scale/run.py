"""Small-scale runs with real speech: WER against ε, against batch size and against method, three seeds.

    python -m experiments.small_scale.run --speech FOLDER --checkpoint FOLDER [--only TEXT]

`--speech` is the folder of `manifest.jsonl`, `--checkpoint` holds whisper-tiny.en in Hugging Face format; the small
Parakeet is made here. Each run is `asr-finetune` as a person would type it; its command is kept in its result. A run
whose result exists is skipped, so the set can be cut anywhere and started again. The first seed of every run comes
first. `summarise.py` makes the tables and the plots.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import runs
from experiments.small_scale.public import public_parakeet

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SEEDS = 3
EPSILONS = ("inf", "10", "3", "1")
BATCHES = (64, 128, 256, 512)
BASE_EPSILON = "3"
ZERO_SHOT = "parakeet_zero_shot"
# Without privacy nothing is clipped either; "clip" clips and adds no noise: which of the two costs what.
PRIVACY = {"inf": "--not-private", "clip": "--noise-multiplier=0"}


@dataclass(frozen=True)
class Recogniser:
    """One of the two models: what it is compared on.

    Attributes:
        title: for people.
        method: of the axes ε and batch.
        batch: of the axes ε and method.
        rates: learning rate of each method that is compared.
        slow: methods and batches that cost most: their first seed ends that seed, their others come last.
    """

    title: str
    method: str
    batch: int
    rates: dict[str, float]
    slow: tuple[str | int, ...] = ()


RECOGNISERS = {
    "parakeet": Recogniser(
        "small Parakeet",
        method="full",
        batch=256,
        rates={"full": 2e-3, "lora": 5e-3, "dp_rp": 5e-3, "bitfit": 1e-2, "head": 1e-2},
    ),
    # Its output layer is the token table, so that there is no `head` of a sensible size.
    "whisper": Recogniser(
        "whisper-tiny.en",
        method="lora",
        batch=128,
        rates={"lora": 2e-3, "dp_rp": 4e-3, "bitfit": 5e-3, "full": 2e-5},
        slow=("full", 512),
    ),
}


@dataclass(frozen=True)
class Run:
    """One training run."""

    model: str
    epsilon: str
    batch: int
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Also the name of its result."""
        return f"{self.model}_eps{self.epsilon}_b{self.batch}_{self.method}_seed{self.seed}"

    def arguments(self) -> list[str]:
        """The command's options but those with paths of this machine."""
        rate = RECOGNISERS[self.model].rates[self.method]
        return [
            f"--config=experiments/small_scale/{self.model}.yaml",
            PRIVACY.get(self.epsilon, f"--epsilon={self.epsilon}"),
            f"--batch-size={self.batch}",
            f"--method={self.method}",
            f"--learning-rate={rate:g}",
            f"--seed={self.seed}",
        ]


def controls(seed: int) -> list[Run]:
    """The small Parakeet, clipped without noise."""
    base = RECOGNISERS["parakeet"]
    return [Run("parakeet", "clip", base.batch, base.method, seed)]


def along(model: str, axis: str, seed: int) -> list[Run]:
    """The runs of one axis ("epsilon", "batch" or "method"): all else is the model's base."""
    base = RECOGNISERS[model]
    if axis == "epsilon":
        return [Run(model, epsilon, base.batch, base.method, seed) for epsilon in EPSILONS]
    if axis == "batch":
        return [Run(model, BASE_EPSILON, batch, base.method, seed) for batch in BATCHES]
    return [Run(model, BASE_EPSILON, base.batch, method, seed) for method in base.rates]


def every_run() -> Iterator[Run]:
    """All runs, each once, in the order in which they are worth most."""
    planned = [
        run
        for seed in range(SEEDS)
        for axis in ("epsilon", "method", "batch")
        for model in RECOGNISERS
        for run in along(model, axis, seed)
    ]
    planned += [run for seed in range(SEEDS) for run in controls(seed)]
    yield from sorted(
        dict.fromkeys(planned), key=lambda run: (slow(run) and run.seed > 0, run.seed, slow(run))
    )


def slow(run: Run) -> bool:
    """Whether the run is one of those that cost most."""
    return not {run.method, run.batch}.isdisjoint(RECOGNISERS[run.model].slow)


def train(
    name: str, model: str, arguments: list[str], options: argparse.Namespace, data: Path | None = None
) -> dict[str, Any]:
    """The record of one training run.

    Args:
        name: of the run's folder.
        model: a key of RECOGNISERS.
        arguments: the command's options but those with paths.
        options: the experiment's own command line.
        data: the manifest; None: that of all recordings.
    """
    return runs.train(
        arguments,
        model=options.checkpoint if model == "whisper" else public_parakeet(options.work),
        data=data or options.speech / "manifest.jsonl",
        output=options.work / name,
        title=RECOGNISERS[model].title,
    )


def zero_shot(options: argparse.Namespace) -> dict[str, Any]:
    """The small Parakeet's error rates on real speech before it has heard any."""
    return runs.zero_shot(
        ["--set=data.corpus=fsdd", "--set=data.text_case=lower"],
        model=public_parakeet(options.work),
        data=options.speech / "manifest.jsonl",
        out=options.work / "zero_shot.json",
    )


def main() -> None:
    """Parse the command line and do what is missing."""
    options = runs.options(__doc__, work="runs/small_scale")
    results = {ZERO_SHOT: lambda: zero_shot(options)}
    results |= {
        run.name: lambda run=run: train(run.name, run.model, run.arguments(), options) for run in every_run()
    }
    runs.make_missing(RESULTS, results, options.only)


if __name__ == "__main__":
    main()
