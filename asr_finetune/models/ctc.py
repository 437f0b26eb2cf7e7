"""CTC recognisers.

Any model type of transformers' `AutoModelForCTC` is one; `architecture.py` reads its blank and its output lengths.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.data.utterance import Utterance
from asr_finetune.files import write_text
from asr_finetune.models.alphabets import ALPHABET_FILE, WORD_DELIMITER, ctc_tokenizer, read_alphabet
from asr_finetune.models.architecture import (
    attention,
    blank_of,
    head_name,
    output_lengths,
    processor_class,
    set_blank,
)
from asr_finetune.models.checkpoint import LOAD, placed, read
from asr_finetune.models.checkpoint_fit import check_blank, check_tokenizer, check_weights, classes_needed
from asr_finetune.models.examine import examine
from asr_finetune.models.recognizer import KindName, Recognizer
from dpkernels.losses import IGNORED, ctc_loss_per_example

_PLAIN_APOSTROPHES = str.maketrans("’ʼ＇", "'''")


class CTCRecognizer(Recognizer):
    """A CTC model; items hold input_features [T, F], or input_values [n] for Wav2Vec2 and its Conformer."""

    kind: ClassVar[KindName] = "ctc"

    def __init__(self, model: nn.Module, processor: Any, **options: Any) -> None:
        super().__init__(model, processor, **options)
        self.blank = int(blank_of(self.base.config))
        self._lengths = output_lengths(self.base)

    def encode_text(self, text: str) -> Tensor:
        """See Recognizer; what the vocabulary lacks is read with plain apostrophes and composed accents."""
        for spelling in (text, unicodedata.normalize("NFC", text.translate(_PLAIN_APOSTROPHES))):
            encoded = self.tokenizer(spelling, add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
            if self.tokenizer.unk_token_id not in encoded:
                break
        return torch.tensor(encoded, dtype=torch.int64)

    def label_problem(self, labels: Tensor) -> str | None:
        """See Recognizer; the blank is not a label either."""
        if bool((labels == self.blank).any()):
            return f"the blank as a label: {self.tokenizer.convert_ids_to_tokens(self.blank)!r} in the transcript"
        return super().label_problem(labels)

    def save(self, folder: Path | str) -> None:
        """See Recognizer; with the alphabet of a new output layer, from which an adapter's tokenizer is made anew."""
        super().save(folder)
        if self.vocabulary == "characters":
            classes = self.tokenizer.get_vocab()
            alphabet = [char for char in sorted(classes, key=classes.__getitem__) if len(char) == 1]
            write_text(Path(folder) / ALPHABET_FILE, "".join(f"{char}\n" for char in alphabet))

    def logits(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(logits [B, T', V], frames of each utterance [B])."""
        logits = model(**self.inputs.arguments(batch, next(model.parameters()).dtype)).logits
        return logits, self.frames(batch["attention_mask"].sum(dim=1))

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """See Recognizer; the logits."""
        return self.logits(model, batch)

    def frames(self, inputs: Tensor) -> Tensor:
        """Numbers of output frames [B] for numbers of input frames [B] (Wav2Vec2: samples)."""
        lengths: Tensor = self._lengths(inputs)
        return lengths.to(torch.int64)

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
        """Output frames."""
        return int(self.frames(torch.tensor([max(self._input_frames(utterance), 1)]))[0])

    def _input_frames(self, utterance: Utterance) -> int:
        return self.inputs.frames(self.samples(utterance))

    def audio_problem(self, utterance: Utterance) -> str | None:
        """See Recognizer."""
        # A single frame has no variance for the normalisation.
        if self._input_frames(utterance) < 2 or self.length(utterance) < 1:
            return f"too short for the model: {utterance.seconds:.3f} s"
        return None

    def text_problem(self, utterance: Utterance) -> str | None:
        """See Recognizer."""
        labels = self.encode_text(self.target_prefix + utterance.text)
        if len(labels) == 0:
            return "no transcript left after tokenisation"
        problem = self.label_problem(labels)
        if problem is not None:
            return problem
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and bool((labels == unknown).any()):
            words = [word for word in utterance.text.split() if unknown in self.encode_text(word)]
            return (
                f"not in the vocabulary: {', '.join(words)!r}; see data.text_case, data.strip_punctuation and "
                "model.vocabulary"
            )
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
        model, info = read(
            transformers.AutoModelForCTC,
            config,
            config=architecture,
            attn_implementation=attention(architecture, auto.MODEL_FOR_CTC_MAPPING_NAMES),
            **LOAD,
        )
        head = head_name(model)
        check_weights(config.name, model, info, head=head, new_head=config.new_head)
        if config.new_head:
            model.get_submodule(head).reset_parameters()
    check_tokenizer(config.name, processor.tokenizer, architecture.vocab_size)
    check_blank(config.name, processor.tokenizer, architecture)
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
