"""CTC recognisers.

Any model type of transformers' `AutoModelForCTC` is one; `architecture.py` reads its blank and its output lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.data.utterance import Utterance
from asr_finetune.models.alphabets import WORD_DELIMITER, ctc_tokenizer, read_alphabet
from asr_finetune.models.architecture import (
    attention,
    blank_of,
    head_name,
    processor_class,
    set_blank,
)
from asr_finetune.models.checkpoint import LOAD, placed, read
from asr_finetune.models.checkpoint_fit import (
    check_blank,
    check_tokenizer,
    check_weights,
    classes_needed,
    refuse_whisper_options,
)
from asr_finetune.models.examine import examine
from asr_finetune.models.recognizer import KindName, Recognizer
from asr_finetune.models.target_lang import load_target_lang
from dpkernels.losses import IGNORED, ctc_loss_per_example


class CTCRecognizer(Recognizer):
    """A CTC model; items hold input_features [T, F], or input_values [n] for Wav2Vec2 and its Conformer."""

    kind: ClassVar[KindName] = "ctc"

    def __init__(
        self, model: nn.Module, processor: Any, *, target_lang: str | None = None, **options: Any
    ) -> None:
        super().__init__(model, processor, **options)
        self.blank = int(blank_of(self.base.config))
        self.target_lang = target_lang

    def encode_text(self, text: str) -> Tensor:
        """See Recognizer."""
        return torch.tensor(self.token_ids(text), dtype=torch.int64)

    def label_problem(self, labels: Tensor) -> str | None:
        """See Recognizer; the blank is not a label either."""
        if bool((labels == self.blank).any()):
            return f"the blank as a label: {self.tokenizer.convert_ids_to_tokens(self.blank)!r} in the transcript"
        return super().label_problem(labels)

    def logits(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(logits [B, T', V], frames of each utterance [B])."""
        logits = model(**self.inputs.arguments(batch, next(model.parameters()).dtype)).logits
        return logits, self.frames(batch["attention_mask"].sum(dim=1))

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """See Recognizer; the logits."""
        return self.logits(model, batch)

    def _losses(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """−ln p(y | x) in nats of each utterance; see `dpkernels.losses.ctc_loss_per_example`."""
        logits, lengths = self.logits(model, batch)
        losses = ctc_loss_per_example(logits, lengths, batch["labels"], self.blank)
        learnt = (batch["labels"] != IGNORED).any(dim=1)
        return torch.where(learnt, losses, torch.zeros_like(losses))

    def _decode(self, batch: dict[str, Any]) -> list[str]:
        logits, lengths = self.logits(self.model, batch)
        texts = []
        for row, length in zip(logits.argmax(dim=-1).cpu(), lengths.tolist(), strict=True):
            ids = torch.unique_consecutive(row[:length])
            kept = ids[ids != self.blank].tolist()
            texts.append(self.text_of(kept))
        return texts

    def text_of(self, labels: Sequence[int]) -> str:
        """The text of a path's labels, repeats collapsed and blanks removed."""
        # A second grouping would turn "hel<blank>lo" into "helo".
        text = self.tokenizer.decode(list(labels), group_tokens=False, skip_special_tokens=True)
        return str(text).strip()

    def _scores(self, batch: dict[str, Any], texts: Sequence[str]) -> Tensor:
        logits, lengths = self.logits(self.model, batch)
        columns = []
        for text in texts:
            labels = self.encode_text(self.target_prefix + text).to(logits.device).expand(len(logits), -1)
            columns.append(-ctc_loss_per_example(logits, lengths, labels, self.blank))
        return torch.stack(columns, dim=1)

    def length(self, utterance: Utterance) -> int:
        """See Recognizer."""
        return self.output_frames(utterance)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "target_lang": self.target_lang}

    def describe(self) -> dict[str, Any]:
        """See Recognizer; with the language whose adapter was loaded."""
        return {**super().describe(), "target_lang": self.target_lang}

    def text_problem(self, utterance: Utterance) -> str | None:
        """See Recognizer."""
        labels = self.encode_text(self.target_prefix + utterance.text)
        if len(labels) == 0:
            return "no transcript left after tokenisation"
        problem = self.label_problem(labels) or self.unknown_words(utterance.text)
        if problem is not None:
            return problem
        delimiter = getattr(self.tokenizer, "word_delimiter_token", None) or WORD_DELIMITER
        if delimiter in utterance.text:
            spaced = self.encode_text(self.target_prefix + utterance.text.replace(delimiter, " "))
            if torch.equal(labels, spaced):
                return f"the tokenizer's space symbol in the transcript: {delimiter!r}"
        needed, frames = ctc_frames_needed(labels), self.length(utterance)
        if needed > frames:
            return (
                f"no CTC alignment: {needed} frames needed for {len(labels)} labels, the audio has {frames}"
            )
        return None


