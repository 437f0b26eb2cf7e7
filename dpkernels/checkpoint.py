"""Checkpoints of a private run, written atomically: trained parameters, optimizer, and the engine's state.

A checkpoint holds no key and no state of the noise or sampling generators, so that a resumed run draws no noise twice.
The privacy budget spent is in the ledger alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpkernels.errors import UserError
from dpkernels.files import write_atomically

FILE = "state.pt"
FORMAT = 1


class CheckpointError(UserError, ValueError):
    """The file is not a checkpoint, or not one of this run."""


@dataclass
class Checkpoint:
    """The state of a run after `step` steps.

    It holds no key and no state of the noise or sampling generators: a resumed run draws new keys from the OS.

    Attributes:
        step: logical steps applied.
        parameters: name -> tensor of the trained parameters (and of adapter factors frozen at random values).
        optimizer: the optimizer's state_dict.
        privacy: the engine's state (mechanism, steps in its ledger), or None without privacy.
        random: torch's generator states of a run without privacy; None with privacy, where dropout is secret.
        seconds: training time so far.
        curve: evaluations on public data so far, one dict each.
    """

    step: int
    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    privacy: dict[str, Any] | None
    random: dict[str, Any] | None
    seconds: float
    curve: list[dict[str, Any]]


def kept_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a checkpoint: the trained ones, and adapter factors frozen at random values (DP-RP)."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad or "lora_" in name}


def restore_parameters(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Copy saved values into the model.

    Raises:
        CheckpointError: the names or shapes differ.
    """
    current = kept_parameters(model)
    missing, unknown = sorted(current.keys() - saved.keys()), sorted(saved.keys() - current.keys())
    if missing or unknown:
        raise CheckpointError(
            f"checkpoint: it lacks {missing[:3]} and has {unknown[:3]}, which this model does not train: "
            "another model or method wrote it. Use another folder (--output)."
        )
    with torch.no_grad():
        for name, parameter in current.items():
            if parameter.shape != saved[name].shape:
                raise CheckpointError(
                    f"checkpoint: '{name}' has shape {tuple(saved[name].shape)}, but {tuple(parameter.shape)} in the "
                    "model. Use another folder (--output)."
                )
            parameter.copy_(saved[name])


def random_state() -> dict[str, Any]:
    """States of torch's generators, from which dropout draws."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Restore the states that `random_state` returned; those of GPUs only if the number of GPUs is the same."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint atomically: after a crash the folder holds this one or the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {name: value.detach().cpu() for name, value in checkpoint.parameters.items()}
    values = {**vars(checkpoint), "parameters": parameters, "format": FORMAT}
    write_atomically(folder / FILE, lambda file: torch.save(values, file))


def load(folder: Path) -> Checkpoint | None:
    """The folder's checkpoint, or None if there is none.

    Raises:
        CheckpointError: the file is not a checkpoint of this format.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    # weights_only: reading a checkpoint must not run code from it.
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        raise CheckpointError(
            f"checkpoint {path}: damaged, or not a checkpoint; use another folder (--output)"
        ) from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise CheckpointError(
            f"checkpoint {path}: not a checkpoint of format {FORMAT}; use another folder (--output)"
        )
    return Checkpoint(**values)
