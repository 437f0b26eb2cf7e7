"""Whisper-tiny.en on spoken digits: WER against ε with three seeds, and leave-one-speaker-out.

    python -m experiments.fsdd.run --speech FOLDER --checkpoint FOLDER [--only TEXT]

`--speech` is the folder of `manifest.jsonl`, `--checkpoint` holds whisper-tiny.en in Hugging Face format. Each run is
`asr-finetune` as a person would type it, in a process of its own; its command is kept in its result. A run whose result
exists is skipped, so the set can be cut anywhere and started again. `summarise.py` makes the table and the plots.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from experiments import runs

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CONFIG = "experiments/fsdd/digits.yaml"
SPEAKERS = ("george", "jackson", "nicolas", "theo")
DIGITS = "[zero,one,two,three,four,five,six,seven,eight,nine]"
# Noise multipliers grow fast below ε = 3: fewer steps, and more adapters, then pay.
PRIVACY: dict[str, list[str]] = {
    "inf": ["--not-private"],
    "8": ["--epsilon=8"],
    "3": ["--epsilon=3"],
    "1": ["--epsilon=1", "--steps=40", "--set=method.targets=[q_proj,k_proj,v_proj,out_proj,fc1,fc2]"],
}
# The checkpoint before any training: as it is, and with decoding held to the ten digits.
ZERO_SHOT: dict[str, list[str]] = {
    "zero_shot": [],
    "zero_shot_digits": [f"--set=evaluate.restrict_to={DIGITS}"],
}
_COMMON = ["--set=data.corpus=fsdd", "--set=data.text_case=lower", "--set=data.target_prefix=' '"]


def training_runs() -> dict[str, list[str]]:
    """Every training run by name: its arguments besides the paths."""
    named = {
        f"eps{epsilon}_seed{seed}": [*arguments, f"--seed={seed}"]
        for seed in range(3)
        for epsilon, arguments in PRIVACY.items()
    }
    for epsilon in ("8", "inf"):
        for speaker in SPEAKERS:
            named[f"without_{speaker}_eps{epsilon}"] = PRIVACY[epsilon]
    return named


def manifest(name: str, speech: Path, work: Path) -> Path:
    """The corpus's manifest; for a leave-one-speaker-out run one with that speaker's test recordings only."""
    if not name.startswith("without_"):
        return speech / "manifest.jsonl"
    speaker = name.split("_")[1]
    lines = []
    for line in (speech / "manifest.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if (entry["speaker"] == speaker) == (entry["split"] == "test"):
            entry["audio"] = str(speech / entry["audio"])
            lines.append(json.dumps(entry))
    path = work / f"without_{speaker}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def zero_shot(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Error rates without training."""
    return runs.zero_shot(
        ["--set=evaluate.normalize=english", *_COMMON, *ZERO_SHOT[name]],
        model=options.checkpoint,
        data=options.speech / "manifest.jsonl",
        out=options.work / f"{name}.json",
    )


def train(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The record of one training run."""
    return runs.train(
        ["--config", CONFIG, *training_runs()[name]],
        model=options.checkpoint,
        data=manifest(name, options.speech, options.work),
        output=options.work / name,
        title="whisper-tiny.en",
    )


def main() -> None:
    """Parse the command line and do what is missing."""
    options = runs.options(__doc__, work="runs/fsdd")
    results = {name: lambda name=name: zero_shot(name, options) for name in ZERO_SHOT}
    results |= {name: lambda name=name: train(name, options) for name in training_runs()}
    runs.make_missing(RESULTS, results, options.only)


if __name__ == "__main__":
    main()
