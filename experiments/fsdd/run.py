"""Whisper-tiny.en on spoken digits: WER against ε with three seeds, and leave-one-speaker-out.

    python experiments/fsdd/run.py --speech FOLDER --checkpoint FOLDER [--only TEXT]

`--speech` is the folder of `manifest.jsonl`, `--checkpoint` holds whisper-tiny.en in Hugging Face format. Each run is
`asr-finetune train` as a person would type it, in a process of its own; its command is kept in its result. A run whose
result exists is skipped, so the set can be cut anywhere and started again. `summarise.py` makes the table and plots.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SPEAKERS = ("george", "jackson", "nicolas", "theo")
# Noise multipliers grow fast below ε = 3: fewer steps, and more adapters, then pay.
PRIVACY: dict[str, list[str]] = {
    "inf": ["--not-private"],
    "8": ["--epsilon", "8"],
    "3": ["--epsilon", "3"],
    "1": [
        "--epsilon=1",
        "--steps=40",
        "--set=method.targets=[q_proj,k_proj,v_proj,out_proj,fc1,fc2]",
    ],
}


def plan() -> dict[str, list[str]]:
    """Every run by name: its arguments besides the paths."""
    runs = {
        f"eps{epsilon}_seed{seed}": [*arguments, "--seed", str(seed)]
        for seed in range(3)
        for epsilon, arguments in PRIVACY.items()
    }
    for speaker in SPEAKERS:
        for epsilon in ("inf", "8"):
            # Trained on three speakers (1,350 utterances); `manifest` leaves the test part to the fourth.
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


def run(name: str, arguments: list[str], speech: Path, checkpoint: Path, work: Path) -> None:
    """Train one run and keep its record, without machine paths, as results/NAME.json."""
    result = RESULTS / f"{name}.json"
    if result.exists():
        return
    command = ["asr-finetune", "train", "--config", "experiments/fsdd/digits.yaml", *arguments]
    data = manifest(name, speech, work)
    paths = ["--model", checkpoint, "--train", data, "--test", data]
    output = work / name
    print(" ".join(command), flush=True)
    tool = Path(sys.executable).with_name("asr-finetune")
    subprocess.run([tool, *command[1:], *paths, "--output", output], check=True, cwd=HERE.parents[1])
    record = json.loads((output / "run.json").read_text())
    record["command"] = " ".join(
        [*command, "--model CHECKPOINT", f"--train {data.name}", f"--test {data.name}"]
    )
    record["data"]["source"] = Path(record["data"]["source"]).name
    record["model"]["name"] = "whisper-tiny.en"
    for evaluation in record["evaluation"].values():
        if evaluation is not None:
            evaluation.pop("hypotheses", None)
    RESULTS.mkdir(exist_ok=True)
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, result)
    shutil.rmtree(output)


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
    for name, arguments in plan().items():
        if options.only in name:
            run(
                name,
                arguments,
                options.speech.resolve(),
                options.checkpoint.resolve(),
                options.work.resolve(),
            )


if __name__ == "__main__":
    main()
