"""The privacy report of a finished run: one HTML page that needs nothing beside it.

It is made from run.json and the ledger alone. The folder `not_private` is never opened, and of run.json only
the fields named here are read, so that a figure computed from the private data without noise has no way in: but
for N, the number of privacy units, which ε's own derivation states and which is taken to be public.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from asr_finetune.progress import duration
from asr_finetune.report import plots
from asr_finetune.training.checkpoint import write_text
from asr_finetune.training.run_folder import RunFolder
from dpkernels.privacy import epsilon as compute_epsilon
from dpkernels.privacy import read_ledger

# Steps at which the plot of ε is computed, and values of δ that the attacker's bound is taken over.
_POINTS = 8
_DELTAS = (0.5, 0.3, 0.1, 0.03, 0.01, 0.001)
_FALSE_ALARMS = (0.001, 0.01, 0.1)


class ReportError(ValueError):
    """A run folder that no honest report can be made from; the message says what is wrong with it."""


@dataclass(frozen=True)
class LedgerCheck:
    """What the ledger says, once its chain of hashes was verified.

    Attributes:
        path: of the ledger.
        runs: starts of the training, resumptions included.
        steps: steps it counts.
        head: hash of its last line.
        epsilon: ε recomputed from it, at the run's δ; None where a run used no noise.
        sensitivity: L2 sensitivity of the clipped sum that the noise is scaled to.
    """

    path: Path
    runs: int
    steps: int
    head: str
    epsilon: float | None
    sensitivity: float | None


def write_report(run_folder: Path | str, out: Path | str) -> Path:
    """Write the report of a finished run.

    Args:
        run_folder: what `asr-finetune train` wrote: run.json and, for a private run, ledger.jsonl.
        out: the HTML file; its folder is made where it does not exist.

    Returns:
        `out`.

    Raises:
        ReportError: no finished run there, or a record that contradicts the ledger.
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
    except (KeyError, jinja2.UndefinedError) as error:
        raise ReportError(
            f"{folder.run} lacks a value ({error}); another version may have written it"
        ) from error
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def check_ledger(folder: RunFolder, privacy: Mapping[str, Any]) -> LedgerCheck:
    """Verify the ledger and hold the record against it.

    Raises:
        ReportError: there is none, or the record says less was spent than the ledger does.
        dpkernels.privacy.LedgerError: a line was edited, removed or inserted.
    """
    if not folder.ledger.is_file():
        raise ReportError(f"{folder.ledger} is missing: without it nothing shows what was spent")
    ledger = read_ledger(folder.ledger)
    mechanisms = {run.mechanism for run in ledger.runs if run.steps}
    if len(mechanisms) != 1:
        raise ReportError(f"{folder.ledger}: {len(mechanisms)} different mechanisms; a run has one")
    (mechanism,) = mechanisms
    runs = [run for run in ledger.runs if run.steps]  # the others are starts that failed before a step
    claims = {
        "steps": ledger.steps,
        "noise_multiplier": mechanism.noise_multiplier,
        "sample_rate": mechanism.sample_rate,
        "dataset_size": runs[0].settings["dataset_size"],
        "max_batch_size": mechanism.max_batch_size,
        "unit": runs[0].settings["unit"],
    }
    for key, found in claims.items():
        if privacy[key] != found:
            raise ReportError(
                f"run.json says privacy.{key}={privacy[key]!r}, the ledger {found!r}: no report is made"
            )
    spent = None
    if mechanism.noise_multiplier > 0:
        spent = _epsilon(privacy, ledger.steps, privacy["delta"], privacy["accountant"])
        if privacy["epsilon"] is None or privacy["epsilon"] < spent * (1 - 1e-6):
            raise ReportError(
                f"run.json says epsilon={privacy['epsilon']}, the ledger's steps spend {spent:.4f} at "
                f"delta={privacy['delta']:g}: no report is made"
                + (
                    ". Before this version truncated sampling (privacy.max_batch_size) was accounted for removing a "
                    "unit, not for adding one: a run of then spent what the ledger says"
                    if privacy["max_batch_size"] is not None
                    else ""
                )
            )
    sensitivities = {run.settings.get("sensitivity") for run in runs}
    sensitivity = sensitivities.pop() if len(sensitivities) == 1 else None
    return LedgerCheck(folder.ledger, len(ledger.runs), ledger.steps, ledger.last_hash, spent, sensitivity)


