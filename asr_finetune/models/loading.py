"""Recognisers: loading them from a folder or the hub.

Its kind, which `kinds.py` reads from its configuration, loads the rest. The base class is in `recognizer.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import transformers

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.files import MissingFile
from asr_finetune.models.alphabets import ALPHABET_FILE
from asr_finetune.models.checkpoint import NoSuchModel, cached_hub_answers, read
from asr_finetune.models.checkpoint_fit import check_adapter
from asr_finetune.models.ctc import CTCRecognizer
from asr_finetune.models.kinds import kind_of
from asr_finetune.models.quiet import PEFT_ASKS_BY_AN_OLD_NAME, quiet_transformers, without_warnings
from asr_finetune.models.recognizer import SETTINGS, Recognizer
from asr_finetune.models.tiny import tiny_parakeet, tiny_transducer
from asr_finetune.models.transducer import TransducerRecognizer
from asr_finetune.models.whisper import WhisperRecognizer
from dpkernels.precision import DTYPES

__all__ = [
    "CTCRecognizer",
    "Recognizer",
    "TransducerRecognizer",
    "WhisperRecognizer",
    "load_recognizer",
    "load_with_adapter",
    "tiny_parakeet",
    "tiny_transducer",
]

_ADAPTER = "adapter_config.json"


def load_recognizer(config: ModelConfig) -> Recognizer:
    """The recogniser of a checkpoint (folder or hub id), or of a PEFT adapter's folder.

    Raises:
        ConfigError: the checkpoint does not exist, the hub cannot be reached, the model type is not supported, or an
            option does not fit it; the message names the option and the fix.
    """
    quiet_transformers()
    cached_hub_answers.cache_clear()  # one request for each load, since the hub may be reachable the next time
    if (Path(config.name) / _ADAPTER).is_file():
        return _adapter_and_its_base(config)
    architecture = read(transformers.AutoConfig, config)
    settings = Path(config.name) / SETTINGS
    options = {"name": config.name, "revision": config.revision, "dtype": DTYPES[config.dtype]}
    if settings.is_file():
        saved = json.loads(settings.read_text(encoding="utf-8"))
        options["target_prefix"] = saved["target_prefix"]
    return kind_of(config.name, architecture).load(config, architecture, options)


def load_with_adapter(config: ModelConfig, folder: Path) -> Recognizer:
    """The base model that `config` names, loaded as for training, with the PEFT adapter in `folder`.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ConfigError: see `load_recognizer`.
    """
    if not (folder / _ADAPTER).is_file():
        raise MissingFile(f"--adapter {folder}: no {_ADAPTER} there; give a run's adapter folder")
    settings = folder / SETTINGS
    saved = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    config = _as_saved(config, saved, "window_seconds", "language", "task", "target_lang")
    if "new_head" in saved:
        # Settings without a vocabulary are of versions in which a new layer always had characters.
        default = "characters" if saved["new_head"] else "keep"
        config = replace(config, new_head=saved["new_head"], vocabulary=saved.get("vocabulary", default))
        alphabet = folder / ALPHABET_FILE
        config = replace(config, alphabet=str(alphabet) if alphabet.is_file() else None)
    recognizer = load_recognizer(config)
    recognizer.target_prefix = saved.get("target_prefix", recognizer.target_prefix)
    try:
        with without_warnings(PEFT_ASKS_BY_AN_OLD_NAME):
            recognizer.model = peft.PeftModel.from_pretrained(recognizer.model, folder)
    except (RuntimeError, ValueError) as error:  # the adapter's shapes or layers are those of another model
        raise ConfigError(
            f"--adapter {folder} does not fit model.name={config.name!r}: give the base model that it was trained on; "
            f"PEFT says: {(str(error).strip().splitlines() or [type(error).__name__])[-1].strip()}"
        ) from error
    check_adapter(recognizer.model, folder)
    return recognizer


def _as_saved(config: ModelConfig, saved: dict[str, Any], *names: str) -> ModelConfig:
    """The configuration with saved settings in place of its nulls."""
    values: dict[str, Any] = {name: saved.get(name) for name in names if getattr(config, name) is None}
    return replace(config, **values)


def _adapter_and_its_base(config: ModelConfig) -> Recognizer:
    """The adapter in the folder that `config` names, on the base model that the adapter's configuration names."""
    folder = Path(config.name)
    base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not base:
        raise ConfigError(
            f"model.name={config.name!r} is an adapter whose base model was never saved, so it cannot be "
            "loaded alone; save the base model to a folder before training, and train from that folder"
        )
    try:
        recognizer = load_with_adapter(replace(config, name=base), folder)
    except NoSuchModel as error:
        raise NoSuchModel(
            f"{config.name} is an adapter on the base model {base!r}, which cannot be loaded; if it was "
            f"moved, evaluate with --model BASE --adapter {config.name}. {error}"
        ) from error
    recognizer.name = config.name
    return recognizer
