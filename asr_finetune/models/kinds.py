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
from asr_finetune.models.seq2seq import load_seq2seq
from asr_finetune.models.transducer import load_transducer
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


_SEQ2SEQ = auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
KINDS = (
    Kind("ctc", auto.MODEL_FOR_CTC_MAPPING_NAMES, load_ctc),
    Kind("seq2seq", {"whisper": _SEQ2SEQ["whisper"]}, load_whisper),
    Kind("seq2seq", {key: _SEQ2SEQ[key] for key in _SEQ2SEQ if key != "whisper"}, load_seq2seq),
    Kind(
        "transducer",
        {**auto.MODEL_FOR_RNNT_MAPPING_NAMES, **auto.MODEL_FOR_TDT_MAPPING_NAMES},
        load_transducer,
    ),
)
# Why a listed model type is refused, and what to use. Three reasons are common: a speech encoder feeds a language
# model, the decoder begins with several tokens of its processor's, the model is no recogniser.
_CHAT = "its transcript follows a chat prompt that holds the audio, in one decoder; use Whisper, or a CTC model type"
_PROMPT = (
    "its decoder begins with a prompt that only its own processor writes; use Whisper, or a CTC model type"
)
_OTHER = "it makes speech or music, not transcripts; use Whisper, or a CTC model type"
EXCEPTIONS: dict[str, str] = {
    **dict.fromkeys(
        ("fun_asr_nano", "granite_speech", "granite_speech_plus", "kyutai_speech_to_text"), _CHAT
    ),
    **dict.fromkeys(("omniasr", "qwen3_asr", "vibevoice_asr", "voxtral", "voxtral_realtime"), _CHAT),
    **dict.fromkeys(("canary", "cohere_asr", "seamless_m4t", "seamless_m4t_v2"), _PROMPT),
    **dict.fromkeys(("dia", "pop2piano", "vibevoice"), _OTHER),
    "moonshine_streaming": "its encoder reads audio in windows whose lengths it does not state; use moonshine",
    "speecht5": "its decoder is shared with speech synthesis, behind prenets; use speech_to_text or Whisper",
}


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
