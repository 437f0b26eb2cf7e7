"""The base class of all recognisers; `kinds.py` lists the kinds."""

from __future__ import annotations

import json
import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from asr_finetune.config.values import ConfigError
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.utterance import Utterance
from asr_finetune.files import write_text
from asr_finetune.models.alphabets import ALPHABET_FILE
from asr_finetune.models.architecture import head_name, output_lengths
from asr_finetune.models.inputs import AudioInputs, pad_rows
from asr_finetune.models.quiet import quiet_transformers
from dpkernels.blocks import base_model
from dpkernels.losses import IGNORED
from dpkernels.precision import arithmetic, widened, widened_state
from dpkernels.privacy import gathered_root

SETTINGS = "recognizer.json"
_PLAIN_APOSTROPHES = str.maketrans("’ʼ＇", "'''")
KindName = Literal["ctc", "seq2seq", "transducer"]


class Recognizer(ABC):
    """A model with the conversions of audio to its inputs, text to its labels, and its outputs to text.

    Attributes:
        model: the transformers model; a `peft.PeftModel` around it once adapters are added.
        processor: transformers' processor (feature extractor and tokenizer).
        name: folder or hub id that it was loaded from.
        sampling_rate: sampling rate of its input audio, Hz.
        kind: "ctc", "seq2seq" or "transducer"; see `kinds.py`.
        target_prefix: prefix of training texts, and of texts scored by restricted decoding.
        new_head: the output layer is freshly initialised and must be trained along with any method.
        vocabulary: the kind of its classes, as in `model.vocabulary`; "keep" if the output layer is not new.
        dtype: dtype of its arithmetic; see `dpkernels.precision`.
        equal_lengths_only: why batches of unequal lengths are refused, or "" if padding has no effect.
        unused_layers: names of the layers that are not used in a forward; see `examine.py`, which sets both.
        read_layers: names of the layers whose weights are read without a call of the layer.
    """

    kind: ClassVar[KindName]

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        name: str,
        revision: str | None = None,
        new_head: bool = False,
        vocabulary: str = "keep",
        target_prefix: str = "",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.processor = processor
        self.feature_extractor = processor.feature_extractor
        self.tokenizer = processor.tokenizer
        self.name = name
        self.revision = revision
        self.new_head = new_head
        self.vocabulary = vocabulary
        self.target_prefix = target_prefix
        self.dtype = dtype
        self.sampling_rate = int(self.feature_extractor.sampling_rate)
        self.equal_lengths_only = ""
        self.unused_layers: frozenset[str] = frozenset()
        self.read_layers: frozenset[str] = frozenset()
        switch_off_shared_randomness(self.base)

    @property
    def base(self) -> Any:
        """The transformers model, without PEFT's wrapper."""
        return base_model(self.model)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the output layer and of what is new along with it; see `new_head`."""
        return (head_name(self.base),)

    @property
    def classes(self) -> int:
        """Number of classes of the output layer; labels are 0 … classes − 1."""
        return int(self.base.config.vocab_size)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @cached_property
    def inputs(self) -> AudioInputs:
        """How audio becomes the model's inputs."""
        return AudioInputs(self.feature_extractor)

    @property
    def input_name(self) -> str:
        """Name of the features in an item, in a batch, and in the model's arguments."""
        return self.inputs.name

    def encode_audio(self, array: np.ndarray) -> dict[str, Tensor]:
        """Samples [n] at `sampling_rate` -> input_features [T, F] or input_values [n], float32, by name.

        Only the utterance's own frames are kept, so that only `collate` adds padding.

        Raises:
            ValueError: the model cannot take this audio (`audio_problem` returns the reason beforehand).
        """
        return {self.input_name: self.inputs.encode(array)}

    @abstractmethod
    def encode_text(self, text: str) -> Tensor:
        """Text -> labels [L] int64, with the end token for a seq2seq model.

        Text that looks like a special token ("<pad>") is treated as ordinary text.
        """

    def token_ids(self, text: str) -> list[int]:
        """The text's tokens; what the vocabulary lacks is read with plain apostrophes and composed accents."""
        for spelling in (text, unicodedata.normalize("NFC", text.translate(_PLAIN_APOSTROPHES))):
            ids = self.tokenizer(spelling, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if self.tokenizer.unk_token_id not in ids:
                break
        return list(ids)

    def unknown_words(self, text: str) -> str | None:
        """Which words of a text the vocabulary lacks, as a problem; None if it has all of them."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown not in self.token_ids(self.target_prefix + text):
            return None
        words = [word for word in text.split() if unknown in self.token_ids(word)]
        return (
            f"not in the vocabulary: {', '.join(words)!r}; see data.text_case, data.strip_punctuation and "
            "model.vocabulary"
        )

    def label_problem(self, labels: Tensor) -> str | None:
        """Why labels [L] from `encode_text` cannot be learnt, judged by their values; None if they can."""
        outside = labels[(labels < 0) | (labels >= self.classes)]
        if len(outside):
            return f"a label outside the output layer: {outside.tolist()}, it has the classes 0 to {self.classes - 1}"
        return None

    @abstractmethod
    def length(self, utterance: Utterance) -> int:
        """The cost of an utterance, for batches of similar lengths: encoder frames, plus tokens if seq2seq."""

    def audio_problem(self, utterance: Utterance) -> str | None:
        """Why the model cannot take an utterance's audio, judged by its length alone; None if it can."""
        # A single frame has no variance for the normalisation.
        if self.inputs.frames(self.samples(utterance)) < 2 or self.output_frames(utterance) < 1:
            return f"too short for the model: {utterance.seconds:.3f} s"
        return None

    @abstractmethod
    def text_problem(self, utterance: Utterance) -> str | None:
        """Why an utterance's transcript cannot be learnt; None if it can."""

    def loss_per_example(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Losses [B] float32 of a batch from `collate`. Each depends on its own utterance only; 0 without labels."""
        device = next(model.parameters()).device
        with arithmetic(self.dtype, device):
            return self._losses(model, to_device(batch, device))

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(outputs [B, T', ...], frames of each utterance [B]): what padding must not change; see `examine.py`."""
        raise NotImplementedError(f"{type(self).__name__} takes no audio of different lengths")

    @abstractmethod
    def _losses(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """`loss_per_example` of a batch on the model's device."""

    @abstractmethod
    def _decode(self, batch: dict[str, Any]) -> list[str]:
        """Greedy transcripts."""

    @abstractmethod
    def _scores(self, batch: dict[str, Any], texts: Sequence[str]) -> Tensor:
        """ln p(text | audio), [B, number of texts]."""

    def _inputs(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The padded inputs of a batch."""
        rows = [item[self.input_name] for item in items]
        least, most = min(map(len, rows)), max(map(len, rows))
        if self.equal_lengths_only and least != most:
            raise ConfigError(
                f"{self.name}: a batch of unequal lengths ({least} to {most}) would change utterances' gradients: "
                f"{self.equal_lengths_only}. Set train.physical_batch_size=1 and evaluate.batch_size=1, or use a model "
                "that masks its padding (Parakeet, Wav2Vec2-BERT)"
            )
        return self.inputs.collate(rows)

    def empty_item(self) -> dict[str, Tensor]:
        """The item of an unusable utterance: silence and no labels, so that its loss and gradient are 0."""
        silence = np.zeros(self.sampling_rate // 2, dtype=np.float32)
        return {**self.encode_audio(silence), "labels": torch.zeros(0, dtype=torch.int64)}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Items -> a batch: inputs padded with 0 and their attention_mask [B, T], labels [B, L] padded with
        −100, index [B].

        Raises:
            ValueError: there are no items, or their lengths differ and the model accepts equal lengths only.
        """
        if not items:
            raise ValueError("collate: no items: an empty logical batch has no micro-batches")
        batch: dict[str, Any] = self._inputs(items)
        if "labels" in items[0]:
            batch["labels"] = pad_rows([item["labels"] for item in items], IGNORED)
        if "index" in items[0]:
            batch["index"] = torch.tensor([int(item["index"]) for item in items])
        return batch

    @torch.inference_mode()
    def transcribe(self, batch: dict[str, Any], restrict_to: Sequence[str] | None = None) -> list[str]:
        """Text of each utterance of a batch from `collate`; "" for an unusable utterance.

        Args:
            batch: tensors on any device.
            restrict_to: choose the one of these texts with the highest ln p(text | audio). None: greedy decoding.

        Raises:
            ValueError: `restrict_to` is empty.
        """
        batch = to_device(batch, self.device)
        was_training = self.model.training
        self.model.eval()
        try:
            with gathered_root(self.model), arithmetic(self.dtype, self.device):
                texts = self._texts(batch, restrict_to)
        finally:
            self.model.train(was_training)
        if "labels" in batch:  # an empty item: see `empty_item`
            usable = (batch["labels"] != IGNORED).any(dim=1).tolist()
            texts = [text if row else "" for text, row in zip(texts, usable, strict=True)]
        return texts

    def _texts(self, batch: dict[str, Any], restrict_to: Sequence[str] | None) -> list[str]:
        if restrict_to is None:
            return self._decode(batch)
        if not restrict_to:
            raise ValueError("restrict_to=[]: give at least one text, or None for free decoding")
        best = self._scores(batch, restrict_to).argmax(dim=1)
        return [restrict_to[int(index)] for index in best]

    def cached_inputs(self, item: dict[str, Tensor]) -> dict[str, Tensor]:
        """The form of an item to cache between epochs; a model may replace features by its encoder's output."""
        return item

    def can_cache_states(self) -> bool:
        """Whether `cached_inputs` would return outputs of a frozen encoder now."""
        return False

    def save(self, folder: Path | str) -> None:
        """Write the model (adapters in PEFT's format, which plain PEFT loads), the processor and the settings, and the
        alphabet of a new output layer.

        A base model's folder loads with transformers' `from_pretrained`, and with `load_recognizer`.
        """
        quiet_transformers()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        saved: Any = self.model
        # PEFT would treat a new output layer as resized token embeddings, which a CTC model does not have.
        options: dict[str, Any] = {} if saved is self.base else {"save_embedding_layers": False}
        if saved is self.base and self.dtype is not torch.float32:
            options["state_dict"] = widened_state(saved.state_dict())
        saved.save_pretrained(folder, **options)
        if "state_dict" in options:  # transformers wrote the type of the model's first parameter
            saved.config.dtype = "float32"
            saved.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        settings = json.dumps(self._settings(), indent=2)
        (folder / SETTINGS).write_text(settings + "\n", encoding="utf-8")
        if self.vocabulary == "characters":  # an adapter's tokenizer is made anew from them
            classes = self.tokenizer.get_vocab()
            alphabet = [char for char in sorted(classes, key=classes.__getitem__) if len(char) == 1]
            write_text(folder / ALPHABET_FILE, "".join(f"{char}\n" for char in alphabet))

    def _settings(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "target_prefix": self.target_prefix,
            "new_head": self.new_head,
            "vocabulary": self.vocabulary,
        }

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Within it, weights and arithmetic are float32."""
        dtype, self.dtype = self.dtype, torch.float32
        try:
            with widened(self.model):
                yield
        finally:
            self.dtype = dtype

    def describe(self) -> dict[str, Any]:
        """Facts for a report: plain values."""
        return {
            "name": self.name,
            "revision": self.revision,
            "class": type(self.base).__name__,
            "kind": self.kind,
            "sampling_rate": self.sampling_rate,
            "vocabulary": self.classes,
            "dtype": str(self.dtype).removeprefix("torch."),
            "new_head": self.new_head,
            "total_parameters": total_parameters(self.model),
            "trained_parameters": trained_parameters(self.model),
        }

    @cached_property
    def _lengths(self) -> Callable[[Tensor], Tensor]:
        return output_lengths(self.base)

    def frames(self, inputs: Tensor) -> Tensor:
        """Numbers of output frames [B] for numbers of input frames [B] (of a raw waveform: samples)."""
        return torch.as_tensor(self._lengths(inputs)).to(torch.int64)

    def output_frames(self, utterance: Utterance) -> int:
        """Number of output frames of an utterance."""
        return int(self.frames(torch.tensor(max(self.inputs.frames(self.samples(utterance)), 1))))

    def samples(self, utterance: Utterance) -> int:
        """Samples of an utterance at the model's rate."""
        return math.floor(utterance.seconds * self.sampling_rate)


def fit(corpus: Corpus, recognizer: Recognizer, *, training: bool = True) -> Corpus:
    """A corpus without the utterances that the recogniser cannot take; these become problems.

    Problems are audio that is longer than Whisper's window or too short for one frame, and, for training, transcripts
    outside the vocabulary or without a CTC alignment in the audio's frames.

    Raises:
        ConfigError: no utterance is left.
    """

    def problem(utterance: Utterance) -> str | None:
        reason = recognizer.audio_problem(utterance)
        return recognizer.text_problem(utterance) if reason is None and training else reason

    return corpus.without(map(problem, corpus.utterances))


def switch_off_shared_randomness(model: nn.Module) -> None:
    """Switch off LayerDrop and the model's own SpecAugment, in the configuration and in the modules.

    LayerDrop is one draw for a whole batch, and the masks depend on the padded length: with either, an utterance's
    gradient depends on its batch. `augment.SpecAugment` replaces the masks.
    """
    for module in model.modules():
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if isinstance(getattr(module, name, None), float | int):
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if config is None:
            continue
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if getattr(config, name, None) is not None:
                setattr(config, name, 0.0)
        if hasattr(config, "apply_spec_augment"):
            config.apply_spec_augment = False
        elif getattr(config, "mask_time_prob", 0) or getattr(config, "mask_feature_prob", 0):
            config.apply_spec_augment = False  # the modelling code reads it with a default of True
        embed = getattr(module, "masked_spec_embed", None)
        if isinstance(embed, nn.Parameter):
            embed.requires_grad_(False)  # it belongs to the masks, which are off


def trained_parameters(model: nn.Module) -> int:
    """Number of trained values; a tensor shared by several modules counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def total_parameters(model: nn.Module) -> int:
    """Number of values; a tensor shared by several modules counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
