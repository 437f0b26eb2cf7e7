"""Checkpoints of a private run, written atomically: trained parameters, optimizer, and the engine's state.

A checkpoint holds no key and no state of the noise or sampling generators, so that a resumed run draws no noise twice.
The privacy budget spent is in the ledger alone.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpkernels.errors import UserError
from dpkernels.files import remove_leftovers, write_atomically, writing

FILE, PREVIOUS = "state.pt", "previous.pt"
FORMAT = 1
_PUT_BACK = (
    "Put back the model and method that wrote it. (Without the folder of its checkpoints a run starts its weights "
    "anew, and its ledger still counts the steps that were spent.)"
)


class CheckpointError(UserError, ValueError):
    """The file is not a checkpoint, or not one of this run."""


class DamagedCheckpoint(CheckpointError):
    """The file was cut, overwritten or never a checkpoint."""


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
            f"another model or method wrote it. {_PUT_BACK}"
        )
    with torch.no_grad():
        for name, parameter in current.items():
            if parameter.shape != saved[name].shape:
                raise CheckpointError(
                    f"checkpoint: '{name}' has shape {tuple(saved[name].shape)}, but {tuple(parameter.shape)} in the "
                    f"model. {_PUT_BACK}"
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
    """Write the checkpoint atomically, and keep the one before as `PREVIOUS`: after a crash one of them is whole.

    Raises:
        WriteError: it cannot be written; the last one is kept.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder / FILE)  # each takes as much of the disk as a checkpoint
    parameters = {name: value.detach().cpu() for name, value in checkpoint.parameters.items()}
    values = {**vars(checkpoint), "parameters": parameters}
    values |= {"format": FORMAT, "checksum": _checksum(values)}
    with writing(folder):
        if (folder / FILE).is_file():
            os.replace(folder / FILE, folder / PREVIOUS)
    write_atomically(folder / FILE, lambda file: torch.save(values, file))


def load(folder: Path) -> Checkpoint | None:
    """The folder's last checkpoint, or None if there is none.

    Raises:
        DamagedCheckpoint: the file cannot be read to its end; `load_usable` takes the one before.
        CheckpointError: another version wrote the file.
        OSError: the file may not be read.
    """
    files = [path for path in (folder / FILE, folder / PREVIOUS) if path.is_file()]
    return _read(files[0]) if files else None


def load_usable(folder: Path, say: Callable[[str], object]) -> Checkpoint | None:
    """The folder's last checkpoint that is not damaged, or None if there is none; the run's ledger is not touched.

    A damaged file is renamed to "damaged_*", so that no later checkpoint takes its place as the one before.

    Args:
        folder: of the checkpoints.
        say: is told of every damaged file, and what is used instead.

    Raises:
        CheckpointError, OSError: as `load`.
    """
    for name, instead in ((FILE, "the checkpoint before it is used"), (PREVIOUS, "the weights start anew")):
        path = folder / name
        if not path.is_file():
            continue
        try:
            return _read(path)
        except DamagedCheckpoint as error:
            kept = path.with_name(f"damaged_{name}")
            os.replace(path, kept)
            if name == FILE and not (folder / PREVIOUS).is_file():
                instead = "there is none before it, so the weights start anew"
            say(
                f"{error}: {instead}. Steps that are taken again count again (the damaged file is kept as {kept.name})"
            )
    return None


def _read(path: Path) -> Checkpoint:
    # weights_only: reading a checkpoint must not run code from it.
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything, also EINVAL where it is too short
        unreadable = isinstance(error, OSError) and error.errno != errno.EINVAL
        if unreadable or isinstance(error, MemoryError):  # no fault of the file
            raise
        raise DamagedCheckpoint(f"checkpoint {path} is damaged, or not a checkpoint") from error
    values = values if isinstance(values, dict) else {}
    version, checksum = values.pop("format", None), values.pop("checksum", None)
    if isinstance(version, int) and version != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {version}, this version reads {FORMAT}: continue with the version that "
            "wrote it"
        )
    whole = version is not None and set(values) == set(Checkpoint.__dataclass_fields__)
    # Checkpoints of before there were checksums have none.
    if not whole or (checksum is not None and checksum != _checksum(values)):
        raise DamagedCheckpoint(f"checkpoint {path} is damaged, or not a checkpoint")
    return Checkpoint(**values)


def _checksum(values: Mapping[str, Any]) -> int:
    """A checksum of a checkpoint's values, in the order of its fields.

    torch does not check the archive's own checksums, and returns memory that nobody wrote where a flag of an entry
    changed. Without a ledger the checkpoint alone says what was spent, so a changed digit could be a smaller ε.
    """
    return _continued(0, [values[name] for name in Checkpoint.__dataclass_fields__])


def _continued(checksum: int, value: Any) -> int:
    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu().contiguous()
        checksum = zlib.crc32(f"{dense.dtype} {tuple(dense.shape)}".encode(), checksum)
        return zlib.crc32(dense.flatten().view(torch.uint8).numpy().data, checksum)
    if not isinstance(value, Mapping | list | tuple):
        return zlib.crc32(repr(value).encode(), checksum)
    parts = [part for item in value.items() for part in item] if isinstance(value, Mapping) else value
    checksum = zlib.crc32(f"{type(value).__name__} {len(parts)}".encode(), checksum)
    for part in parts:
        checksum = _continued(checksum, part)
    return checksum
