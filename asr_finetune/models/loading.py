"""Recognisers: loading them from a folder or the hub.

The classes are in `recognizer.py` (the base class), `ctc.py` and `whisper.py`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.files import MissingFile
from asr_finetune.hub import hub_answers, unreachable
from asr_finetune.models.alphabets import ALPHABET_FILE, read_alphabet
from asr_finetune.models.checkpoint_fit import (
    check_adapter,
    check_blank,
    check_tokenizer,
    check_weights,
    classes_needed,
)
from asr_finetune.models.ctc import SUPPORTED, CTCRecognizer, ctc_tokenizer, tiny_parakeet
from asr_finetune.models.methods import head_name
from asr_finetune.models.recognizer import (
    PEFT_ASKS_BY_AN_OLD_NAME,
    SETTINGS,
    Recognizer,
    quiet_transformers,
    without_warnings,
)
from asr_finetune.models.whisper import START, WhisperRecognizer, trim_encoder
from dpkernels.precision import DTYPES, no_tf32

__all__ = [
    "CTCRecognizer",
    "Recognizer",
    "WhisperRecognizer",
    "load_recognizer",
    "load_with_adapter",
    "tiny_parakeet",
]

_ADAPTER = "adapter_config.json"
# `check_weights` judges weights that transformers did not find in the file, or found in another shape.
_LOAD = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}


class NoSuchModel(ConfigError):
    """A checkpoint does not exist, or cannot be read."""


def load_recognizer(config: ModelConfig) -> Recognizer:
    """The recogniser of a checkpoint (folder or hub id), or of a PEFT adapter's folder.

    Raises:
        ConfigError: the checkpoint does not exist, the hub cannot be reached, the model type is not supported, or an
            option does not fit it; the message names the option and the fix.
    """
    quiet_transformers()
    _hub_answers.cache_clear()  # one request for each load, since the hub may be reachable the next time
    if (Path(config.name) / _ADAPTER).is_file():
        return _adapter_and_its_base(config)
    architecture = _read(transformers.AutoConfig, config)
    settings = Path(config.name) / SETTINGS
    options = {"name": config.name, "revision": config.revision, "dtype": DTYPES[config.dtype]}
    if settings.is_file():
        saved = json.loads(settings.read_text(encoding="utf-8"))
        options["target_prefix"] = saved["target_prefix"]
    if architecture.model_type == "whisper":
        return _load_whisper(config, options)
    if architecture.model_type not in SUPPORTED:
        raise ConfigError(
            f"model.name={config.name!r} is a {architecture.model_type} model; supported: whisper, "
            f"{', '.join(SUPPORTED)}"
        )
    return _load_ctc(config, architecture, options)


def _load_whisper(config: ModelConfig, options: dict[str, Any]) -> Recognizer:
    if config.new_head or config.vocabulary != "keep" or config.alphabet is not None:
        raise ConfigError(
            "model.new_head, model.vocabulary and model.alphabet are for CTC models; Whisper's output layer is its "
            "token table: leave new_head false, vocabulary keep and alphabet null"
        )
    model, info = _read(transformers.WhisperForConditionalGeneration, config, **_LOAD)
    # transformers computes the sinusoids if the file lacks them.
    check_weights(
        config.name,
        model,
        info,
        head=head_name(model),
        new_head=False,
        constants="encoder.embed_positions.weight",
    )
    if config.window_seconds is not None:
        trim_encoder(model, config.window_seconds)
    processor = _read(transformers.WhisperProcessor, config)
    # Without its files transformers builds an empty tokenizer, and every transcript would be the end token alone.
    if processor.tokenizer.convert_tokens_to_ids(START) != model.config.decoder_start_token_id:
        raise ConfigError(
            f"model.name={config.name!r}: its tokenizer does not have the model's token {START}: add the "
            "checkpoint's tokenizer.json (or vocab.json and merges.txt)"
        )
    check_tokenizer(
        config.name,
        processor.tokenizer,
        model.config.vocab_size,
        fix="enlarge the token table (resize_token_embeddings) and save it",
    )
    return WhisperRecognizer(
        _placed(model, config), processor, language=config.language, task=config.task, **options
    )


def _load_ctc(config: ModelConfig, architecture: Any, options: dict[str, Any]) -> Recognizer:
    if config.window_seconds is not None:
        raise ConfigError(
            f"model.window_seconds={config.window_seconds:g} is for Whisper; a CTC model takes any length: "
            "leave it null"
        )
    if config.language is not None or config.task is not None:
        raise ConfigError(
            f"model.language={config.language}, model.task={config.task}: they are for Whisper; a CTC model writes "
            "what it was trained on: leave them null"
        )
    if config.vocabulary == "words":
        raise ConfigError(
            "model.vocabulary=words: the list of words must be public, and is not in the configuration; build the "
            "recogniser with asr_finetune.models.loading.tiny_parakeet(words), save it, and load that folder with "
            "vocabulary keep"
        )
    if config.new_head != (config.vocabulary in ("own", "characters")):
        raise ConfigError(
            f"model.new_head={config.new_head} with model.vocabulary={config.vocabulary}: a new output layer "
            "needs a vocabulary, and the old one must keep its own: set new_head true and vocabulary characters "
            "(or own, the checkpoint's), or neither"
        )
    if config.alphabet is not None and config.vocabulary != "characters":
        raise ConfigError(
            f"model.alphabet={config.alphabet!r} with model.vocabulary={config.vocabulary}: an alphabet is that of a "
            "new output layer: set new_head true and vocabulary characters, or leave it null"
        )
    processor = _ctc_processor(config, architecture)
    options |= {"new_head": config.new_head, "vocabulary": config.vocabulary}
    if config.new_head:
        _classes_of_a_new_head(config, architecture, processor.tokenizer)
    elif architecture.vocab_size is None:
        raise ConfigError(
            f"model.name={config.name!r}: its configuration names no vocabulary, so it has no output layer: set "
            "model.new_head=true and model.vocabulary=characters"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a public seed of the new layer's initialisation
        # Eager attention gives NaN on fully masked rows, which padding creates; sdpa does not.
        model, info = _read(
            transformers.AutoModelForCTC, config, config=architecture, attn_implementation="sdpa", **_LOAD
        )
        head = head_name(model)
        check_weights(config.name, model, info, head=head, new_head=config.new_head)
        if config.new_head:
            model.get_submodule(head).reset_parameters()
    check_tokenizer(config.name, processor.tokenizer, architecture.vocab_size)
    check_blank(config.name, processor.tokenizer, architecture.vocab_size, architecture.pad_token_id)
    return CTCRecognizer(_placed(model, config), processor, **options)


def _ctc_processor(config: ModelConfig, architecture: Any) -> Any:
    """The checkpoint's processor, or its feature extractor with a new tokenizer for characters."""
    if config.vocabulary != "characters":
        return _read(transformers.AutoProcessor, config)
    extractor = _read(transformers.AutoFeatureExtractor, config)
    tokenizer = ctc_tokenizer(read_alphabet(config.alphabet), "characters")
    return processor_class(architecture.model_type)(extractor, tokenizer)


