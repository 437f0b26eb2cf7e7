"""run.json: the record of a finished run, from which the report is made.

It may be passed on. About the training data it holds N, the number of privacy units, which is treated as public, and a
keyed fingerprint. Nothing else in it is computed from that data without noise.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from asr_finetune.config.schema import Config
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.sources import Source, Split
from asr_finetune.training.sampling import units
from asr_finetune.training.start import Run
from dpkernels import PrivacyEngine, __version__

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
    config = run.config
    return {
        "privacy": privacy_record(config, run.engine, epsilon),
        "data": data,
        "model": run.recognizer.describe(),
        "method": asdict(config.method),
        "training": asdict(config.train),
        "steps": run.step,
        "versions": versions(),
        "machine": machine(run.recognizer.device),
        "evaluation": evaluation,
        "scoring": {
            "normalize": config.evaluate.normalize,
            "restrict_to": config.evaluate.restrict_to,
        },
        "curve": run.curve,
        "curve_start": _curve_start(config, evaluation),
        "seconds": run.seconds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def data_record(config: Config, corpus: Corpus, fingerprint: str) -> dict[str, Any]:
    """The sources of the data; about the training data only N and the fingerprint."""
    data = config.data
    return {
        "source": _shown(data.train),
        "split": _shown(data.train_split),
        "units": units(config, corpus),
        "pieces": data.pieces == "examples" and config.privacy.unit == "example",
        "fingerprint": fingerprint,
        "test": _shown(data.test),
        "test_split": data.test_split,
        "valid": _shown(data.valid) if config.train.eval_every else None,
        "valid_split": _shown(data.valid_split) if config.train.eval_every else None,
    }


def _shown(source: Source | Split) -> str | None:
    """A source (or split) without the folders of this machine; several with plus signs."""
    if source is None or isinstance(source, str):
        return Path(source).name if source is not None and Path(source).is_absolute() else source
    return " + ".join(_shown(one) or "all" for one in source)


def _curve_start(config: Config, evaluation: dict[str, Any]) -> float | None:
    """WER at step 0 of the curve: that of "before" if test and validation data are the same and no window is set."""
    data, before = config.data, evaluation["before"]
    same = (data.test, data.test_split) == (data.valid, data.valid_split)
    return before["wer"] if before and same and config.model.window_seconds is None else None


def privacy_record(config: Config, engine: PrivacyEngine | None, epsilon: float | None) -> dict[str, Any]:
    """The privacy section; without privacy every figure is None."""
    privacy = config.privacy
    values: dict[str, Any] = {
        "enabled": engine is not None,
        "epsilon": epsilon,
        "delta": privacy.delta if engine else None,
        "target_epsilon": privacy.epsilon if engine else None,
        "max_grad_norm": privacy.max_grad_norm if engine else None,
        "unit": privacy.unit if engine else None,
        "accountant": privacy.accountant if engine else None,
        "max_batch_size": privacy.max_batch_size if engine else None,
        "max_examples_per_speaker": privacy.max_examples_per_speaker if engine else None,
        "expected_batch_size": config.train.batch_size,
    }
    if engine is None:
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
    sampling = engine.sampling
    has_rdp = epsilon is not None and privacy.max_batch_size is None  # RDP has no rule for truncated Poisson
    return values | {
        "noise_multiplier": engine.noise_multiplier,
        "adjacency": f"add or remove one {sampling.unit}",
        "sampling": "poisson" if sampling.max_batch_size is None else "truncated_poisson",
        "epsilon_pld": None if epsilon is None else engine.get_epsilon(privacy.delta, accountant="pld"),
        "epsilon_rdp": engine.get_epsilon(privacy.delta, accountant="rdp") if has_rdp else None,
        "steps": engine.steps,
        "sample_rate": sampling.sample_rate,
        "dataset_size": sampling.units,
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
