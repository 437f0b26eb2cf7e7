"""The privacy report of a finished run: one self-contained HTML page.

The report is made from run.json and the ledger alone. This module never opens the folder `not_private`, and reads only
the fields of run.json that it names. The one figure in it that is computed from the private data without noise is
therefore N, the number of privacy units, which the derivation of ε states and which is treated as public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from asr_finetune.console import duration
from asr_finetune.files import write_text
from asr_finetune.report import plots
from asr_finetune.training.run_folder import RunFolder
from dpkernels.errors import UserError
from dpkernels.privacy import DELTAS, ClaimError, audit_ledger, claimed_epsilon, detection_bounds

# Steps at which the plot of ε is computed.
_POINTS = 8
_RATES = ("wer", "cer", "wer_ci", "utterances", "words")


class ReportError(UserError, ValueError):
    """No correct report can be made from this run folder; the message has the reason."""


def write_report(run_folder: Path | str, out: Path | str) -> Path:
    """Write the report of a finished run.

    Args:
        run_folder: the output folder of `asr-finetune train`: run.json and, for a private run, ledger.jsonl.
        out: the HTML file; its folder is created if it does not exist.

    Returns:
        `out`.

    Raises:
        ReportError: the folder holds no finished run, or its record contradicts the ledger.
        dpkernels.privacy.LedgerError: the ledger was tampered with.
    """
    folder = RunFolder(Path(run_folder))
    run = folder.read_json(folder.run)
    if run is None:
        raise ReportError(
            f"run={str(run_folder)!r}: no run.json, so no finished run; finish it with asr-finetune train"
        )
    try:
        page = _render(_context(folder, run))
    except ClaimError as error:
        raise ReportError(f"{error}: no report is made") from error
    except (KeyError, jinja2.UndefinedError) as error:
        raise ReportError(
            f"{folder.run} lacks a value ({error}); another version may have written it"
        ) from error
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def _context(folder: RunFolder, run: Mapping[str, Any]) -> dict[str, Any]:
    """The template's values, each read from the record by name."""
    privacy, data, model = run["privacy"], run["data"], run["model"]
    ledger = audit_ledger(folder.ledger, privacy, folder.run.name) if privacy["enabled"] else None
    private = ledger is not None and ledger.epsilon is not None
    evaluation = run["evaluation"]
    rows = [
        {"label": label, **{name: evaluation[key][name] for name in _RATES}}
        for key, label in (
            ("before", "before fine-tuning"),
            ("after", "after, with differential privacy" if private else "after, NOT private"),
            ("non_private", "the same recipe without privacy"),
        )
        if evaluation.get(key) is not None
    ]
    return {
        "title": "Privacy report",
        "run_name": folder.path.resolve().name,
        "date": run["date"],
        "private": private,
        "noiseless": ledger is not None and not private,
        "privacy": privacy,
        "ledger": ledger,
        "data": data,
        "second_opinion": _second_opinion(privacy) if private else None,
        "unit": "speaker" if privacy["unit"] == "speaker" else "piece" if data.get("pieces") else "recording",
        "model": model,
        "method": _settings(run["method"], ("kind", "rank", "alpha", "dropout", "targets", "layers")),
        "training": _settings(
            run["training"],
            (
                "steps",
                "batch_size",
                "optimizer",
                "learning_rate",
                "lr_schedule",
                "warmup_steps",
                "weight_decay",
                "spec_augment",
            ),
        ),
        "steps": run["steps"],
        "time": duration(run["seconds"]),
        "rows": rows,
        "headline": [evaluation["before"], evaluation["after"]] if evaluation["before"] else None,
        "reduction": _reduction(evaluation),
        "overlap": _overlap(evaluation),
        "scoring": _settings(run["scoring"], ("normalize", "restrict_to")),
        "machine": run["machine"],
        "versions": run["versions"],
        "bounds": detection_bounds(
            [
                (claimed_epsilon(privacy, privacy["steps"], delta, "pld"), delta)
                for delta in (privacy["delta"], *DELTAS)
            ]
        )
        if private
        else [],
        "epsilon_plot": _epsilon_plot(privacy) if private else "",
        "wer_plot": _wer_plot(run["curve"], run["curve_start"]),
    }


def _settings(values: Mapping[str, Any], keys: Sequence[str]) -> list[tuple[str, str]]:
    settings = [(key.replace("_", " "), values.get(key)) for key in keys]
    return [(key, _plain(value)) for key, value in settings if value is not None]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _reduction(evaluation: Mapping[str, Any]) -> float | None:
    """Share of the word errors that fine-tuning removed (negative if it added some)."""
    before, after = evaluation.get("before"), evaluation.get("after")
    if not before or not after or before["wer"] == 0:
        return None
    return float(1 - after["wer"] / before["wer"])


def _overlap(evaluation: Mapping[str, Any]) -> bool:
    """Whether the intervals before and after have values in common."""
    before, after = ((evaluation.get(key) or {}).get("wer_ci") for key in ("before", "after"))
    return bool(before and after and before[0] <= after[1] and after[0] <= before[1])


def _second_opinion(privacy: Mapping[str, Any]) -> dict[str, Any] | None:
    """ε by the accountant that the run did not use; None if that accountant has no rule."""
    other = {"pld": "rdp", "rdp": "pld"}[privacy["accountant"]]
    value = privacy[f"epsilon_{other}"]
    return None if value is None else {"name": other.upper(), "epsilon": value, "looser": other == "rdp"}


def _epsilon_plot(privacy: Mapping[str, Any]) -> str:
    """ε over the steps that the ledger counts, computed from σ, q and the steps alone."""
    total = privacy["steps"]
    steps = sorted({max(1, round(total * part / _POINTS)) for part in range(1, _POINTS + 1)} | {1})
    points = [
        (step, claimed_epsilon(privacy, step, privacy["delta"], privacy["accountant"])) for step in steps
    ]
    figure = plots.epsilon_over_steps(points, target=privacy["target_epsilon"])
    return plots.svg(figure, "Epsilon spent over the training steps")


def _wer_plot(curve: Sequence[Mapping[str, Any]], start: float | None) -> str:
    points = [{key: point.get(key) for key in ("step", "wer", "wer_lo", "wer_hi")} for point in curve]
    if not points:
        return ""
    return plots.svg(plots.wer_over_steps(points, before=start), "Word error rate over the training steps")


def _render(context: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("asr_finetune.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "number": _number, "small": _small}
    return environment.get_template("report.html").render(context)


def _percent(value: float, places: int = 1) -> str:
    return f"{100 * value:.{places}f} %".replace(" ", "\N{NARROW NO-BREAK SPACE}")


def _number(value: float) -> str:
    """An integer with thin spaces between thousands; a fraction with up to four significant digits."""
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.4g}"


def _small(value: float) -> str:
    """A small number, such as δ, in scientific notation: 1e-5 is 1 × 10⁻⁵."""
    if value == 0 or value >= 1e-3:
        return f"{value:g}"
    digits, exponent = f"{value:.2e}".split("e")
    digits = digits.rstrip("0").rstrip(".")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{digits} × 10{power}"
