"""run.json: the record of a finished run, from which the report is made.

It may be passed on. About the training data it holds N, the number of privacy units, which is treated as public, and a
keyed fingerprint. Nothing else in it is computed from that data without noise.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from asr_finetune.config.schema import Config, DataConfig
from asr_finetune.data.corpus import Corpus
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.training.origin import origin_by_ledger
from asr_finetune.training.run_folder import RunFolder, by_test_set
from asr_finetune.training.sampling import units
from asr_finetune.training.start import Run
from dpkernels import PrivacyEngine, __version__, checkpoint
from dpkernels.privacy import claimed_epsilon, read_ledger

_PACKAGES = (
    *("torch", "transformers", "peft", "datasets", "jiwer", "dp-accounting", "numpy"),
    *("soundfile", "soxr"),
)


def run_record(
    run: Run, data: dict[str, Any], evaluation: dict[str, Any], epsilon: float | None
) -> dict[str, Any]:
    """The values of run.json.

    Args:
        run: after its last step.
        data: the result of `data_record`, and whether the test data holds training recordings.
        evaluation: "before", "after", "non_private": Evaluation.to_dict() or None.
        epsilon: ε spent; None without privacy or without noise.
    """
    privacy = privacy_record(run.config, spent_by(run.engine, run.config) if run.engine else None, epsilon)
    progress = {"steps": run.step, "seconds": run.seconds, "curve": run.curve}
    progress["origin"] = None if run.origin is None else str(run.origin)
    progress["audited"] = run.audited
    return _record(run.config, run.recognizer, privacy, data, evaluation, progress)


def stopped_record(
    folder: RunFolder, config: Config, recognizer: Recognizer, saved: checkpoint.Checkpoint
) -> dict[str, Any]:
    """The record of a run that is not finished, at its last checkpoint: its ledger says what was spent."""
    metrics, figures = folder.read_json(folder.metrics) or {}, folder.read_json(folder.data) or {}
    spent, epsilon = None, None
    if config.privacy.enabled:
        spent = _spent_in(folder.ledger, config, saved)
        epsilon = spent.epsilon(config.privacy.accountant) if spent.noise_multiplier else None
    count = spent.dataset_size if spent else figures.get("utterances")
    data = _data_record(config, count, figures.get("fingerprint"))
    if spent is None:
        data["test_shares_training"] = None
    progress = {"steps": saved.step, "seconds": saved.seconds, "curve": saved.curve, "stopped": True}
    origin = origin_by_ledger(config, folder.ledger)
    progress["origin"] = None if origin is None else str(origin)
    progress["audited"] = folder.coins.is_file()
    privacy = privacy_record(config, spent, epsilon)
    evaluation = {"before": metrics.get("before"), "after": None, "non_private": None}
    return _record(config, recognizer, privacy, data, evaluation, progress)


def _record(
    config: Config,
    recognizer: Recognizer,
    privacy: dict[str, Any],
    data: dict[str, Any],
    evaluation: dict[str, Any],
    progress: dict[str, Any],
) -> dict[str, Any]:
    return {
        "privacy": privacy,
        "data": data,
        "model": recognizer.describe(),
        "method": asdict(config.method),
        "training": asdict(config.train),
        "versions": versions(),
        "machine": machine(recognizer.device),
        "evaluation": evaluation,
        "scoring": {
            "normalize": config.evaluate.normalize,
            "restrict_to": config.evaluate.restrict_to,
        },
        "curve_start": _curve_start(config, evaluation),
        **progress,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def data_record(config: Config, corpus: Corpus, fingerprint: str) -> dict[str, Any]:
    """The sources of the data; about the training data only N and the fingerprint."""
    return _data_record(config, units(config, corpus), fingerprint)


def _data_record(config: Config, count: int | None, fingerprint: str | None) -> dict[str, Any]:
    data = config.data
    return {
        "source": _shown(data.train),
        "split": _shown(data.train_split),
        "units": count,
        "pieces": data.pieces == "examples" and config.privacy.unit == "example",
        "fingerprint": fingerprint,
        "test": _shown(data.test),
        "test_split": _shown(data.test_split),
        "valid": _shown(data.valid) if config.train.eval_every else None,
        "valid_split": _shown(data.valid_split) if config.train.eval_every else None,
        "filters": _filters(data),
    }


def _filters(data: DataConfig) -> list[str]:
    """The settings that leave recordings out, of training and test data alike; without the names of speakers."""
    filters = [f"{data.min_seconds:g} to {data.max_seconds:g} s"]
    if data.corpus is not None:
        filters.append(f"corpus {data.corpus}")
    if data.speakers is not None:
        filters.append("chosen speakers only (data.speakers)")
    if data.exclude_speakers is not None:
        filters.append("without chosen speakers (data.exclude_speakers)")
    return filters


def unit_name(record: Mapping[str, Any]) -> str:
    """What the ε of run.json's values protects, in a word: a recording, a piece of one, or a speaker."""
    example = "piece" if record["data"].get("pieces") else "recording"
    return "speaker" if record["privacy"]["unit"] == "speaker" else example


