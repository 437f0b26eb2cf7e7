"""A corpus as tensors: the items that a recogniser collates, kept in memory after their first use where asked."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from asr_finetune.config.schema import ConfigError
from asr_finetune.data.audio import read_audio
from asr_finetune.data.corpus import Corpus, Problem, Utterance
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.training.augment import SpecAugment

logger = logging.getLogger("asr_finetune")
CACHE_BYTES = 4 * 2**30  # of features kept by one dataset in one process


class SpeechDataset(Dataset[dict[str, Any]]):
    """A corpus as items for `Recognizer.collate`.

    An item holds input_features [T, F] or input_values [n], float32; labels [L], int64; index.

    A recording that turns out not to decode, or that the recogniser cannot take, never stops a run: its item
    is silence without labels, whose loss and gradient are exactly 0, and it joins `problems` (of the process
    that read it), with a warning in the log.

    Args:
        corpus: the utterances; the dataset has one item for each, in their order.
        recognizer: turns them into tensors.
        cache: keep each utterance's features in memory after their first use, up to `CACHE_BYTES` in each
            process. Where the encoder is frozen and nothing is augmented, its output is kept instead, once it
            is known to be frozen.
        augment: masks on the features, drawn anew each time; refused for raw waveforms.
        target_prefix: put before each transcript; "" stands for the recogniser's own (Whisper: a space).
    """

    def __init__(
        self,
        corpus: Corpus,
        recognizer: Recognizer,
        *,
        cache: bool = False,
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
        self._cache: dict[int, dict[str, torch.Tensor]] | None = {} if cache else None
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._item(index)
        if self.augment is not None:
            features = item["input_features"]
            length = self._own_frames(index, len(features))
            stacked = int(getattr(self.recognizer.feature_extractor, "stride", 1))
            item = {**item, "input_features": self.augment(features, length, stacked)}
        return {**item, "index": index}

    def _item(self, index: int) -> dict[str, torch.Tensor]:
        if self._cache is None:
            return self._encode(index)
        # A worker has the model as it was when the worker began; only this process knows what is frozen now.
        states = self.augment is None and get_worker_info() is None and self.recognizer.can_cache_states()
        kept = self._cache.get(index)
        if kept is None or ("encoder_states" in kept and not states):
            kept = self._encode(index)
        if states and "encoder_states" not in kept:
            kept = self.recognizer.cached_inputs(kept)
        self._keep(index, kept)
        return kept

    def _keep(self, index: int, item: dict[str, torch.Tensor]) -> None:
        assert self._cache is not None
        old = self._cache.get(index)
        if old is item:
            return
        size = _size(item) - (_size(old) if old is not None else 0)
        if self._cached_bytes + size > CACHE_BYTES:
            if old is not None:  # it is out of date
                del self._cache[index]
                self._cached_bytes -= _size(old)
            return
        self._cache[index] = item
        self._cached_bytes += size

    def _encode(self, index: int) -> dict[str, torch.Tensor]:
        utterance = self.corpus.utterances[index]
        reason = self.recognizer.audio_problem(utterance)
        if reason is None:
            try:
                samples = read_audio(utterance, self.recognizer.sampling_rate)
                return {**self.recognizer.encode_audio(samples), "labels": self._labels(utterance)}
            except ValueError as error:  # AudioError, or samples that the header did not announce
                reason = str(error)
        problem = Problem(utterance.id, reason, utterance.place)
        if problem not in self.problems:
            self.problems.append(problem)
            logger.warning("%s contributes nothing: %s", utterance.id, reason)
        return self.recognizer.empty_item()

    def _labels(self, utterance: Utterance) -> torch.Tensor:
        return self.recognizer.encode_text(self.target_prefix + utterance.text)

    def _own_frames(self, index: int, frames: int) -> int:
        """Frames of speech in features that fill a fixed window: its silent rest is not masked."""
        window = getattr(self.recognizer, "window_seconds", None)
        if window is None:
            return frames
        return max(min(round(frames * self.corpus.utterances[index].seconds / window), frames), 1)


def _size(item: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in item.values())
