"""Sequence-to-sequence recognisers: mean token loss per utterance, greedy or restricted decoding.

The decoder reads a prompt, and then the labels shifted by one place. The prompt is the model's start token, and the
checkpoint's forced first token if it has one. It is not learnt: losses and scores are those of the text and the end
token.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.models.auto import modeling_auto as auto

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.data.utterance import Utterance
from asr_finetune.models.architecture import attention, decoder_config, head_name, token
from asr_finetune.models.checkpoint import LOAD, placed, read
from asr_finetune.models.checkpoint_fit import (
    check_tokenizer,
    check_weights,
    refuse_ctc_options,
    refuse_whisper_options,
)
from asr_finetune.models.examine import examine
from asr_finetune.models.quiet import without_warnings
from asr_finetune.models.recognizer import KindName, Recognizer
from dpkernels.losses import IGNORED, cross_entropy_per_example

# Speech has about 6 tokens a second at most; a greedy decoder that repeats itself would run to its last position. In
# Whisper, a window much shorter than those of pretraining causes such repetition before fine-tuning.
TOKENS_PER_SECOND, TOKENS_LEAST = 8, 8
# Whisper's encoder has no mask, since its window is always full; and `_generation` sets the limit that is to count.
_OF_GENERATION = ("The attention mask is not set", "`max_new_tokens` (")
_NO_CLASS = -1  # a label that no output layer has
_POSITIONS = ("max_target_positions", "max_position_embeddings", "n_positions")


class Seq2SeqRecognizer(Recognizer):
    """An encoder-decoder; items hold input_features [T, F] or input_values [n]."""

    kind: ClassVar[KindName] = "seq2seq"

    def __init__(self, model: nn.Module, processor: Any, **options: Any) -> None:
        super().__init__(model, processor, **options)
        self.end = int(token(self.base, "eos_token_id"))
        self._added = frozenset(self.tokenizer.get_added_vocab().values())

    @cached_property
    def prompt(self) -> list[int]:
        """The tokens that the decoder reads before the text."""
        start, forced = token(self.base, "decoder_start_token_id"), token(self.base, "forced_bos_token_id")
        return [int(start)] if forced is None else [int(start), int(forced)]

    @property
    def classes(self) -> int:
        """See Recognizer; those of the decoder."""
        return int(decoder_config(self.base.config).vocab_size)

    @property
    def _most_labels(self) -> int:
        """As many as the decoder has positions for."""
        config = decoder_config(self.base.config)
        positions = [getattr(config, name, None) for name in _POSITIONS]
        return next((int(most) - len(self.prompt) + 1 for most in positions if most), sys.maxsize)

    def encode_text(self, text: str) -> Tensor:
        """See Recognizer; the text's tokens and the end token, without the decoder's prompt."""
        return torch.tensor([*self.token_ids(text), self.end], dtype=torch.int64)

    def label_problem(self, labels: Tensor) -> str | None:
        """See Recognizer; tokens that a text cannot contain (languages, times, an early end) are not labels."""
        special = [token for token in labels[:-1].tolist() if token in self._added]
        if special:
            return f"a special token as a label: {self.tokenizer.convert_ids_to_tokens(special)}"
        return super().label_problem(labels)

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """See Recognizer; the encoder's."""
        states = self._encoded(batch)["encoder_outputs"].last_hidden_state
        # One by one, since not every model's function of lengths takes several.
        lengths = [int(self.frames(length)) for length in batch["attention_mask"].sum(dim=1).cpu()]
        return states, torch.tensor(lengths)

    def _arguments(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """The model's arguments for the audio of a batch."""
        return self.inputs.arguments(batch, next(model.parameters()).dtype)

    def _encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The model's arguments for the audio of a batch, encoded."""
        arguments = self._arguments(self.model, batch)
        return {
            "encoder_outputs": self.base.get_encoder()(**arguments),
            "attention_mask": batch["attention_mask"],
        }

    def _losses(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Mean −ln p over an utterance's tokens and its end; see `dpkernels.losses.cross_entropy_per_example`."""
        decoder, labels = self._teacher_forcing(batch["labels"])
        logits = model(**self._arguments(model, batch), decoder_input_ids=decoder, use_cache=False).logits
        return cross_entropy_per_example(logits, labels)

    def _teacher_forcing(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels [B, L] -> (decoder_input_ids, labels), both [B, P−1+L] with a prompt of P tokens.

        L is cut to the decoder's positions. All labels of an utterance with more labels are replaced by one that is no
        class, so that its loss is infinite and its gradient 0.
        """
        prompt = labels.new_tensor(self.prompt).expand(len(labels), -1)
        cut = (labels[:, self._most_labels :] != IGNORED).any(dim=1, keepdim=True)
        labels = labels[:, : self._most_labels].masked_fill(cut, _NO_CLASS)
        # No learnt position reads padding, or a label that is no class.
        known = (labels[:, :-1] >= 0) & (labels[:, :-1] < self.classes)
        previous = labels[:, :-1].masked_fill(~known, self.end)
        unlearnt = labels.new_full((len(labels), len(self.prompt) - 1), IGNORED)
        return torch.cat([prompt, previous], dim=1), torch.cat([unlearnt, labels], dim=1)

    def _seconds(self, batch: dict[str, Any]) -> float:
        """Seconds of audio that a batch has room for."""
        return self.inputs.samples(batch["attention_mask"].shape[1]) / self.sampling_rate

    def _decode(self, batch: dict[str, Any]) -> list[str]:
        encoded = self._encoded(batch)
        size = len(encoded["encoder_outputs"].last_hidden_state)
        prompt = torch.tensor(self.prompt, device=self.device).expand(size, -1)
        # The plain greedy loop: a model's own generate(), as Whisper's, may be for long recordings with timestamps.
        with without_warnings(*_OF_GENERATION):
            ids = GenerationMixin.generate(
                self.base,
                **encoded,
                decoder_input_ids=prompt,
                decoder_attention_mask=torch.ones_like(prompt),
                generation_config=self._generation(self._seconds(batch)),
            )
        texts = self.tokenizer.batch_decode(ids[:, len(self.prompt) :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _generation(self, seconds: float) -> GenerationConfig:
        """Greedy decoding without the symbols that the checkpoint suppresses, limited by the length of the audio."""
        checkpoint = self.base.generation_config
        return GenerationConfig(
            max_new_tokens=min(self._most_labels - 1, TOKENS_LEAST + math.ceil(TOKENS_PER_SECOND * seconds)),
            num_beams=1,
            do_sample=False,
            suppress_tokens=checkpoint.suppress_tokens,
            begin_suppress_tokens=checkpoint.begin_suppress_tokens,
            decoder_start_token_id=self.prompt[0],
            eos_token_id=self.end,
            pad_token_id=self.end,
        )

    def _scores(self, batch: dict[str, Any], texts: Sequence[str]) -> Tensor:
        encoded = self._encoded(batch)
        size = len(encoded["encoder_outputs"].last_hidden_state)
        columns = []
        for text in texts:
            labels = self.encode_text(self.target_prefix + text).to(self.device).expand(size, -1)
            decoder, learnt = self._teacher_forcing(labels)
            logits = self.base(**encoded, decoder_input_ids=decoder, use_cache=False).logits
            columns.append(-cross_entropy_per_example(logits, learnt, reduction="sum"))
        return torch.stack(columns, dim=1)

    def length(self, utterance: Utterance) -> int:
        """See Recognizer."""
        return self.output_frames(utterance) + len(self.encode_text(utterance.text))

    def text_problem(self, utterance: Utterance) -> str | None:
        """See Recognizer."""
        labels = self.encode_text(self.target_prefix + utterance.text)
        if len(labels) > self._most_labels:
            return f"too many tokens: {len(labels)}, the decoder takes {self._most_labels} at most"
        return self.label_problem(labels) or self.unknown_words(utterance.text)


def load_seq2seq(config: ModelConfig, architecture: Any, options: dict[str, Any]) -> Seq2SeqRecognizer:
    """The recogniser of a checkpoint; see `asr_finetune.models.kinds.Kind.load`."""
    refuse_ctc_options(config)
    refuse_whisper_options(config, architecture.model_type)
    model_class = getattr(
        transformers, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES[architecture.model_type]
    )
    model, info = read(model_class, config, attn_implementation=attention(model_class), **LOAD)
    check_weights(config.name, model, info, head=head_name(model), new_head=False)
    for name in ("decoder_start_token_id", "eos_token_id"):
        if token(model, name) is None:
            raise ConfigError(
                f"model.name={config.name!r}: its configuration does not set {name}, without which no text begins or "
                "ends: set it in config.json"
            )
    processor = read(transformers.AutoProcessor, config)
    check_tokenizer(
        config.name,
        processor.tokenizer,
        decoder_config(model.config).vocab_size,
        fix="enlarge the token table (resize_token_embeddings) and save it",
    )
    recognizer = Seq2SeqRecognizer(placed(model, config), processor, **options)
    examine(recognizer)
    return recognizer
