"""Checks of a checkpoint before use: its weights are complete, and its tokenizer fits the output layer.

transformers and PEFT initialise weights that a file lacks at random, with a warning. Such a weight would be used for
every utterance and, if it is frozen, never saved, so that two loads would give two models. A tokenizer with more tokens
than the output layer has classes gives labels without a class. This module refuses both, and names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.models.architecture import blank_of

_SHOWN = 3
# Never used here, since the model's own masks and its batch norms' training mode are switched off.
_UNUSED = ("masked_spec_embed", "num_batches_tracked")
_STATISTICS = ("running_mean", "running_var")
_NEW_HEAD = (
    "set model.new_head=true and model.vocabulary=own (its tokenizer's tokens) or characters: the new output layer is "
    "then trained along with any method, and saved"
)


def refuse_ctc_options(config: ModelConfig) -> None:
    """Check that no option is given which is for a CTC model.

    Raises:
        ConfigError: one is.
    """
    if config.new_head or config.vocabulary != "keep" or config.alphabet is not None:
        raise ConfigError(
            "model.new_head, model.vocabulary and model.alphabet are for CTC models; the output layer of a "
            "sequence-to-sequence model (Whisper) is its token table: leave new_head false, vocabulary keep and "
            "alphabet null"
        )
    if config.target_lang is not None:
        raise ConfigError(
            f"model.target_lang={config.target_lang!r} is for CTC models with an adapter for each language (MMS); "
            "Whisper's language is model.language: leave it null"
        )


def refuse_whisper_options(config: ModelConfig, model: str) -> None:
    """Check that no option is given which is for Whisper.

    Args:
        config: the options.
        model: what the model is instead, for the message.

    Raises:
        ConfigError: one is.
    """
    if config.window_seconds is not None:
        raise ConfigError(
            f"model.window_seconds={config.window_seconds:g} is for Whisper; a {model} model takes any length: "
            "leave it null"
        )
    if config.language is not None or config.task is not None:
        raise ConfigError(
            f"model.language={config.language}, model.task={config.task}: they are for Whisper; a {model} model writes "
            "what it was trained on: leave them null"
        )


def check_weights(
    name: str,
    model: Any,
    info: Mapping[str, Any],
    *,
    head: str | tuple[str, ...],
    new_head: bool,
    constants: str = "",
) -> None:
    """Check that every weight that the model uses came from the checkpoint.

    Args:
        name: name of the checkpoint.
        model: the model as loaded by transformers.
        info: transformers' `output_loading_info`.
        head: name of the output layer, or the names of the parts that are new with it.
        new_head: whether the output layer is replaced by a new one.
        constants: ending of the name of a parameter that transformers computes if it is missing, or "".

    Raises:
        ConfigError: weights are missing, or have another shape than in the configuration.
    """
    parameters = {key for key, _ in model.named_parameters()}
    heads = (head,) if isinstance(head, str) else head
    of_head = tuple(f"{part}." for part in heads)

    def matters(key: str) -> bool:
        # Buffers other than statistics are constants that the model's constructor computes.
        kept = key in parameters or key.endswith(_STATISTICS)
        return kept and not key.endswith(_UNUSED) and not (new_head and key.startswith(of_head))

    missing = {key for key in info["missing_keys"] if matters(key)}
    missing = {key for key in missing if not (constants and key.endswith(constants))}
    shapes = {
        key: (tuple(stored), tuple(wanted)) for key, stored, wanted in info["mismatched_keys"] if matters(key)
    }
    faults = []
    if missing:
        faults.append(f"it has no weights for {_some(missing)}")
    if shapes:
        first = min(shapes)
        faults.append(
            f"{_some(shapes)} has the shape {list(shapes[first][0])} where its configuration wants "
            f"{list(shapes[first][1])}"
        )
    if not faults:
        return
    of_the_head = all(key.startswith(of_head) for key in missing | shapes.keys())
    renewable = of_the_head and (len(heads) > 1 or not model.config.is_encoder_decoder)
    fix = _NEW_HEAD if renewable else "give a complete checkpoint of this architecture"
    raise ConfigError(
        f"model.name={name!r}: {' and '.join(faults)}; transformers would initialise them at random: {fix}"
    )


def classes_needed(tokenizer: Any) -> int:
    """The smallest number of classes that includes every token that a text can contain.

    The tokens that begin and end a sentence occur in no label here, so they need no class.
    """
    unlabelled = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    unlabelled -= {tokenizer.unk_token_id, tokenizer.pad_token_id, _delimiter(tokenizer)}
    return 1 + max(id for id in tokenizer.get_vocab().values() if id not in unlabelled)


def check_tokenizer(name: str, tokenizer: Any, classes: int, *, fix: str = _NEW_HEAD) -> None:
    """Check that every token that a text can contain has a class.

    Args:
        name: name of the checkpoint.
        tokenizer: its tokenizer.
        classes: number of classes of the output layer.
        fix: the fix in the error message.

    Raises:
        ConfigError: the tokenizer has tokens beyond the classes; the message names them.
    """
    needed = classes_needed(tokenizer)
    if needed > classes:
        beyond = [token for token, id in tokenizer.get_vocab().items() if classes <= id < needed]
        raise ConfigError(
            f"model.name={name!r}: its tokenizer has tokens up to {needed - 1}, but its output layer has {classes} "
            f"classes: none for {_some(map(repr, beyond))}; give the tokenizer that it was trained with, or {fix}"
        )


def check_blank(name: str, tokenizer: Any, config: Any) -> None:
    """Check that the CTC blank of a model's configuration is a class, and not a token of a text.

    Raises:
        ConfigError: it is not.
    """
    blank, classes = blank_of(config), config.vocab_size
    key = "blank_token_id" if hasattr(config, "blank_token_id") else "pad_token_id"
    start = f"model.name={name!r}: {key}={blank} in its config.json must be the CTC blank, but "
    if blank is None or not 0 <= blank < classes:
        raise ConfigError(
            f"{start}the output layer has the classes 0 to {classes - 1}: set it to the class of the blank"
        )
    # A text has no special token. The padding may be another one than the blank only where the two have two names.
    unspoken = {tokenizer.pad_token_id, *(tokenizer.all_special_ids if key == "blank_token_id" else ())}
    if blank not in unspoken and blank in tokenizer.get_vocab().values():
        raise ConfigError(
            f"{start}its tokenizer has {tokenizer.convert_ids_to_tokens(blank)!r} there and the padding "
            f"{tokenizer.pad_token!r} at {tokenizer.pad_token_id}: make them agree"
        )


def check_adapter(model: Any, folder: Path) -> None:
    """Check that the file of a loaded adapter has exactly the weights that PEFT added to the model.

    Raises:
        ConfigError: it does not; the message names the weights.
    """
    # PEFT would treat a new output layer as resized token embeddings, which a CTC model does not have.
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    stored = peft.load_peft_weights(str(folder), device="cpu").keys()
    missing, unknown = expected - stored, stored - expected
    if missing or unknown:
        faults = [f"lacks {_some(missing)}"] if missing else []
        faults += [f"has {_some(unknown)}, which the model has no place for"] if unknown else []
        raise ConfigError(
            f"adapter {folder}: its file {' and '.join(faults)}; PEFT would ignore the difference: give the complete "
            "adapter, and the base model that it was trained on"
        )


def _delimiter(tokenizer: Any) -> int | None:
    return getattr(tokenizer, "word_delimiter_token_id", None)


def _some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
