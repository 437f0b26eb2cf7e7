"""What a model says of itself: its output layer, output lengths, blank, and the processor of its type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from asr_finetune.config.values import ConfigError

HEADS = ("ctc_head", "lm_head", "proj_out")
_LENGTHS = ("_get_subsampling_output_length", "_get_feat_extract_output_lengths")


def head_name(model: nn.Module) -> str:
    """The output layer's name."""
    return next(name for name in HEADS if hasattr(model, name))


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


def attention(config: Any, classes: Mapping[str, str]) -> str:
    """The attention implementation to load a model with, whose class is in a mapping from model type to name.

    Eager attention gives NaN on fully masked rows, which padding creates in some models; sdpa does not.
    """
    model_class = getattr(transformers, classes[config.model_type])
    return "sdpa" if model_class._supports_sdpa else "eager"


def processor_class(model_type: str) -> Any:
    """transformers' processor for a model type; where it names none, that of Wav2Vec2, as for all raw waveforms."""
    return getattr(transformers, PROCESSOR_MAPPING_NAMES.get(model_type, "Wav2Vec2Processor"))
