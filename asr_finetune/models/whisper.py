"""Whisper: languages and tasks, an encoder trimmed to a short window, and its cached outputs.

Whisper's encoder always computes its full window, 30 s by default. For short recordings `trim_encoder` cuts the window
(and the position table) to a few seconds, and the encoder's cost shrinks in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.data.utterance import Utterance
from asr_finetune.models.architecture import head_name
from asr_finetune.models.checkpoint import LOAD, placed, read
from asr_finetune.models.checkpoint_fit import check_tokenizer, check_weights, refuse_ctc_options
from asr_finetune.models.recognizer import to_device
from asr_finetune.models.seq2seq import Seq2SeqRecognizer
from dpkernels.precision import arithmetic

START = "<|startoftranscript|>"
FRAMES_PER_POSITION = 2  # conv2 has stride 2


class WhisperRecognizer(Seq2SeqRecognizer):
    """A Whisper model. Items hold input_features [T, F] of the whole window, or encoder_states [S, d] when
    cached.

    English-only models have neither language nor task (None). A multilingual model uses the given ones, else those of
    its generation configuration, else English and transcription. The decoder's prompt (start, language, task, no
    timestamps) is not learnt: losses and scores are those of the text and the end token.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        language: str | None = None,
        task: str | None = None,
        **options: Any,
    ) -> None:
        # " 5", not "5": Whisper was trained on texts with a space before the first word.
        super().__init__(model, processor, **{"target_prefix": " ", **options})
        generation = self.base.generation_config
        self.multilingual = bool(getattr(generation, "is_multilingual", False))
        self.language, self.task = self._spoken(language, task)

    def _spoken(self, language: str | None, task: str | None) -> tuple[str | None, str | None]:
        """The language's code and the task; None for an English-only model."""
        generation = self.base.generation_config
        if not self.multilingual:
            if language_code(language or "en") != "en" or task not in (None, "transcribe"):
                raise ConfigError(
                    f"model.language={language!r}, model.task={task!r}: {self.name} is English-only (its generation "
                    "configuration does not set is_multilingual): leave both null, or use a multilingual checkpoint"
                )
            return None, None
        language = language or getattr(generation, "language", None) or "en"
        task = task or getattr(generation, "task", None) or "transcribe"
        known, tasks = self._tokens("lang_to_id"), self._tokens("task_to_id")
        if f"<|{language_code(language)}|>" not in known:
            raise ConfigError(f"model.language={language!r}: {self.name} knows {', '.join(sorted(known))}")
        if task not in tasks:
            raise ConfigError(f"model.task={task!r}: {self.name} knows {', '.join(sorted(tasks))}")
        # They are saved with a full model, so that transformers' own generation uses them too.
        generation.language, generation.task = language_code(language), task
        return language_code(language), task

    def _tokens(self, key: str) -> set[str]:
        """The languages or tasks of the generation configuration whose tokens tokenizer and output layer have."""
        listed: dict[str, int] = getattr(self.base.generation_config, key, None) or {}
        ids = {name: self.tokenizer.convert_tokens_to_ids(f"<|{name.strip('<|>')}|>") for name in listed}
        return {name for name, id in listed.items() if ids[name] == id < self.classes}

    @cached_property
    def prompt(self) -> list[int]:
        """See Seq2SeqRecognizer; the start, language and task of a multilingual model, no timestamps."""
        generation = self.base.generation_config
        prompt = [int(self.base.config.decoder_start_token_id)]
        if self.multilingual:
            prompt += [
                int(generation.lang_to_id[f"<|{self.language}|>"]),
                int(generation.task_to_id[self.task]),
            ]
        # Plain text follows this token; old English-only checkpoints name it in the tokenizer only.
        no_timestamps = self.tokenizer.convert_tokens_to_ids("<|notimestamps|>")
        if no_timestamps is not None and no_timestamps != self.tokenizer.unk_token_id:
            prompt.append(int(no_timestamps))
        return prompt

    @property
    def window_seconds(self) -> float:
        """Seconds of audio that the encoder takes."""
        return self._window_samples / self.sampling_rate

    @property
    def _window_samples(self) -> int:
        positions = int(self.base.config.max_source_positions)
        return positions * FRAMES_PER_POSITION * int(self.feature_extractor.hop_length)

    @property
    def input_name(self) -> str:
        """See Recognizer."""
        return "input_features"

    def encode_audio(self, array: np.ndarray) -> dict[str, Tensor]:
        """See Recognizer; silence fills the window."""
        if len(array) > self._window_samples:
            raise ConfigError(self._too_long(len(array) / self.sampling_rate))
        features = self.feature_extractor(
            array,
            sampling_rate=self.sampling_rate,
            max_length=self._window_samples,
            padding="max_length",
            return_tensors="pt",
        )["input_features"][0]
        return {"input_features": features.T.contiguous()}

    def _inputs(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        name = "encoder_states" if "encoder_states" in items[0] else "input_features"
        return {name: torch.stack([item[name] for item in items])}

    def can_cache_states(self) -> bool:
        """True when nothing in the encoder is trained and none of it is random."""
        encoder = self.base.model.encoder
        dropout = max(float(encoder.dropout), float(self.base.config.attention_dropout))
        return (
            not any(parameter.requires_grad for parameter in encoder.parameters())
            and max(dropout, float(self.base.config.activation_dropout)) == 0.0
        )

    def cached_inputs(self, item: dict[str, Tensor]) -> dict[str, Tensor]:
        """The frozen encoder's output instead of the features: [S, d], in the model's dtype, on the CPU."""
        if not self.can_cache_states():
            return item
        kept = {key: value for key, value in item.items() if key != "input_features"}
        with torch.inference_mode(), arithmetic(self.dtype, self.device):
            states = self._encode(to_device({"input_features": item["input_features"][None]}, self.device))
        # A clone, since autograd refuses inference tensors.
        return {**kept, "encoder_states": states[0].cpu().clone()}

    def _encode(self, batch: dict[str, Any]) -> Tensor:
        """Encoder states [B, S, d]."""
        if "encoder_states" in batch:
            return self._cached(batch, self.model)
        states: Tensor = self.base.model.encoder(**self._arguments(self.model, batch)).last_hidden_state
        return states

    def _encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=self._encode(batch))}

    def _arguments(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        if "encoder_states" in batch:
            return {"encoder_outputs": BaseModelOutput(last_hidden_state=self._cached(batch, model))}
        features = batch["input_features"].transpose(1, 2)
        return {"input_features": features.to(next(model.parameters()).dtype)}

    def _seconds(self, batch: dict[str, Any]) -> float:
        return self.window_seconds

    def _cached(self, batch: dict[str, Any], model: nn.Module) -> Tensor:
        """Cached encoder states in the model's dtype, which may differ from the one they were cached in."""
        states: Tensor = batch["encoder_states"]
        return states.to(next(model.parameters()).dtype)

    def length(self, utterance: Utterance) -> int:
        """Encoder positions, the same for all, plus tokens."""
        return int(self.base.config.max_source_positions) + len(self.encode_text(utterance.text))

    def audio_problem(self, utterance: Utterance) -> str | None:
        """See Recognizer."""
        too_long = utterance.seconds * self.sampling_rate > self._window_samples
        return self._too_long(utterance.seconds) if too_long else None

    def _too_long(self, seconds: float) -> str:
        return (
            f"longer than the encoder's window: {seconds:.2f} s, the window has {self.window_seconds:g} s; "
            "raise model.window_seconds (30 at most)"
        )

    def _settings(self) -> dict[str, Any]:
        facts = {"window_seconds": self.window_seconds, "language": self.language, "task": self.task}
        return {**super()._settings(), **facts}

    def describe(self) -> dict[str, Any]:
        """See Recognizer; with the encoder's window, the language and the task."""
        facts = {"window_seconds": self.window_seconds, "language": self.language, "task": self.task}
        return {**super().describe(), **facts}


def language_code(language: str) -> str:
    """The code of a language, given by its code ("de"), its token (`"<|de|>"`) or its English name ("German")."""
    bare = language.strip().lower().removeprefix("<|").removesuffix("|>")
    return str(TO_LANGUAGE_CODE.get(bare, bare))


def trim_encoder(model: Any, seconds: float, hop_seconds: float = 0.01) -> None:
    """Cut a Whisper encoder's window to `seconds`, in place: its position table and
    `config.max_source_positions`.

    The window is rounded up to multiples of 20 ms. The configuration has the new window, so that the trimmed model
    can be reloaded.

    Raises:
        ConfigError: the window is not above 0, or is longer than the model's.
    """
    positions = math.ceil(round(seconds / (hop_seconds * FRAMES_PER_POSITION), 6))
    encoder = model.model.encoder
    table = encoder.embed_positions
    if not 0 < positions <= table.num_embeddings:
        longest = table.num_embeddings * hop_seconds * FRAMES_PER_POSITION
        raise ConfigError(f"model.window_seconds={seconds:g}: expected more than 0 and at most {longest:g} s")
    kept = nn.Embedding.from_pretrained(table.weight.detach()[:positions].clone(), freeze=True)
    encoder.embed_positions = kept
    encoder.max_source_positions = positions
    model.model.decoder.max_source_positions = positions
    for config in (model.config, encoder.config, model.model.decoder.config):
        config.max_source_positions = positions


def load_whisper(config: ModelConfig, architecture: Any, options: dict[str, Any]) -> WhisperRecognizer:
    """The recogniser of a Whisper checkpoint; see `asr_finetune.models.kinds.Kind.load`."""
    refuse_ctc_options(config)
    model, info = read(transformers.WhisperForConditionalGeneration, config, **LOAD)
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
    processor = read(transformers.WhisperProcessor, config)
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
        placed(model, config), processor, language=config.language, task=config.task, **options
    )
