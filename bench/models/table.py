"""The verdicts in bench/results/models.json, and docs/models.md, which is generated from them."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path

from bench.models.judge import ERROR, METHODS, REFUSED, RIGHT, SIZE, TOLERANCE, WRONG, Verdict

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "models.json"
PAGE = ROOT / "docs" / "models.md"
PACKAGES = ("torch", "transformers", "peft", "torchvision", "timm")
_REASON = 180

TEXT = """# Models

Made by `python -m bench.models --write`; do not edit. Each line is a small random model of a family, built from its
library's own configuration, trained in private with every parameter that its library trains, and with PEFT's LoRA
(rank 2) on every linear layer, in convolutional networks on every ungrouped convolution too; dropout off.

*Right*: in float64, at {size} examples and at as many as another dimension of the model has, of different lengths where
the model has masks, the private forward equals the plain one, and each example's gradient equals what the plain model
has of this example alone. The number is the largest relative error; {tolerance:.0e} is the limit. *Refused*: by an
error that names the module or the parameter, before anything is spent. † batch norms are frozen first, by
`dpkernels.nn.freeze_batch_norm`.

{versions}.

{counts}
"""


def versions() -> dict[str, str]:
    """The releases that were judged."""
    releases = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            releases[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            releases[package] = "none"
    return releases


def save(verdicts: Iterable[Verdict], path: Path = RESULTS) -> None:
    """Write the verdicts, one a line."""
    rows = [
        {k: v for k, v in asdict(verdict).items() if v is not None and v is not False and v != ""}
        for verdict in verdicts
    ]
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(
        f'{{\n "versions": {json.dumps(versions())},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8"
    )


def load(path: Path = RESULTS) -> tuple[dict[str, str], list[Verdict]]:
    """(versions, verdicts) as `save` wrote them."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    known = {f.name for f in fields(Verdict)}
    return saved["versions"], [
        Verdict(**{k: v for k, v in row.items() if k in known}) for row in saved["rows"]
    ]


def counts(verdicts: Iterable[Verdict]) -> dict[str, dict[str, int]]:
    """{method: {status: how many}}."""
    totals = {method: dict.fromkeys((RIGHT, REFUSED, WRONG, ERROR), 0) for method in METHODS}
    for verdict in verdicts:
        totals[verdict.method][verdict.status] += 1
    return totals


def page(of: dict[str, str], verdicts: list[Verdict]) -> str:
    """docs/models.md."""
    both: dict[tuple[str, str, str], dict[str, Verdict]] = {}
    for verdict in verdicts:
        both.setdefault((verdict.kind, verdict.name, verdict.library), {})[verdict.method] = verdict
    summary = ["| | models | right | refused | wrong | error |", "|---|---|---|---|---|---|"]
    for method, by_status in counts(verdicts).items():
        title = {"all": "all parameters", "lora": "LoRA"}[method]
        cells = [sum(by_status.values()), *(by_status[status] for status in (RIGHT, REFUSED, WRONG, ERROR))]
        summary.append(f"| {title} | " + " | ".join(map(str, cells)) + " |")
    releases = ", ".join(f"{package} {version}" for package, version in of.items() if version != "none")
    text = TEXT.format(
        size=SIZE, tolerance=TOLERANCE, versions=releases[0].upper() + releases[1:], counts="\n".join(summary)
    )
    kinds = list(dict.fromkeys(kind for kind, _, _ in both))
    reasons: list[str] = []
    for kind in kinds:
        text += f"\n## {kind[0].upper()}{kind[1:]}\n\n| model | library | all parameters | LoRA |\n|---|---|---|---|\n"
        for (of_kind, name, library), by_method in both.items():
            if of_kind == kind:
                mark = " †" if any(v.frozen_norms for v in by_method.values()) else ""
                cells = [_cell(by_method.get(method), reasons) for method in METHODS]
                text += f"| {name}{mark} | {library} | {cells[0]} | {cells[1]} |\n"
    if reasons:
        text += "\n## What the refusals say\n\n"
        text += "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)) + "\n"
    return text


def _cell(verdict: Verdict | None, reasons: list[str]) -> str:
    if verdict is None:
        return ""
    if verdict.status == RIGHT:
        return f"right, {verdict.error:.0e}"
    reason = _shortened(verdict.reason)
    if reason not in reasons:
        reasons.append(reason)
    word = verdict.status if verdict.status == REFUSED else f"**{verdict.status}**"
    return f"{word} [{reasons.index(reason) + 1}]"


def _shortened(reason: str) -> str:
    text = reason.replace("base_model.model.", "")
    text = text if len(text) <= _REASON else text[:_REASON].rsplit(" ", 1)[0] + " …"
    return text.replace("|", "\\|").replace("*", "\\*")


def faults(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return the failures: wrong verdicts, and errors that name no module or parameter."""
    return [verdict for verdict in verdicts if verdict.status in (WRONG, ERROR)]
