"""Ways of clipping on real speech: WER against ε for each of them, and speakers clipped as speakers, three seeds.

    python -m experiments.clipping.run --speech FOLDER --checkpoint FOLDER [--only TEXT]

Models, batches, steps and learning rates are those of `experiments/small_scale`, whose configurations are used.
`--speech` is the folder of `manifest.jsonl`, `--checkpoint` holds whisper-tiny.en. A run with a result is skipped;
of each recogniser the first seed of every run comes first. `summarise.py` makes the tables and the plot.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from asr_finetune.files import write_text
from experiments import runs
from experiments.small_scale.run import RECOGNISERS, SEEDS, ZERO_SHOT, Run, train, zero_shot
from experiments.small_scale.run import RESULTS as SMALL_SCALE

RESULTS = Path(__file__).parent / "results"
EPSILONS = ("8", "3", "1")
CLIPPINGS = {
    "flat": [],
    "automatic": ["--set=privacy.clipping=automatic"],
    "adaptive": ["--set=privacy.clipping=adaptive"],
    "per_layer": ["--set=privacy.clipping=adaptive", "--set=privacy.strategy=per_layer"],
}
# Flat clipping to about the C at which adaptive clipping ended: chosen after those runs, from what they published.
CHOSEN = {"parakeet": "8"}
CHOSEN_EPSILON = "3"
# The unit is a session: the recordings with one number, one of each of ten digits, by one speaker. δ is below 1/180.
SESSION_EPSILON = "8"
SESSION = ["--unit=speaker", "--set=privacy.max_examples_per_speaker=10", "--delta=5.5e-3"]
CLIPPED = ("example", "speaker")


@dataclass(frozen=True)
class Trial:
    """One training run.

    Attributes:
        name: also of its result.
        model: a key of RECOGNISERS.
        arguments: the command's options but those with paths.
        by_session: whether the manifest names sessions as speakers.
        results: the folder of its result.
    """

    name: str
    model: str
    arguments: list[str]
    by_session: bool = False
    results: Path = RESULTS


def of_clipping(model: str, clipping: str, epsilon: str, seed: int) -> Trial:
    """A run of the grid; flat clipping of Whisper is taken from small_scale where that has it.

    The small Parakeet's start is trained anew for this folder, and is another one than that of small_scale.
    """
    run = _flat(model, epsilon, seed)
    if clipping == "flat" and model == "whisper" and (SMALL_SCALE / f"{run.name}.json").exists():
        return Trial(run.name, model, run.arguments(), results=SMALL_SCALE)
    name = f"{model}_{clipping}_eps{epsilon}_seed{seed}"
    return Trial(name, model, [*run.arguments(), *CLIPPINGS[clipping]])


def of_chosen_norm(model: str, seed: int) -> Trial:
    """A run of flat clipping with the norm of CHOSEN."""
    norm = CHOSEN[model]
    arguments = [*_flat(model, CHOSEN_EPSILON, seed).arguments(), f"--max-grad-norm={norm}"]
    return Trial(f"{model}_flat_c{norm}_eps{CHOSEN_EPSILON}_seed{seed}", model, arguments)


def of_sessions(model: str, clipped: str, seed: int) -> Trial:
    """A run that protects sessions, with either each recording clipped or a session's together."""
    arguments = [*_flat(model, SESSION_EPSILON, seed).arguments(), *SESSION]
    name = f"{model}_sessions_{clipped}_eps{SESSION_EPSILON}_seed{seed}"
    return Trial(name, model, [*arguments, f"--set=privacy.clipping_unit={clipped}"], by_session=True)


def _flat(model: str, epsilon: str, seed: int) -> Run:
    recogniser = RECOGNISERS[model]
    return Run(model, epsilon, recogniser.batch, recogniser.method, seed)


def every_trial() -> Iterator[Trial]:
    """All runs, in the order in which they are worth most."""
    for model in RECOGNISERS:
        for seed in range(SEEDS):
            for epsilon in EPSILONS:
                yield from (of_clipping(model, clipping, epsilon, seed) for clipping in CLIPPINGS)
        for seed in range(SEEDS):
            yield from (of_sessions(model, clipped, seed) for clipped in CLIPPED)
        if model in CHOSEN:
            yield from (of_chosen_norm(model, seed) for seed in range(SEEDS))


def sessions(speech: Path, work: Path) -> Path:
    """Write the manifest of the digits with a session (jackson-17) in place of a speaker; return its path."""
    lines = []
    for line in (speech / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["corpus"] == "fsdd":
            _, speaker, number = entry["utt_id"].split("_")
            entry |= {"speaker": f"{speaker}-{number}", "audio": str(speech / entry["audio"])}
            lines.append(json.dumps(entry) + "\n")
    path = work / "sessions.jsonl"
    write_text(path, "".join(lines))
    return path


def main() -> None:
    """Parse the command line and do what is missing."""
    options = runs.options(__doc__, work="runs/clipping")
    by_session = sessions(options.speech, options.work)
    results = {ZERO_SHOT: lambda: zero_shot(options)} | {
        trial.name: lambda trial=trial: train(
            trial.name, trial.model, trial.arguments, options, by_session if trial.by_session else None
        )
        for trial in every_trial()
        if trial.results == RESULTS
    }
    runs.make_missing(RESULTS, results, options.only)


if __name__ == "__main__":
    main()