def _classes_of_a_new_head(config: ModelConfig, architecture: Any, tokenizer: Any) -> None:
    """Set the tokenizer's classes and blank in the model's configuration, for a new output layer.

    The checkpoint's own are kept if its tokenizer fits them, so that plain transformers loads the base model unchanged.
    """
    needed = classes_needed(tokenizer)
    if config.vocabulary == "characters":
        architecture.vocab_size, architecture.pad_token_id = needed, tokenizer.pad_token_id
    elif architecture.vocab_size is None or architecture.vocab_size < needed:
        architecture.vocab_size = needed
        if architecture.pad_token_id is None:
            architecture.pad_token_id = tokenizer.pad_token_id


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
    config = _as_saved(config, saved, "window_seconds", "language", "task")
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


def _read(reader: Any, model: ModelConfig, **options: Any) -> Any:
    """`reader.from_pretrained` of the checkpoint; a failure is raised as NoSuchModel, with the fix."""
    folder = Path(model.name)
    if folder.is_dir():
        fault = f"the folder exists, but {reader.__name__} finds no usable checkpoint in it"
    elif _hub_answers(model.name, model.revision):
        fault = "there is no such folder, and the hub does not give it"
    else:
        # only earlier downloads are used, so that no request is retried
        options["local_files_only"] = True
        fault = f"there is no such folder, {unreachable()}, and no earlier download is complete"
    try:
        return reader.from_pretrained(model.name, revision=model.revision, **options)
    # TypeError: the tokenizer's files are missing; RuntimeError: the weights do not fit into the model
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise NoSuchModel(
            f"model.name={model.name!r}: {fault}. Give (--model, or model.name) a folder with config.json, "
            "model.safetensors and the processor's files, or a hub id (and model.revision) that this machine can "
            f"download; transformers says: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
        ) from error


_hub_answers = functools.cache(hub_answers)


def _placed(model: nn.Module, config: ModelConfig) -> nn.Module:
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


def processor_class(model_type: str) -> Any:
    """transformers' processor for a CTC model type."""
    names = {"parakeet_ctc": "ParakeetProcessor", "wav2vec2-bert": "Wav2Vec2BertProcessor"}
    return getattr(transformers, names.get(model_type, "Wav2Vec2Processor"))
