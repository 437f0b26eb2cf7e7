"""A finished run's folder for the report's tests: made by hand, with a real ledger."""

import json
from pathlib import Path
from typing import Any

from dpkernels.privacy import epsilon
from dpkernels.privacy.accounting.ledger import Ledger

SIGMA, RATE, SIZE, STEPS, DELTA = 1.1, 0.05, 2000, 6, 1e-5
# What must never reach the report; distinct in the first two digits from anything that may.
HISTORY = [
    {"step": 1, "loss": 38.7194, "examples": 97, "clip_rate": 0.8866, "mean_norm": 67.4213, "non_finite": 0},
    {"step": 2, "loss": 36.6558, "examples": 112, "clip_rate": 0.8673, "mean_norm": 64.8849, "non_finite": 0},
]
SECRETS = [entry[key] for entry in HISTORY for key in ("loss", "clip_rate", "mean_norm")]


def record(**privacy: Any) -> dict[str, Any]:
    """The values of run.json, as training writes them."""
    evaluation = {"cer": 0.31, "utterances": 150, "words": 400, "wer_ci": [0.4, 0.46], "wer": 0.43}
    return {
        "privacy": {
            "enabled": True,
            "epsilon": epsilon(SIGMA, RATE, STEPS, DELTA),
            "delta": DELTA,
            "target_epsilon": 3.0,
            "max_grad_norm": 1.0,
            "unit": "example",
            "accountant": "pld",
            "max_batch_size": None,
            "max_examples_per_speaker": None,
            "expected_batch_size": 100,
            "noise_multiplier": SIGMA,
            "adjacency": "add or remove one example",
            "sampling": "poisson",
            "epsilon_pld": epsilon(SIGMA, RATE, STEPS, DELTA),
            "epsilon_rdp": epsilon(SIGMA, RATE, STEPS, DELTA, accountant="rdp"),
            "steps": STEPS,
            "sample_rate": RATE,
            "dataset_size": SIZE,
            **privacy,
        },
        "data": {
            "source": "recordings/<clinic> & co",
            "split": None,
            "units": SIZE,
            "fingerprint": "ab" * 32,
            "test": "test.jsonl",
            "test_split": "clean",
            "valid": "public.jsonl",
            "valid_split": None,
            "test_shares_training": False,
        },
        "model": {
            "name": "small-parakeet",
            "revision": None,
            "class": "ParakeetForCTC",
            "kind": "ctc",
            "dtype": "float32",
            "total_parameters": 1_043_595,
            "trained_parameters": 73_728,
        },
        "method": {
            "kind": "lora",
            "rank": 8,
            "alpha": 16.0,
            "dropout": 0.0,
            "targets": None,
            "layers": "all",
        },
        "training": {
            "batch_size": 100,
            "steps": STEPS,
            "optimizer": "adam",
            "learning_rate": 1e-3,
            "lr_schedule": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "spec_augment": False,
        },
        "steps": STEPS,
        "versions": {"dp-accounting": "0.6.0", "torch": "2.13.0", "python": "3.11"},
        "machine": {"device": "cuda (NVIDIA X100)", "os": "Linux 6.1"},
        "scoring": {"normalize": "basic", "restrict_to": None},
        "curve_start": None,
        "evaluation": {
            "before": evaluation,
            "after": {**evaluation, "wer": 0.21, "wer_ci": [0.18, 0.24], "cer": 0.13},
            "non_private": {**evaluation, "wer": 0.17, "wer_ci": [0.14, 0.2], "cer": 0.1},
        },
        "curve": [
            {"step": 3, "epsilon": 0.8, "wer": 0.33, "wer_lo": 0.3, "wer_hi": 0.35},
            {"step": 6, "epsilon": 1.0, "wer": 0.25, "wer_lo": 0.22, "wer_hi": 0.28},
        ],
        "seconds": 83.0,
        "date": "2026-01-02T03:04:05+00:00",
    }


def write_run(
    folder: Path, values: dict[str, Any] | None = None, *, steps: int = STEPS, sigma: float = SIGMA
) -> Path:
    """Write the folder of a run; its ledger counts `steps` steps of noise `sigma`."""
    values = values if values is not None else record()
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(values))
    private = folder / "not_private"
    private.mkdir()
    (private / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in HISTORY))
    if values["privacy"]["enabled"]:
        write_ledger(folder / "ledger.jsonl", steps, sigma)
    return folder


def write_ledger(
    path: Path,
    steps: int,
    sigma: float,
    *,
    sensitivity: float = 1.0000001,
    unit: str = "example",
    noisy_count: dict[str, float] | None = None,
) -> None:
    mechanism = {
        "sample_rate": RATE,
        "noise_multiplier": sigma,
        "dataset_size": SIZE,
        "max_batch_size": None,
    }
    settings = {
        "run": f"{steps:016x}",
        "unit": unit,
        "dataset_size": SIZE,
        "adjacency": f"add or remove one {unit}",
        "sampling": "poisson",
        "mechanism": mechanism,
        "sensitivity": sensitivity,
    }
    if noisy_count is not None:
        settings |= {"clipping": "adaptive", "clipping_unit": "example", "max_examples_per_unit": 1}
        settings |= {"noisy_count": {"counts": 1, **noisy_count}}
    ledger = Ledger(path, settings)
    for _ in range(steps):
        ledger.spend_step()
    ledger.close()
