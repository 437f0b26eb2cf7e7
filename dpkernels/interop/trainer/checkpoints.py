"""The privacy of a Trainer's checkpoint: the steps that it has spent, and a check that its files are of one run."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from dpkernels.files import write_atomically
from dpkernels.interop.trainer.losses import TrainerError
from dpkernels.privacy import PrivacyEngine

STATE_FILE = "privacy_state.json"
"""A checkpoint's file with the engine's state (mechanism and steps of every run, no keys), and the weights' digest."""

logger = logging.getLogger("dpkernels")


def save_state(folder: str, model: nn.Module, spent: dict[str, Any], states: dict[str, Any]) -> None:
    """Write a checkpoint's optimizer, scheduler and spent budget.

    Args:
        folder: of the checkpoint.
        model: the model, whose weights Trainer has saved there.
        spent: the engine's state_dict.
        states: state_dicts of optimizer and scheduler by file name.
    """
    for name, state in states.items():
        torch.save(state, Path(folder) / name)
    content = {"engine": spent, "weights_sha256": digest_of(model)}
    text = json.dumps({**content, "sha256": _checksum(content)}, indent=2)
    write_atomically(Path(folder) / STATE_FILE, lambda file: file.write(text.encode()))


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _read_state(folder: str) -> dict[str, Any]:
    """The content of a checkpoint's STATE_FILE.

    Raises:
        TrainerError: it is not what was written: a changed digit could be a smaller ε.
    """
    try:
        state: dict[str, Any] = json.loads((Path(folder) / STATE_FILE).read_text(encoding="utf-8"))
        if state.pop("sha256") != _checksum(state):
            raise ValueError("its checksum is another")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TrainerError(
            f"resume_from_checkpoint={folder!r}: {STATE_FILE} is damaged ({error}), so what the run has spent is "
            "unknown. Resume from another checkpoint of the run"
        ) from error
    return state


def check_files(folder: str) -> None:
    """Raise TrainerError, by name, for files that a checkpoint lacks, and without which no private run continues."""
    needed = (OPTIMIZER_NAME, SCHEDULER_NAME, STATE_FILE)
    missing = [name for name in needed if not (Path(folder) / name).is_file()]
    if missing:
        raise TrainerError(
            f"resume_from_checkpoint={folder!r} lacks {missing}: the steps that it has spent would not count, or the "
            "optimizer would begin anew. Resume from a checkpoint that a private Trainer wrote with "
            "save_only_model=False"
        )


def load_spent(folder: str, model: nn.Module, engine: PrivacyEngine, trained: int) -> None:
    """Count what a checkpoint has spent.

    Args:
        folder: of the checkpoint, whose weights the model has.
        model: the model.
        engine: the run's.
        trained: steps that the weights have taken, by trainer_state.json.

    Raises:
        TrainerError: the checkpoint's files are damaged, or not of one run.
        LedgerError, ValueError: as `PrivacyEngine.load_state_dict`.
    """
    state = _read_state(folder)
    spent = state["engine"]
    engine.load_state_dict(spent)
    # the optimizer's file has a count, too, so this file is compared by itself
    outside = spent.get("unplanned", ())
    in_file = sum(run["steps"] for name, run in spent["runs"].items() if name not in outside)
    counted = engine.steps - engine.earlier_steps
    if min(counted, in_file) < trained or state["weights_sha256"] != digest_of(model):
        raise TrainerError(
            f"resume_from_checkpoint={folder!r}: its files are not of one run. {STATE_FILE} counts {in_file} "
            f"steps (with the ledger {counted}), trainer_state.json {trained}, and the weights must be those that were "
            "saved with them. Put back the files of one checkpoint, and train the same parameters as before"
        )
    if counted > trained:
        lost = counted - trained
        logger.warning(
            "%d steps were spent after checkpoint %s, or by earlier runs: they stay counted, and this run ends %d "
            "steps earlier than planned",
            lost,
            folder,
            lost,
        )


def digest_of(model: nn.Module) -> str:
    """A digest of the names and bits of the trained parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