def ctc_frames_needed(labels: Tensor) -> int:
    """Frames of the shortest CTC alignment of labels [L]: L, plus a blank between equal neighbours."""
    return len(labels) + int((labels[1:] == labels[:-1]).sum())


def load_ctc(config: ModelConfig, architecture: Any, options: dict[str, Any]) -> CTCRecognizer:
    """The recogniser of a CTC checkpoint; see `asr_finetune.models.kinds.Kind.load`."""
    refuse_whisper_options(config, "CTC")
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
    model_class = getattr(transformers, auto.MODEL_FOR_CTC_MAPPING_NAMES[architecture.model_type])
    if config.new_head and model_class._tied_weights_keys:
        raise ConfigError(
            f"model.new_head: the encoder of {model_class.__name__} reads its own output layer's result, and has "
            "learnt to: leave new_head false, and vocabulary keep"
        )
    if config.new_head and config.target_lang is not None:
        raise ConfigError(
            f"model.new_head with model.target_lang={config.target_lang!r}: a language has its own output layer: leave "
            "target_lang null, or new_head false"
        )
    processor = _ctc_processor(config, architecture)
    options |= {
        "new_head": config.new_head,
        "vocabulary": config.vocabulary,
        "target_lang": config.target_lang,
    }
    if config.new_head:
        _classes_of_a_new_head(config, architecture, processor.tokenizer)
    elif architecture.vocab_size is None:
        raise ConfigError(
            f"model.name={config.name!r}: its configuration names no vocabulary, so it has no output layer: set "
            "model.new_head=true and model.vocabulary=characters"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a public seed of the new layer's initialisation
        model, info = read(
            model_class,
            config,
            config=architecture,
            attn_implementation=attention(model_class),
            **LOAD,
        )
        head = head_name(model)
        check_weights(config.name, model, info, head=head, new_head=config.new_head)
        if config.new_head:
            model.get_submodule(head).reset_parameters()
    if config.target_lang is not None:
        load_target_lang(config, model, processor.tokenizer)
    check_tokenizer(config.name, processor.tokenizer, model.config.vocab_size)
    check_blank(config.name, processor.tokenizer, model.config)
    recognizer = CTCRecognizer(placed(model, config), processor, **options)
    examine(recognizer)
    return recognizer


def _ctc_processor(config: ModelConfig, architecture: Any) -> Any:
    """The checkpoint's processor, or its feature extractor with a new tokenizer for characters."""
    if config.vocabulary != "characters":
        return read(transformers.AutoProcessor, config)
    extractor = read(transformers.AutoFeatureExtractor, config)
    tokenizer = ctc_tokenizer(read_alphabet(config.alphabet), "characters")
    return processor_class(architecture.model_type)(extractor, tokenizer)


def _classes_of_a_new_head(config: ModelConfig, architecture: Any, tokenizer: Any) -> None:
    """Set the tokenizer's classes and blank in the model's configuration, for a new output layer.

    The checkpoint's own are kept if its tokenizer fits them, so that plain transformers loads the base model unchanged.
    """
    needed = classes_needed(tokenizer)
    if config.vocabulary == "characters":
        architecture.vocab_size = needed
        set_blank(architecture, tokenizer.pad_token_id)
    elif architecture.vocab_size is None or architecture.vocab_size < needed:
        architecture.vocab_size = needed
        if blank_of(architecture) is None:
            set_blank(architecture, tokenizer.pad_token_id)
