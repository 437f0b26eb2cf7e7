"""Reading of a checkpoint's parts, from a folder or the hub."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.hub import hub_answers, unreachable
from dpkernels.precision import no_tf32

# `check_weights` judges weights that transformers did not find in the file, or found in another shape.
LOAD = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
cached_hub_answers = functools.cache(hub_answers)


class NoSuchModel(ConfigError):
    """A checkpoint does not exist, or cannot be read."""


def read(reader: Any, model: ModelConfig, **options: Any) -> Any:
    """`reader.from_pretrained` of the checkpoint; a failure is raised as NoSuchModel, with the fix."""
    folder = Path(model.name)
    if folder.is_dir():
        fault = f"the folder exists, but {reader.__name__} finds no usable checkpoint in it"
    elif cached_hub_answers(model.name, model.revision):
        fault = "there is no such folder, and the hub does not give it"
    else:
        # only earlier downloads are used, so that no request is retried
        options["local_files_only"] = True
        fault = f"there is no such folder, {unreachable()}, and no earlier download is complete"
    try:
        return reader.from_pretrained(model.name, revision=model.revision, **options)
    # TypeError: the tokenizer's files are missing; RuntimeError: the weights do not fit into the model; ImportError: a
    # feature extractor or a tokenizer needs a library (torchaudio, sentencepiece) that is not installed
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        raise NoSuchModel(
            f"model.name={model.name!r}: {fault}. Give (--model, or model.name) a folder with config.json, "
            "model.safetensors and the processor's files, or a hub id (and model.revision) that this machine can "
            f"download; transformers says: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
        ) from error


def placed(model: nn.Module, config: ModelConfig) -> nn.Module:
    """The model in evaluation mode on the device that `config.device` names, with TF32 switched off.

    Raises:
        ConfigError: there is no such device.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:  # torch raises it for an unknown device type
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"model.device={name!r}: expected auto, cpu, cuda, or cuda:1 and so on")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
        raise ConfigError(f"model.device={name!r}: torch sees {seen} here; use auto or cpu")
    no_tf32()
    return model.to(device).eval()
