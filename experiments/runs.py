"""What the experiments with spoken digits share: options, the command, results, and pages made from results.

Run the experiments as modules from the repository's root, so that they use the packages beside them.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from asr_finetune.files import write_json

ROOT = Path(__file__).parents[1]


def options(description: str | None, *, work: str, checkpoint: bool = True) -> argparse.Namespace:
    """The command line of an experiment: absolute paths `speech`, `checkpoint` and `work`, and `only`.

    Args:
        description: the module's docstring.
        work: the default of `--work`.
        checkpoint: whether the experiment trains whisper-tiny.en.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speech", type=Path, required=True, help="folder of manifest.jsonl")
    if checkpoint:
        parser.add_argument("--checkpoint", type=Path, required=True, help="folder of whisper-tiny.en")
    parser.add_argument("--work", type=Path, default=Path(work), help="where the runs are trained")
    parser.add_argument("--only", default="", help="only runs whose name holds this text")
    given = parser.parse_args()
    for name, value in vars(given).items():
        if isinstance(value, Path):
            setattr(given, name, value.resolve())
    given.work.mkdir(parents=True, exist_ok=True)
    return given


def make_missing(results: Path, runs: Mapping[str, Callable[[], dict[str, Any]]], only: str = "") -> None:
    """Make the results that are not there, one at a time and in this order, so that the set can be cut anywhere.

    Args:
        results: the folder of the results; it is made.
        runs: a result's name -> what returns the result.
        only: make those whose name holds this text.
    """
    import peft  # noqa: F401
    import transformers.models.parakeet.modeling_parakeet
    import transformers.models.whisper.modeling_whisper  # noqa: F401 - imported once, for all runs

    import asr_finetune.training.run  # noqa: F401

    results.mkdir(exist_ok=True)
    for name, run in runs.items():
        result = results / f"{name}.json"
        if only in name and not result.exists():
            write_json(result, run())


def asr_finetune(arguments: list[str], paths: list[str | Path]) -> str:
    """Run the command in a process of its own; return it as a person would type it, with names in place of paths.

    Args:
        arguments: a subcommand and its options but those with paths; they may name files from the repository's root.
        paths: options and their paths, in turn.

    Raises:
        RuntimeError: the command failed.
    """
    shown = [
        f"{option} {'CHECKPOINT' if option == '--model' else Path(path).name}"
        for option, path in zip(paths[::2], paths[1::2], strict=True)
    ]
    command = " ".join(["asr-finetune", *arguments, *shown])
    print(command, flush=True)
    # Forked where that can be: torch and transformers are imported once for all runs.
    context = multiprocessing.get_context(
        "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    )
    process = context.Process(target=_command, args=([*arguments, *map(str, paths)],))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"exit code {process.exitcode}: {command}")
    return command


def _command(arguments: list[str]) -> None:
    from asr_finetune.cli import main

    os.chdir(ROOT)
    sys.argv = ["asr-finetune", *arguments]
    main()


def train(arguments: list[str], *, model: Path, data: Path, output: Path, title: str) -> dict[str, Any]:
    """The record of one training run, without machine paths.

    Args:
        arguments: options of `asr-finetune train` but those with paths.
        model, data: the model's folder, and the manifest with training and test recordings.
        output: the run's folder; it is removed.
        title: the model's name in the record.
    """
    # Cut: resumed, it would end early, for what the lost steps spent counts.
    shutil.rmtree(output, ignore_errors=True)
    paths: list[str | Path] = ["--model", model, "--train", data, "--test", data, "--output", output]
    command = asr_finetune(["train", *arguments], paths)
    record: dict[str, Any] = json.loads((output / "run.json").read_text(encoding="utf-8"))
    record["command"] = command
    record["data"]["source"] = data.name
    record["model"]["name"] = title
    shutil.rmtree(output)
    return record


def zero_shot(arguments: list[str], *, model: Path, data: Path, out: Path) -> dict[str, Any]:
    """Error rates on the test recordings without training.

    Args:
        arguments: options of `asr-finetune evaluate` but those with paths.
        model, data: the model's folder, and the manifest.
        out: a file that is written.
    """
    paths: list[str | Path] = ["--model", model, "--data", data, "--out", out]
    command = asr_finetune(["evaluate", "--split=test", *arguments], paths)
    result = json.loads(out.read_text(encoding="utf-8"))
    result.pop("hypotheses", None)
    return {"command": command, "evaluation": result}


def load(folder: Path, name: str) -> dict[str, Any] | None:
    """A run's result, or None where it was not made."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def shown(values: list[float]) -> str:
    """The mean and every value."""
    if not values:
        return "not run"
    each = f" ({', '.join(f'{value:.1%}' for value in values)})" if len(values) > 1 else ""
    return f"**{mean(values):.1%}**{each}"


def between(text: str, marker: str, content: str) -> str:
    """`text` with what stands between a marker and its end replaced."""
    pattern = re.compile(rf"(<!-- {marker}[^>]*-->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    assert pattern.search(text), f"no <!-- {marker} --> in the page"
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def save(figure: Figure, path: Path) -> None:
    """Write the figure as `path`.svg and `path`.png."""
    with matplotlib.rc_context({"svg.hashsalt": path.name}):  # the same file for the same figure
        figure.savefig(f"{path}.svg", metadata={"Date": None})
        figure.savefig(f"{path}.png", dpi=160, facecolor="white")