def _shown(source: Any) -> Any:
    """A source without the folders of this machine; several with plus signs, test sets by name."""
    if isinstance(source, dict):
        return {name: _shown(one) for name, one in source.items()}
    if source is None or isinstance(source, str):
        return Path(source).name if source is not None and Path(source).is_absolute() else source
    return " + ".join(_shown(one) or "all" for one in source)


def _curve_start(config: Config, evaluation: dict[str, Any]) -> float | None:
    """WER at step 0 of the curve: that of "before" if a test set is the validation data and no window is set."""
    valid, before = (config.data.valid, config.data.valid_split), by_test_set(evaluation["before"])
    same = [name for name, test in config.data.test_sets().items() if test == valid and name in before]
    return before[same[0]]["wer"] if same and config.model.window_seconds is None else None


@dataclass(frozen=True)
class Spent:
    """What a run has spent so far, by its engine or by its ledger.

    Attributes:
        clip_norm: C at the end, which adaptive clipping has moved.
        epsilon: accountant -> ε at the run's δ.
    """

    noise_multiplier: float
    sample_rate: float
    dataset_size: int
    max_batch_size: int | None
    unit: str
    steps: int
    clip_norm: float | None
    epsilon: Callable[[str], float]


def spent_by(engine: PrivacyEngine, config: Config) -> Spent:
    """What an engine's run has spent, with the steps of earlier runs in its ledger."""
    sampling, delta = engine.sampling, config.privacy.delta
    return Spent(
        engine.noise_multiplier,
        sampling.sample_rate,
        sampling.units,
        sampling.max_batch_size,
        sampling.unit,
        engine.steps,
        engine.clip_norm,
        lambda accountant: engine.get_epsilon(delta, accountant=accountant),
    )


def _spent_in(ledger: Path, config: Config, saved: checkpoint.Checkpoint) -> Spent:
    """What a ledger's steps have spent; they are all of one mechanism.

    Raises:
        LedgerError: the ledger was changed.
    """
    contents = read_ledger(ledger)
    (first, *_) = [run for run in contents.runs if run.steps]
    mechanism, settings = first.mechanism, first.settings
    facts = {**asdict(mechanism), "dataset_size": settings["dataset_size"]}
    delta = config.privacy.delta
    assert delta is not None  # the run was private
    assert saved.privacy is not None
    return Spent(
        mechanism.noise_multiplier,
        mechanism.sample_rate,
        settings["dataset_size"],
        mechanism.max_batch_size,
        settings["unit"],
        contents.steps,
        _norm_in(saved.privacy["clip_norm"]) if config.privacy.clipping == "adaptive" else None,
        lambda accountant: claimed_epsilon(facts, contents.steps, delta, accountant),
    )


def _norm_in(state: float | dict[str, float]) -> float:
    """C of a checkpoint, or the root of the sum of its layers' squared norms."""
    return math.hypot(*state.values()) if isinstance(state, dict) else state


def privacy_record(config: Config, spent: Spent | None, epsilon: float | None) -> dict[str, Any]:
    """The privacy section; without privacy every figure is None."""
    privacy = config.privacy
    values: dict[str, Any] = {
        "enabled": spent is not None,
        "epsilon": epsilon,
        "delta": privacy.delta if spent else None,
        "target_epsilon": privacy.epsilon if spent else None,
        "max_grad_norm": privacy.max_grad_norm if spent else None,
        "clipping": privacy.clipping if spent else None,
        "clip_norm": spent.clip_norm
        if spent and epsilon is not None and privacy.clipping == "adaptive"
        else None,
        "clipping_unit": privacy.clips() if spent else None,
        "unit": privacy.unit if spent else None,
        "accountant": privacy.accountant if spent else None,
        "max_batch_size": privacy.max_batch_size if spent else None,
        "max_examples_per_speaker": privacy.max_examples_per_speaker if spent else None,
        "expected_batch_size": config.train.batch_size,
    }
    if spent is None:
        absent = (
            "noise_multiplier",
            "adjacency",
            "sampling",
            "epsilon_pld",
            "epsilon_rdp",
            "steps",
            "sample_rate",
            "dataset_size",
        )
        return values | dict.fromkeys(absent)
    has_rdp = epsilon is not None and privacy.max_batch_size is None  # RDP has no rule for truncated Poisson
    return values | {
        "noise_multiplier": spent.noise_multiplier,
        "adjacency": f"add or remove one {spent.unit}",
        "sampling": "poisson" if spent.max_batch_size is None else "truncated_poisson",
        "epsilon_pld": None if epsilon is None else spent.epsilon("pld"),
        "epsilon_rdp": spent.epsilon("rdp") if has_rdp else None,
        "steps": spent.steps,
        "sample_rate": spent.sample_rate,
        "dataset_size": spent.dataset_size,
    }


def versions() -> dict[str, str]:
    """Versions of the packages on which the result depends."""
    return {
        "python": platform.python_version(),
        "dpkernels": __version__,
        **{name: metadata.version(name) for name in _PACKAGES},
    }


def machine(device: torch.device) -> dict[str, str]:
    """The device and operating system of the run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device} ({name})", "os": f"{platform.system()} {platform.release()}"}
