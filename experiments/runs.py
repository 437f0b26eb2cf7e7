"""What the experiments with spoken digits share: the command, results, and pages made from results.

Run the experiments as modules from the repository's root, so that they use the packages beside them.
"""

import json
import multiprocessing
import os
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]


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


def trained(output: Path, *, command: str, data: str, model: str) -> dict[str, Any]:
    """The record of a finished run, without machine paths."""
    record: dict[str, Any] = json.loads((output / "run.json").read_text(encoding="utf-8"))
    record["command"] = command
    record["data"]["source"] = data
    record["model"]["name"] = model
    return record


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
