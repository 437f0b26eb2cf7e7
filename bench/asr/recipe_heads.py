"""Writes what `bench.asr.recipes` measured into the recipes' heads and docs/recipes.md.

python -m bench.asr.recipe_heads --results bench/results/DEVICE/recipes.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asr_finetune.config.yaml_io import RECIPES
from bench.harness.machine import ROOT
from bench.harness.results import FOLDER
from bench.harness.table import markdown

DOCS = ROOT / "docs" / "recipes.md"
HEAD = re.compile(r"^# (?:measured|estimated) on one H100: .*$", re.M)
BEGIN, END = "<!-- measured: written by bench.asr.recipe_heads -->", "<!-- /measured -->"
_NAMES = {"float32": "float32", "bfloat16": "model.dtype=bfloat16"}

Rows = Sequence[Mapping[str, Any]]


def in_a_line(rows: Rows, name: str) -> str:
    """One recipe's figures, for its head."""
    recipe_rows = [row for row in rows if row["recipe"] == name]
    what = "measured" if any("rate" in row for row in recipe_rows) else "estimated"
    return f"# {what} on one H100: " + "; ".join(_figures(row, rows) for row in recipe_rows)


def _figures(row: Mapping[str, Any], rows: Rows) -> str:
    name = _NAMES[row["dtype"]]
    if "rate" in row:
        return f"{name} {_hours(row)} hours, {_gib(row, 'measured')} GiB"
    hours = estimate(row, rows)
    duration = row["reason"] if hours is None else f"some {hours:.0f} hours"
    return f"{name} {duration}, {_gib(row, 'predicted')} GiB"


def estimate(row: Mapping[str, Any], rows: Rows) -> float | None:
    """Hours of a recipe that was not run: those of Parakeet's with the same method, at the same FLOPs a second."""
    like = row["recipe"].replace("wav2vec2_bert", "parakeet")
    for other in rows:
        if (other["recipe"], other["dtype"]) == (like, row["dtype"]) and "hours" in other:
            return float(other["hours"] * row["flops"] / other["flops"])
    return None


def table(saved: Mapping[str, Any]) -> str:
    """All recipes, as Markdown with what they were measured on."""
    rows = []
    for row in saved["rows"]:
        cells = [f"`{row['recipe']}`", row["dtype"]]
        if "rate" in row:
            cells += [
                f"{'at least ' if row.get('at_most') else ''}{row['rate']:.0f}",
                f"{row['step_seconds'] * 1e3:.0f}",
                _hours(row),
                _gib(row, "measured"),
                _gib(row, "predicted"),
            ]
        else:
            hours = estimate(row, saved["rows"])
            duration = "" if hours is None else f"({hours:.0f})"
            cells += [row["reason"], "", duration, _gib(row, "measured"), _gib(row, "predicted")]
        rows.append(cells)
    about = saved["about"]
    sizes = sorted(row["examples"] for row in saved["rows"] if "examples" in row)
    head = (
        f"{about['device']}, torch {about['versions']['torch']}, commit {about['commit']}, {about['date'][:10]}; "
        f"random weights, features of noise in memory, utterances of LibriSpeech-like lengths, one timed step of "
        f"{sizes[0]} to {sizes[-1]} of them. A step: noise and update. Hours: of the whole run, without "
        "evaluation. Memory: highest allocated, a micro-batch of the longest utterances; predicted by the planner. "
        "In brackets: estimated from a model's own FLOPs and the time of Parakeet's recipe of the same method."
    )
    if "note" in saved:
        head += f" {saved['note']}"
    names = ["recipe", "arithmetic", "utterances/s", "a step, ms", "hours", "GiB", "predicted"]
    return f"{head}\n\n{markdown(names, rows, 'llrrrrr')}"


def _hours(row: Mapping[str, Any]) -> str:
    return f"{'at most ' if row.get('at_most') else ''}{row['hours']:.0f}"


def _gib(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key] / 2**30:.1f}" if key in row else ""


def with_section(text: str, section: str) -> str:
    """The document with what stands between its two marks replaced.

    Raises:
        ValueError: it has no such marks.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"no {BEGIN} … {END} in it: put both where the table is to stand")
    return f"{text[: begin + len(BEGIN)]}\n\n{section}\n\n{text[end:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.asr.recipe_heads", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--results", type=Path, help="default: the one recipes.json under bench/results")
    options = parser.parse_args(arguments)
    paths = [options.results] if options.results else sorted(FOLDER.glob("*/recipes.json"))
    if len(paths) != 1:
        print(f"error: {len(paths)} recipes.json under {FOLDER}; fix: give --results", file=sys.stderr)
        return 1
    saved = json.loads(paths[0].read_text(encoding="utf-8"))
    for name in dict.fromkeys(row["recipe"] for row in saved["rows"]):
        path = RECIPES / f"{name}.yaml"
        line = in_a_line(saved["rows"], name)
        path.write_text(HEAD.sub(line, path.read_text(encoding="utf-8")), encoding="utf-8")
    DOCS.write_text(with_section(DOCS.read_text(encoding="utf-8"), table(saved)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