def detection_bounds(privacy: Mapping[str, Any], steps: int) -> list[tuple[float, float]]:
    """How well an attacker can do: (false alarms, most detections) for a few rates of false alarms.

    The attacker decides from the finished model whether one unit was in the training data, and knows all
    else. (ε, δ)-DP bounds the rate of detections β at a rate of false alarms α by β ≤ e^ε·α + δ and by
    β ≤ 1 − e^−ε·(1 − δ − α) (Kairouz, Oh and Viswanath 2015). A mechanism has an ε for every δ: the smallest
    bound over several is taken.
    """
    deltas = (privacy["delta"], *_DELTAS)
    pairs = [(_epsilon(privacy, steps, delta, "pld"), delta) for delta in deltas]
    bounds = []
    for alarms in _FALSE_ALARMS:
        first = min(math.exp(eps) * alarms + delta for eps, delta in pairs)
        second = min(1 - math.exp(-eps) * (1 - delta - alarms) for eps, delta in pairs)
        bounds.append((alarms, min(first, second, 1.0)))
    return bounds


def _epsilon(privacy: Mapping[str, Any], steps: int, delta: float, accountant: str) -> float:
    with warnings.catch_warnings():
        # δ against 1/N is said in the report itself, and `detection_bounds` has reasons of its own for large ones.
        warnings.filterwarnings("ignore", message="delta=")
        return compute_epsilon(
            privacy["noise_multiplier"],
            privacy["sample_rate"],
            steps,
            delta,
            accountant=accountant,
            max_batch_size=privacy["max_batch_size"],
            # N matters to the accountant for truncated batches only.
            dataset_size=privacy["dataset_size"] if privacy["max_batch_size"] is not None else None,
        )


def _context(folder: RunFolder, run: Mapping[str, Any]) -> dict[str, Any]:
    """What the template is given: every value is read by name."""
    privacy, data, model = run["privacy"], run["data"], run["model"]
    ledger = check_ledger(folder, privacy) if privacy["enabled"] else None
    private = ledger is not None and ledger.epsilon is not None
    evaluation = run["evaluation"]
    rows = [
        _evaluation_row(label, evaluation.get(key))
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
        "unit": {"example": "recording", "speaker": "speaker"}.get(privacy["unit"], "recording"),
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
        "bounds": detection_bounds(privacy, privacy["steps"]) if private else [],
        "epsilon_plot": _epsilon_plot(privacy) if private else "",
        "wer_plot": _wer_plot(run["curve"], run["curve_start"]),
    }


def _evaluation_row(label: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "label": label,
        "wer": values["wer"],
        "cer": values["cer"],
        "wer_ci": values["wer_ci"],
        "utterances": values["utterances"],
        "words": values["words"],
    }


def _settings(values: Mapping[str, Any], keys: Sequence[str]) -> list[tuple[str, str]]:
    found = [(key.replace("_", " "), values.get(key)) for key in keys]
    return [(key, _plain(value)) for key, value in found if value is not None]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _reduction(evaluation: Mapping[str, Any]) -> float | None:
    """Share of the word errors that fine-tuning removed (negative: it added some)."""
    before, after = evaluation.get("before"), evaluation.get("after")
    if not before or not after or before["wer"] == 0:
        return None
    return float(1 - after["wer"] / before["wer"])


def _overlap(evaluation: Mapping[str, Any]) -> bool:
    """Whether the intervals before and after have values in common."""
    before, after = ((evaluation.get(key) or {}).get("wer_ci") for key in ("before", "after"))
    return bool(before and after and before[0] <= after[1] and after[0] <= before[1])


def _second_opinion(privacy: Mapping[str, Any]) -> dict[str, Any] | None:
    """ε by the accountant that the run was not held to; None where it has no rule."""
    other = {"pld": "rdp", "rdp": "pld"}[privacy["accountant"]]
    value = privacy[f"epsilon_{other}"]
    return None if value is None else {"name": other.upper(), "epsilon": value, "looser": other == "rdp"}


def _epsilon_plot(privacy: Mapping[str, Any]) -> str:
    """ε over the steps that the ledger counts: known from σ, q and the steps alone."""
    total = privacy["steps"]
    steps = sorted({max(1, round(total * part / _POINTS)) for part in range(1, _POINTS + 1)} | {1})
    points = [(step, _epsilon(privacy, step, privacy["delta"], privacy["accountant"])) for step in steps]
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
    """1234567 with thin gaps; a fraction with up to four significant digits."""
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.4g}"


def _small(value: float) -> str:
    """A δ or a learning rate: 1e-5 as 1 × 10⁻⁵."""
    if value == 0 or value >= 1e-3:
        return f"{value:g}"
    digits, exponent = f"{value:.2e}".split("e")
    digits = digits.rstrip("0").rstrip(".")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{digits} × 10{power}"
