"""Audio as a model takes it: features without padding, padded batches with their mask, and numbers of frames.

The names of the features and of their mask are the feature extractor's `model_input_names`. How many frames it makes of
a recording is learnt from the extractor itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asr_finetune.config.values import ConfigError

RAW = "input_values"  # the name of a raw waveform in every model of transformers


def noise(samples: int) -> np.ndarray:
    """Fixed noise [samples], float32: audio for checks of a model or of its feature extractor."""
    return np.random.default_rng(0).normal(scale=0.1, size=samples).astype(np.float32)


def stacked_frames(extractor: Any) -> int:
    """Frames, and differences of frames (Granite Speech), that a row of an extractor's features has side by side."""
    if hasattr(extractor, "frame_stacking"):
        return int(extractor.frame_stacking * extractor.delta_expansion)
    return int(getattr(extractor, "stride", 1))


class AudioInputs:
    """The features of a model whose attention mask marks an utterance's own frames.

    Attributes:
        extractor: transformers' feature extractor.
        name: of the features in an item, in a batch, and in the model's arguments.
        raw: whether the features are the waveform itself.
    """

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor
        self.name, self._mask = extractor.model_input_names[:2]
        self.raw = self.name == RAW

    def encode(self, array: np.ndarray) -> Tensor:
        """Samples [n] -> features [T, F], or the waveform [n], float32: an utterance's own frames.

        Raises:
            ValueError: there are too few samples for a frame.
        """
        encoded = self._extract(array)
        values, mask = encoded[self.name][0], encoded[self._mask][0].bool()
        if self.raw:
            values = values.flatten()  # OmniASR adds a dimension of one channel
        values = values[mask].float()
        if len(values) == 0 or not torch.isfinite(values).all():
            raise ValueError(f"{len(array)} samples are too few for {type(self.extractor).__name__}")
        return values

    def collate(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        """Features of several utterances -> the features padded with 0, and attention_mask [B, T]."""
        lengths = torch.tensor([len(row) for row in rows])
        padded = pad_rows(rows, 0.0)
        return {self.name: padded, "attention_mask": torch.arange(padded.shape[1]) < lengths[:, None]}

    def arguments(self, batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's arguments for a batch from `collate`."""
        values = batch[self.name].to(dtype)
        if self._has_channel:
            values = values[:, None]
        return {self.name: values, self._mask: batch["attention_mask"]}

    def frames(self, samples: int) -> int:
        """Number of frames, or of the waveform's samples, that `encode` makes of so many samples."""
        step, first = self._rule
        return max((samples - first) // step + 1, 0)

    def samples(self, frames: int) -> int:
        """Samples of so many frames, roughly: the inverse of `frames`."""
        step, first = self._rule
        return max(frames - 1, 0) * step + first

    def _extract(self, array: np.ndarray) -> Any:
        return self.extractor(
            array,
            sampling_rate=int(self.extractor.sampling_rate),
            return_tensors="pt",
            return_attention_mask=True,
        )

    @cached_property
    def _has_channel(self) -> bool:
        return self.raw and self._extract(noise(int(self.extractor.sampling_rate)))[self.name].dim() == 3

    @cached_property
    def _rule(self) -> tuple[int, int]:
        """(samples from one frame to the next, samples that the first frame needs).

        Extractors cut windows at a fixed step, and some stack frames, so that the number of frames is a floor of
        a linear function of the samples. Its two coefficients are found by bisection, and the function is checked.

        Raises:
            ConfigError: the extractor's numbers of frames are no such function.
        """
        second = int(self.extractor.sampling_rate)
        audio = noise(2 * second)

        def count(samples: int) -> int:
            return int(self._extract(audio[:samples])[self._mask].sum())

        least = second // 4
        at_least = count(least)
        if at_least == least:
            return 1, 1
        places = range(least, second)
        (first, after) = (
            least + bisect_left(places, at_least + more, key=count)  # the least samples with so many frames
            for more in (1, 2)
        )
        step = after - first
        first -= at_least * step
        for samples in (second - 1, second, second + step // 2, 2 * second):
            if count(samples) != (samples - first) // step + 1:
                raise ConfigError(
                    f"{type(self.extractor).__name__} makes {count(samples)} frames of {samples} samples, and not one "
                    f"frame every {step} samples from {first} on: its numbers of frames cannot be predicted; use a "
                    "model whose feature extractor cuts frames at a fixed step"
                )
        return step, first


def pad_rows(rows: Sequence[Tensor], value: float) -> Tensor:
    """Tensors [Lᵢ, ...] -> [B, max Lᵢ, ...], filled with `value` on the right."""
    longest = max(len(row) for row in rows)
    out = rows[0].new_full((len(rows), longest, *rows[0].shape[1:]), value)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out
