"""Checkpoints and other files that are either the old or the new version, never half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

FILE = "state.pt"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that does not belong to this run, or is not one."""


@dataclass
class Checkpoint:
    """The state of a run after `step` steps.

    No key and no state of the noise or sampling generators is in it: a resumed run draws new ones from the OS.

    Attributes:
        step: logical steps applied.
        parameters: name -> tensor of what is trained (and of adapter parts frozen at random values).
        optimizer: the optimizer's state_dict.
        privacy: the engine's state (mechanism, where its ledger stood), or None without privacy.
        random: torch's generator states, of a run without privacy; None with it, where dropout is secret.
        seconds: training time so far.
        curve: evaluations on public data so far.
    """

    step: int
    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    privacy: dict[str, Any] | None
    random: dict[str, Any] | None
    seconds: float
    curve: list[dict[str, Any]]


def kept_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a checkpoint keeps: what is trained, and adapter factors frozen at random values (DP-RP)."""
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
            f"checkpoint: it lacks {missing[:3]} and has {unknown[:3]}, which this model does not train; "
            "it was written by another model or method. Use another --output."
        )
    with torch.no_grad():
        for name, parameter in current.items():
            if parameter.shape != saved[name].shape:
                raise CheckpointError(
                    f"checkpoint: {name} has shape {tuple(saved[name].shape)}, the model's is "
                    f"{tuple(parameter.shape)}"
                )
            parameter.copy_(saved[name])


def random_state() -> dict[str, Any]:
    """States of torch's generators: what dropout draws from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned; a GPU's part is left out where their number changed."""
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
    """The folder's checkpoint, or None where there is none.

    Raises:
        CheckpointError: a file that is not a checkpoint of this format.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    # weights_only: a checkpoint is data, and must not be able to run code.
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        raise CheckpointError(
            f"checkpoint {path}: damaged, or not a checkpoint; use another --output"
        ) from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise CheckpointError(f"checkpoint {path}: not a checkpoint of format {FORMAT}; use another --output")
    return Checkpoint(**values)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file through a temporary neighbour: fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically. Raises ValueError for NaN and infinities, which JSON has not."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Make names in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
