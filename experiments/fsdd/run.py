"""Whisper-tiny.en on spoken digits: WER against ε with three seeds, and leave-one-speaker-out.

    python -m experiments.fsdd.run --speech FOLDER --checkpoint FOLDER [--only TEXT]

`--speech` is the folder of `manifest.jsonl`, `--checkpoint` holds whisper-tiny.en in Hugging Face format. Each run is
`asr-finetune` as a person would type it, in a process of its own; its command is kept in its result. A run whose result
exists is skipped, so the set can be cut anywhere and started again. `summarise.py` makes the table and the plots.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from asr_finetune.training.checkpoint import write_json
from experiments.runs import asr_finetune, trained

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
    runs = {
        f"eps{epsilon}_seed{seed}": [*arguments, f"--seed={seed}"]
        for seed in range(3)
        for epsilon, arguments in PRIVACY.items()
    }
    for epsilon in ("8", "inf"):
        for speaker in SPEAKERS:
            runs[f"without_{speaker}_eps{epsilon}"] = PRIVACY[epsilon]
    return runs


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


def zero_shot(name: str, speech: Path, checkpoint: Path, work: Path) -> dict[str, Any]:
    """Error rates without training."""
    work.mkdir(parents=True, exist_ok=True)
    out = work / f"{name}.json"
    arguments = ["evaluate", "--split=test", "--set=evaluate.normalize=english", *_COMMON, *ZERO_SHOT[name]]
    paths: list[str | Path] = ["--model", checkpoint, "--data", speech / "manifest.jsonl"]
    command = asr_finetune(arguments, [*paths, "--out", out])
    result = json.loads(out.read_text())
    result.pop("hypotheses", None)
    return {"command": command, "evaluation": result}


def train(name: str, speech: Path, checkpoint: Path, work: Path) -> dict[str, Any]:
    """The record of one training run, without machine paths."""
    data, output = manifest(name, speech, work), work / name
    arguments = ["train", "--config", CONFIG, *training_runs()[name]]
    paths: list[str | Path] = ["--model", checkpoint, "--train", data, "--test", data]
    command = asr_finetune(arguments, [*paths, "--output", output])
    record = trained(output, command=command, data=data.name, model="whisper-tiny.en")
    shutil.rmtree(output)
    return record


def main() -> None:
    """Parse the command line and do what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/fsdd"), help="where the runs are trained")
    parser.add_argument("--only", default="", help="only runs whose name holds this text")
    options = parser.parse_args()
    places = (options.speech.resolve(), options.checkpoint.resolve(), options.work.resolve())
    RESULTS.mkdir(exist_ok=True)
    for name in [*ZERO_SHOT, *training_runs()]:
        result = RESULTS / f"{name}.json"
        if options.only in name and not result.exists():
            run = zero_shot if name in ZERO_SHOT else train
            write_json(result, run(name, *places))


if __name__ == "__main__":
    main()
