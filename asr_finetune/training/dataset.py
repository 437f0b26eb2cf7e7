"""A corpus as tensors: the items that a recogniser collates, optionally cached in memory."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from asr_finetune.config.schema import ConfigError
from asr_finetune.console import Reporter
from asr_finetune.data.audio import read_audio
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.utterance import Problem, Utterance
from asr_finetune.models.inputs import stacked_frames
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.training.augment import SpecAugment

logger = logging.getLogger("asr_finetune")
CACHE_BYTES = 4 * 2**30  # limit of the features that one dataset caches in one process


class SpeechDataset(Dataset[dict[str, Any]]):
    """A corpus as items for `Recognizer.collate`.

    An item holds input_features [T, F] or input_values [n], float32; labels [L], int64; index.

    A recording that does not decode, or that the recogniser does not accept, never stops a run: its item is silence
    without labels, whose loss and gradient are exactly 0. It is added to `problems` (in the process that read it), with
    a warning in the log.

    Args:
        corpus: the utterances; the dataset has one item for each, in their order.
        recognizer: turns them into tensors.
        cache: keep each utterance's features in memory, from `check_audio` or their first use on, up to `CACHE_BYTES`.
            If the encoder is frozen and nothing is augmented, its output is cached instead. Worker processes have
            caches of their own; a forked one starts with what this process has cached.
        cache_states: whether to cache a frozen encoder's output, which pays off if items are used several times.
        augment: masks on the features, drawn at every access; refused for raw waveforms.
        target_prefix: prefix of each transcript; "" stands for the recogniser's own (Whisper: a space).
    """

    def __init__(
        self,
        corpus: Corpus,
        recognizer: Recognizer,
        *,
        cache: bool = False,
        cache_states: bool = True,
        augment: SpecAugment | None = None,
        target_prefix: str = "",
    ) -> None:
        if augment is not None and getattr(recognizer, "input_name", "") == "input_values":
            raise ConfigError(
                f"train.spec_augment=true: {recognizer.name} takes the raw waveform, which has no bands to mask; "
                "set it to false"
            )
        self.corpus = corpus
        self.recognizer = recognizer
        self.augment = augment
        self.target_prefix = target_prefix or recognizer.target_prefix
        self.problems: list[Problem] = []
        self.cache_states = cache_states
        self._cache: dict[int, dict[str, torch.Tensor]] | None = {} if cache else None
        self._cached_bytes = 0
        self._full = False

    def __len__(self) -> int:
        return len(self.corpus)

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker would need a file handle for each cached tensor.
        empty: dict[str, Any] = {
            "_cache": None if self._cache is None else {},
            "_cached_bytes": 0,
            "_full": False,
        }
        return {**self.__dict__, **empty}

    def check_audio(self, reporter: Reporter, name: str) -> None:
        """Decode every recording, take those that fail out of the corpus, and cache the others' features.

        Without a cache, or once it is full, the samples are dropped, and a recording is decoded again when it is used.
        Call it before the first item is used, since it changes the items' places.

        Args:
            reporter: shows the progress.
            name: the name of the progress bar.

        Raises:
            ConfigError: no utterance is left.
        """
        if self._cache is None:
            self.corpus = self.corpus.decoded(reporter, name)
        else:
            self.corpus = self.corpus.decoded(reporter, name, self._read, self._fill)

    def _fill(self, index: int, utterance: Utterance, samples: np.ndarray) -> None:
        if not self._full:
            self._keep(index, self._encode(utterance, samples))

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._item(index)
        if self.augment is not None:
            features = item["input_features"]
            length = self._own_frames(index, len(features))
            stacked = stacked_frames(self.recognizer.feature_extractor)
            item = {**item, "input_features": self.augment(features, length, stacked)}
        return {**item, "index": index}

    def _item(self, index: int) -> dict[str, torch.Tensor]:
        if self._cache is None:
            return self._encode(self.corpus.utterances[index])
        # A worker holds a copy of the model from its start; only this process knows the present frozen parameters.
        states = (
            self.cache_states
            and self.augment is None
            and get_worker_info() is None
            and self.recognizer.can_cache_states()
        )
        item = self._cache.get(index)
        if item is None or ("encoder_states" in item and not states):
            item = self._encode(self.corpus.utterances[index])
        if states and "encoder_states" not in item:
            item = self.recognizer.cached_inputs(item)
        self._keep(index, item)
        return item

    def _keep(self, index: int, item: dict[str, torch.Tensor]) -> None:
        assert self._cache is not None
        old = self._cache.get(index)
        if old is item:
            return
        size = _size(item) - (_size(old) if old is not None else 0)
        if self._cached_bytes + size > CACHE_BYTES:
            self._full = True
            if old is not None:  # it is out of date
                del self._cache[index]
                self._cached_bytes -= _size(old)
            return
        self._cache[index] = item
        self._cached_bytes += size

    def _read(self, utterance: Utterance) -> np.ndarray:
        return read_audio(utterance, self.recognizer.sampling_rate)

    def _encode(self, utterance: Utterance, samples: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """The item of an utterance; samples: those of the recording, if it has been read."""
        reason = self.recognizer.audio_problem(utterance)
        if reason is None:
            try:
                samples = self._read(utterance) if samples is None else samples
                return {**self.recognizer.encode_audio(samples), "labels": self._labels(utterance)}
            except ValueError as error:  # AudioError, or a number of samples that the header does not give
                reason = str(error)
        problem = Problem(utterance.id, reason, utterance.place)
        if problem not in self.problems:
            self.problems.append(problem)
            logger.warning("%s contributes nothing: %s", utterance.id, reason)
        return self.recognizer.empty_item()

    def _labels(self, utterance: Utterance) -> torch.Tensor:
        return self.recognizer.encode_text(self.target_prefix + utterance.text)

    def _own_frames(self, index: int, frames: int) -> int:
        """Frames of speech in features that fill a fixed window; the silence after them is not masked."""
        window = getattr(self.recognizer, "window_seconds", None)
        if window is None:
            return frames
        return max(min(round(frames * self.corpus.utterances[index].seconds / window), frames), 1)


def _size(item: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in item.values())
