"""The kinds of recognisers, and the rule by which a checkpoint belongs to one.

A checkpoint has the kind whose auto classes of transformers list its model type. Its recogniser reads what else it
needs from the checkpoint's configuration (`architecture.py`), and is measured once it is loaded (`examine.py`).
`EXCEPTIONS` are listed model types that are refused, each with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.models.auto import modeling_auto as auto

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.models.ctc import load_ctc
from asr_finetune.models.recognizer import KindName, Recognizer
from asr_finetune.models.whisper import load_whisper


@dataclass(frozen=True)
class Kind:
    """A kind of recognisers.

    Attributes:
        name: `Recognizer.kind` of its recognisers.
        listed: the model types of transformers that have this kind, exceptions included.
        load: `(config, architecture, options)` -> the recogniser of a checkpoint. `architecture` is transformers'
            configuration of it, and `options` are further arguments of the recogniser. It raises `ConfigError` where an
            option does not fit.
    """

    name: KindName
    listed: Mapping[str, Any]
    load: Callable[[ModelConfig, Any, dict[str, Any]], Recognizer]

    def model_types(self) -> list[str]:
        """The model types that are supported."""
        return sorted(self.listed.keys() - EXCEPTIONS.keys())


KINDS = (
    Kind("ctc", auto.MODEL_FOR_CTC_MAPPING_NAMES, load_ctc),
    Kind("seq2seq", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, load_whisper),
)
# Model type -> why it is refused, and what to use.
EXCEPTIONS = dict.fromkeys(auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.keys() - {"whisper"}, "not yet")


def kind_of(name: str, architecture: Any) -> Kind:
    """The kind of a checkpoint.

    Args:
        name: of the checkpoint, for the error.
        architecture: its configuration.

    Raises:
        ConfigError: it has none, or its model type is an exception; the message has the reason and what is supported.
    """
    model_type = architecture.model_type
    for kind in KINDS:
        if model_type in kind.model_types():
            return kind
    reason = EXCEPTIONS.get(model_type, "transformers lists it as no speech recogniser of a supported kind")
    supported = "; ".join(f"{kind.name}: {', '.join(kind.model_types())}" for kind in KINDS)
    raise ConfigError(f"model.name={name!r} is a {model_type} model: {reason}. Supported are {supported}")
