"""What a run has trained, written for use: the weights of its last checkpoint, and an adapter merged into its base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from asr_finetune.config.schema import Config, ConfigError, ModelConfig
from asr_finetune.files import write_json
from asr_finetune.models.loading import load_recognizer, load_with_adapter
from asr_finetune.models.methods import apply_method
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.training.card import write_card, write_merged_card
from asr_finetune.training.record import stopped_record
from asr_finetune.training.run_folder import (
    RunFolder,
    RunFolderError,
    saved_model,
    weights_folder,
    whole_folder,
)
from asr_finetune.training.setup import recognizer_of
from dpkernels import checkpoint


def export(
    run: Path | str, out: Path | str | None = None, say: Callable[[str], object] = lambda text: None
) -> Path:
    """Write the adapter (or model) of a run's last checkpoint, with its model card. Data and GPU are not needed.

    For a run that is not finished, its record is written to stopped.json, from which `asr-finetune report` makes the
    report. The run can be continued afterwards.

    Args:
        run: the output folder of `asr-finetune train`.
        say: is told if the last checkpoint is damaged, and the one before it is taken.
        out: the folder of the weights; None: where a finished run has them, RUN/adapter or RUN/model.

    Returns:
        The folder of the weights.

    Raises:
        RunFolderError: the folder holds no run, or no checkpoint was written yet.
        CheckpointError: the checkpoint is damaged, or of another model.
        WriteError: the weights cannot be written.
    """
    folder = RunFolder(Path(run))
    if not folder.config.is_file():
        raise RunFolderError(
            f"run={str(run)!r} has no config.yaml, so no run is there: give its --output folder"
        )
    config = folder.written_config()
    saved = checkpoint.load_usable(folder.checkpoint, say)
    if saved is None:
        raise RunFolderError(
            f"run={str(run)!r} has no checkpoint yet: continue it with asr-finetune train; train.checkpoint_every="
            f"{config.train.checkpoint_every} is the number of steps between two"
        )
    recognizer = _trained(config, saved)
    record = folder.read_json(folder.run)
    if record is None:
        record = stopped_record(folder, config, recognizer, saved)
        write_json(folder.stopped, record)
    target = Path(out) if out is not None else weights_folder(folder.path, config.method)
    with whole_folder(target) as weights:
        recognizer.save(weights)
        write_card(weights, record, folder.path.resolve().name)
    return target


def _trained(config: Config, saved: checkpoint.Checkpoint) -> Recognizer:
    """The run's recogniser with the checkpoint's weights, on the CPU."""
    recognizer = recognizer_of(config.with_values("model", device="cpu"))
    torch.manual_seed(config.train.seed)
    apply_method(recognizer, config.method)
    checkpoint.restore_parameters(recognizer.model, saved.parameters)
    return recognizer


def merge(adapter: Path | str, out: Path | str, base: str | None = None) -> Path:
    """Write an adapter merged into its base model, as a model that transformers loads without PEFT.

    Args:
        adapter: the adapter's folder, or its run's.
        out: the folder of the model; it must be free.
        base: folder or hub id of the base model; None: the one that the adapter names.

    Raises:
        ConfigError: there is no adapter, it does not fit the base model, or `out` is not free.
        WriteError: the model cannot be written.
    """
    source, target = saved_model(Path(adapter)), Path(out)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"--output {out}: the folder is not empty; give another one")
    if base is not None:
        recognizer: Any = load_with_adapter(ModelConfig(base, device="cpu"), source)
    else:
        recognizer = load_recognizer(ModelConfig(str(source), device="cpu"))
    if recognizer.model is recognizer.base:
        raise ConfigError(f"{adapter}: a whole model, not an adapter: there is nothing to merge")
    recognizer.model = recognizer.model.merge_and_unload()
    recognizer.new_head, recognizer.vocabulary = False, "keep"  # the merged model's output layer is its own
    with whole_folder(target) as weights:
        recognizer.save(weights)
        write_merged_card(weights, source, recognizer.describe())
    return target
