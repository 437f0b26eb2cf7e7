"""What a model says of itself: its output layer, output lengths, blank, and the processor of its type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from asr_finetune.config.values import ConfigError

HEADS = ("ctc_head", "lm_head", "proj_out")
_LENGTHS = ("_get_subsampling_output_length", "_get_feat_extract_output_lengths")


def head_name(model: Any) -> str:
    """The output layer's name."""
    head = next((getattr(model, name) for name in HEADS if hasattr(model, name)), None)
    head = head or model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def decoder_config(config: Any) -> Any:
    """The configuration of a sequence-to-sequence model's decoder: a part of the model's, or the whole."""
    return getattr(config, "decoder", None) or config


def token(model: Any, name: str) -> Any:
    """A special token of a sequence-to-sequence model, by the name of its key ("eos_token_id"); None if it is not set.

    It is looked up in the model's configuration, in its decoder's, and in the generation configuration.
    """
    for config in (model.config, decoder_config(model.config), model.generation_config):
        value = getattr(config, name, None)
        if isinstance(value, list):
            value = value[0]
        if value is not None:
            return int(value)
    return None


def blank_of(config: Any) -> Any:
    """The class of the CTC blank, `blank_token_id` where a configuration has one, else `pad_token_id`; or None."""
    return getattr(config, "blank_token_id", config.pad_token_id)


def set_blank(config: Any, blank: int) -> None:
    """Make a class the blank; see `blank_of`."""
    config.pad_token_id = blank
    if hasattr(config, "blank_token_id"):
        config.blank_token_id = blank


def output_lengths(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function of a transformers model from numbers of input frames [B] to numbers of output frames [B].

    It is the method of the model or, if that has none, of the first of its parts that has one. `examine.py` compares it
    with the outputs.

    Raises:
        ConfigError: neither the model nor a part has such a method.
    """
    for part in model.modules():
        for name in _LENGTHS:
            if hasattr(part, name):
                lengths: Callable[[Tensor], Tensor] = getattr(part, name)
                return lengths
    raise ConfigError(
        f"{type(model).__name__} does not say how many frames its output has (a method {' or '.join(_LENGTHS)}), so "
        "losses cannot be told from padding: use a model type that does"
    )


def attention(model_class: Any) -> str:
    """The attention implementation to load a model of a class with.

    Eager attention gives NaN on fully masked rows, which padding creates in some models; sdpa does not.
    """
    return "sdpa" if model_class._supports_sdpa else "eager"


def processor_class(model_type: str) -> Any:
    """transformers' processor for a model type; where it names none, that of Wav2Vec2, as for all raw waveforms."""
    return getattr(transformers, PROCESSOR_MAPPING_NAMES.get(model_type, "Wav2Vec2Processor"))
