"""The privacy report of a finished run: one self-contained HTML page.

The report is made from run.json, the ledger, and audit.json of an audited run. This module never opens the folder
`not_private`, and reads only the fields of these files that it names. But for an audit's figures, which are marked, the
one figure in it that is computed from the private data without noise is therefore N, the number of privacy units, which
the derivation of ε states and which is treated as public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from asr_finetune.console import duration
from asr_finetune.files import write_text
from asr_finetune.report import plots
from asr_finetune.training.record import unit_name
from asr_finetune.training.run_folder import RunFolder, by_test_set
from dpkernels.errors import UserError
from dpkernels.files import writing
from dpkernels.privacy import (
    DELTAS,
    SAFE_DELTA_TIMES_N,
    ClaimError,
    audit_ledger,
    claimed_epsilon,
    detection_bounds,
)
from dpkernels.rounding import shown_epsilon, shown_lower_bound, shown_sigma

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
        dpkernels.files.WriteError: `out` cannot be written.
    """
    folder = RunFolder(Path(run_folder))
    run = folder.record()
    if run is None:
        raise ReportError(
            f"run={str(run_folder)!r}: no run.json, so no finished run; finish it with asr-finetune train, or "
            "take what its last checkpoint has with asr-finetune export"
        )
    try:
        page = _render(_context(folder, run))
    except ClaimError as error:
        again = "; export the run again, which was continued" if run.get("stopped") else ""
        raise ReportError(f"{error}: no report is made{again}") from error
    except (KeyError, jinja2.UndefinedError) as error:
        raise ReportError(
            f"{folder.run} lacks a value ({error}); another version may have written it"
        ) from error
    out = Path(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def _context(folder: RunFolder, run: Mapping[str, Any]) -> dict[str, Any]:
    """The template's values, each read from the record by name."""
    privacy, data, model = run["privacy"], run["data"], run["model"]
    ledger = audit_ledger(folder.ledger, privacy, folder.run.name) if privacy["enabled"] else None
    private = ledger is not None and ledger.epsilon is not None
    evaluation = run["evaluation"]
    audit = _audit(folder.read_json(folder.audit))
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
        "safe_delta_times_n": SAFE_DELTA_TIMES_N,
        "unit": unit_name(run),
        "model": model,
        "origin": run.get("origin"),
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
        "stopped": run.get("stopped", False),
        "audited": audit is not None or run.get("audited", False),
        "steps": run["steps"],
        "time": duration(run["seconds"]),
        "test_sets": _test_sets(data, evaluation, private),
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
        "audit": audit,
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


def _test_sets(data: Mapping[str, Any], evaluation: Mapping[str, Any], private: bool) -> list[dict[str, Any]]:
    """Of each test set its source, its rows of error rates, and what they show."""
    labels = {
        "before": "before fine-tuning",
        "after": "after, with differential privacy" if private else "after, NOT private",
        "non_private": "the same recipe without privacy",
    }
    measured = {key: by_test_set(evaluation.get(key)) for key in labels}
    names = dict.fromkeys(name for results in measured.values() for name in results)
    sets = []
    for name in names:
        results = {key: sets_of[name] for key, sets_of in measured.items() if name in sets_of}
        sources = [
            part[name] if isinstance(part, Mapping) else part for part in (data["test"], data["test_split"])
        ]
        sets.append(
            {
                "name": name,
                "source": ", split ".join(filter(None, sources)),
                "rows": [
                    {"label": labels[key], **{rate: result[rate] for rate in _RATES}, **_shares(result)}
                    for key, result in results.items()
                ],
                "headline": [results["before"], results["after"]]
                if {"before", "after"} <= set(results)
                else None,
                "reduction": _reduction(results),
                "overlap": _overlap(results),
            }
        )
    return sets


def _shares(result: Mapping[str, Any]) -> dict[str, Any]:
    """The number of recordings of a test set, the unusable ones included, and why those were left out."""
    left_out = result.get("left_out") or {}
    reasons = ", ".join(f"{count} × {kind}" for kind, count in left_out.items())
    return {"of": result["utterances"] + sum(left_out.values()), "left_out": reasons}


def _reduction(results: Mapping[str, Any]) -> float | None:
    """Share of the word errors that fine-tuning removed (negative if it added some)."""
    before, after = results.get("before"), results.get("after")
    if not before or not after or before["wer"] == 0:
        return None
    return float(1 - after["wer"] / before["wer"])


def _overlap(results: Mapping[str, Any]) -> bool:
    """Whether the intervals before and after have values in common."""
    before, after = ((results.get(key) or {}).get("wer_ci") for key in ("before", "after"))
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


_OF_AUDIT = (
    *("epsilon", "delta", "confidence", "canaries", "included", "guessed_included", "guessed_excluded"),
    *("correct", "tried", "largest"),
)


def _audit(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What an attack on the run showed, with its plot; None of a run that was not audited."""
    if values is None:
        return None
    scores = values["scores"]
    figure = plots.canary_scores(scores["edges"], scores["included"], scores["excluded"])
    return {
        **{key: values[key] for key in _OF_AUDIT},
        "plot": plots.svg(figure, "Scores of included and excluded canaries"),
    }


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
    environment.filters |= {
        "percent": _percent,
        "number": _number,
        "small": _small,
        "epsilon": shown_epsilon,
        "lower": shown_lower_bound,
        "sigma": shown_sigma,
    }
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
