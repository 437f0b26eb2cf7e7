"""CTC recognisers: Parakeet, Wav2Vec2-BERT, Wav2Vec2, Wav2Vec2-Conformer; and small new ones.

The CTC blank is the class `config.pad_token_id`, as in all CTC models of transformers.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn

from asr_finetune.config.values import ConfigError
from asr_finetune.data.utterance import Utterance
from asr_finetune.files import write_text
from asr_finetune.models.alphabets import ALPHABET_FILE, WORD_DELIMITER
from asr_finetune.models.recognizer import Recognizer, pad_rows
from dpkernels.losses import IGNORED, ctc_loss_per_example

BLANK, UNKNOWN = "<pad>", "<unk>"
_PLAIN_APOSTROPHES = str.maketrans("’ʼ＇", "'''")
SUPPORTED = ("parakeet_ctc", "wav2vec2-bert", "wav2vec2", "wav2vec2-conformer")


class CTCRecognizer(Recognizer):
    """A CTC model; items hold input_features [T, F], or input_values [n] for Wav2Vec2 and its Conformer."""

    kind: ClassVar[Literal["ctc", "seq2seq"]] = "ctc"

    def __init__(self, model: nn.Module, processor: Any, **options: Any) -> None:
        super().__init__(model, processor, **options)
        config = self.base.config
        if config.model_type in ("wav2vec2", "wav2vec2-conformer"):
            self.input_name = "input_values"
        self.blank = int(config.pad_token_id)
        if config.model_type == "wav2vec2-conformer":
            self.equal_lengths_only = "Wav2Vec2-Conformer's convolutions ignore the attention mask"
        elif self.input_name == "input_values" and getattr(config, "feat_extract_norm", "") == "group":
            self.equal_lengths_only = 'feat_extract_norm="group" normalises over the padded length'

    def encode_audio(self, array: np.ndarray) -> dict[str, Tensor]:
        """See Recognizer; only the utterance's own frames are kept, so that only `collate` adds padding."""
        encoded = self.feature_extractor(
            array, sampling_rate=self.sampling_rate, return_tensors="pt", return_attention_mask=True
        )
        values, mask = encoded[self.input_name][0], encoded["attention_mask"][0].bool()
        values = values[mask].float()
        if len(values) == 0 or not torch.isfinite(values).all():
            raise ValueError(f"{len(array)} samples are too few for {type(self.feature_extractor).__name__}")
        return {self.input_name: values}

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

    def _inputs(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        rows = [item[self.input_name] for item in items]
        lengths = torch.tensor([len(row) for row in rows])
        if self.equal_lengths_only and int(lengths.min()) != int(lengths.max()):
            raise ConfigError(
                f"{self.name}: a batch of unequal lengths ({int(lengths.min())} to {int(lengths.max())}) would "
                f"change utterances' gradients: {self.equal_lengths_only}. Set train.physical_batch_size=1 and "
                "evaluate.batch_size=1, or use a model that masks its padding (Parakeet, Wav2Vec2-BERT)"
            )
        padded = pad_rows(rows, 0.0)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        return {self.input_name: padded, "attention_mask": mask}

    def save(self, folder: Path | str) -> None:
        """See Recognizer; with the alphabet of a new output layer, from which an adapter's tokenizer is made anew."""
        super().save(folder)
        if self.vocabulary == "characters":
            classes = self.tokenizer.get_vocab()
            alphabet = [char for char in sorted(classes, key=classes.__getitem__) if len(char) == 1]
            write_text(Path(folder) / ALPHABET_FILE, "".join(f"{char}\n" for char in alphabet))

    def logits(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(logits [B, T', V], frames of each utterance [B])."""
        mask = batch["attention_mask"]
        inputs = batch[self.input_name].to(next(model.parameters()).dtype)
        logits = model(**{self.input_name: inputs}, attention_mask=mask).logits
        return logits, self.frames(mask.sum(dim=1))

    def frames(self, inputs: Tensor) -> Tensor:
        """Numbers of output frames [B] for numbers of input frames [B] (Wav2Vec2: samples)."""
        model = self.base
        if hasattr(model, "_get_subsampling_output_length"):
            lengths = model._get_subsampling_output_length(inputs)
        else:
            lengths = model._get_feat_extract_output_lengths(inputs)
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
        samples = self.samples(utterance)
        if self.input_name == "input_values":
            return samples
        extractor = self.feature_extractor
        if hasattr(extractor, "hop_length"):  # Parakeet
            return samples // int(extractor.hop_length)
        # Kaldi's windows of 25 ms every 10 ms, at 16 kHz
        return max((samples - 400) // 160 + 1, 0) // int(extractor.stride)

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


def ctc_tokenizer(vocabulary: Sequence[str], unit: Literal["words", "characters"]) -> Any:
    """A CTC tokenizer for whole words or single characters; the blank is class 0.

    Args:
        vocabulary: words, or characters with `WORD_DELIMITER` in place of the space.
        unit: the unit of one label.

    Raises:
        ConfigError: the vocabulary is empty, or has a repeated or reserved entry, a character of several letters, or a
            word with white space; the message names the entry.
    """
    if not vocabulary:
        raise ConfigError("vocabulary=[]: give the words or characters to recognise")
    repeated = [entry for entry, count in Counter(vocabulary).items() if count > 1]
    if repeated:
        raise ConfigError(
            f"vocabulary: {_named(repeated)} more than once: each entry is one class, so leave the repeats out"
        )
    reserved = [entry for entry in vocabulary if entry in (BLANK, UNKNOWN, "")]
    if reserved:
        raise ConfigError(
            f"vocabulary: {_named(reserved)} is reserved (as {BLANK!r}, {UNKNOWN!r} and '' are): leave it out"
        )
    long = [entry for entry in vocabulary if len(entry) > 1]
    if unit == "characters" and long:
        raise ConfigError(
            f"vocabulary: {_named(long)} of several letters, but a character is a single letter: leave it out, or give "
            "unit='words'"
        )
    spaced = [entry for entry in vocabulary if entry.split() != [entry]]
    if unit == "words" and spaced:
        raise ConfigError(
            f"vocabulary: {_named(spaced)} with white space, which ends a word: give its words separately"
        )
    entries = [BLANK, UNKNOWN, *vocabulary]
    core = Tokenizer(WordLevel({entry: index for index, entry in enumerate(entries)}, unk_token=UNKNOWN))
    if unit == "words":
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        core.normalizer = normalizers.Sequence(
            [normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), WORD_DELIMITER)]
        )
        core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
        core.decoder = decoders.Sequence([decoders.Replace(WORD_DELIMITER, " "), decoders.Fuse()])
    return transformers.ParakeetTokenizer(tokenizer_object=core, pad_token=BLANK, unk_token=UNKNOWN)


def tiny_parakeet(
    vocabulary: Sequence[str],
    *,
    unit: Literal["words", "characters"] | None = None,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    channels: int = 64,
    mels: int = 80,
    seed: int = 0,
    **encoder: Any,
) -> CTCRecognizer:
    """A small ParakeetForCTC with fresh weights. It runs the same code as the 608.8 M-parameter model.

    Args:
        vocabulary: words or characters; it becomes part of the model, so it must be public.
        unit: the unit of one label; None: characters if every entry is one letter, else words.
        hidden: width; the feed-forward layers are 4 times as wide.
        layers: conformer blocks.
        heads: attention heads.
        channels: channels of the subsampling convolutions.
        mels: log-mel bins.
        seed: public seed of the initialisation.
        encoder: more fields of transformers' ParakeetEncoderConfig.

    Raises:
        ConfigError: `ctc_tokenizer` refuses the vocabulary, or the heads do not divide the width.
    """
    if hidden % heads:
        raise ConfigError(f"tiny_parakeet: hidden={hidden} is not a multiple of heads={heads}")
    unit = unit or ("characters" if all(len(entry) == 1 for entry in vocabulary) else "words")
    tokenizer = ctc_tokenizer(vocabulary, unit)
    config = transformers.ParakeetCTCConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        encoder_config={
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
            "subsampling_conv_channels": channels,
            "num_mel_bins": mels,
            "dropout": 0.0,
            "activation_dropout": 0.0,
            "attention_dropout": 0.0,
            "layerdrop": 0.0,
            **encoder,
        },
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.ParakeetForCTC(config)
        for module in model.modules():
            # transformers initialises convolutions from N(0, 0.02), since checkpoints overwrite them: in the
            # subsampling of a small new model the signal would vanish, and the model would learn nothing.
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                module.reset_parameters()
    extractor = transformers.ParakeetFeatureExtractor(feature_size=mels)
    processor = transformers.ParakeetProcessor(extractor, tokenizer)
    return CTCRecognizer(model.eval(), processor, name="tiny-parakeet")


def _named(entries: Sequence[str]) -> str:
    """The first of some entries, and how many more there are."""
    more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
    return f"{entries[0]!r}{more}"
