"""The kinds of recognisers, and the rule by which a checkpoint belongs to one.

A checkpoint has the kind that lists its model type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.models.ctc import SUPPORTED, load_ctc
from asr_finetune.models.recognizer import KindName, Recognizer
from asr_finetune.models.whisper import load_whisper


@dataclass(frozen=True)
class Kind:
    """A kind of recognisers.

    Attributes:
        name: `Recognizer.kind` of its recognisers.
        model_types: those of transformers that have this kind.
        load: `(config, architecture, options)` -> the recogniser of a checkpoint. `architecture` is transformers'
            configuration of it, and `options` are further arguments of the recogniser. It raises `ConfigError` where an
            option does not fit.
    """

    name: KindName
    model_types: tuple[str, ...]
    load: Callable[[ModelConfig, Any, dict[str, Any]], Recognizer]


KINDS = (
    Kind("seq2seq", ("whisper",), load_whisper),
    Kind("ctc", SUPPORTED, load_ctc),
)


def kind_of(name: str, architecture: Any) -> Kind:
    """The kind of a checkpoint.

    Args:
        name: of the checkpoint, for the error.
        architecture: its configuration.

    Raises:
        ConfigError: it has none; the message has what is supported.
    """
    for kind in KINDS:
        if architecture.model_type in kind.model_types:
            return kind
    supported = ", ".join(model_type for kind in KINDS for model_type in kind.model_types)
    raise ConfigError(f"model.name={name!r} is a {architecture.model_type} model; supported: {supported}")
