"""SpecAugment for each utterance on its own.

The masks of transformers' models are switched off (`models.switch_off_shared_randomness`): some share one draw over
the batch or depend on the padded length, so that an utterance's gradient would depend on the rest of its batch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class SpecAugment:
    """Masks of frequency and time (Park et al. 2019), drawn for each utterance from its own length.

    Frequency: `frequency_masks` bands of up to `frequency_share` of the bins. Time: `time_masks` spans of up
    to `time_share` of the utterance's own frames. Widths are uniform from 0; masked values are set to the utterance's
    mean. The operating system seeds the generator in each process, also in a forked or spawned worker and after a
    resume.

    Raises:
        ValueError: a negative count, or a share outside [0, 1].
    """

    frequency_masks: int = 2
    frequency_share: float = 0.3
    time_masks: int = 2
    time_share: float = 0.1
    _generator: torch.Generator | None = field(default=None, init=False, repr=False, compare=False)
    _process: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("frequency_masks", "time_masks"):
            if getattr(self, name) < 0:
                raise ValueError(f"SpecAugment: {name}={getattr(self, name)}: expected 0 or more")
        for name in ("frequency_share", "time_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"SpecAugment: {name}={getattr(self, name)}: expected a share from 0 to 1")

    def __call__(self, features: torch.Tensor, length: int | None = None, stacked: int = 1) -> torch.Tensor:
        """A masked copy.

        Args:
            features: [T, F] float.
            length: the utterance's own frames; later rows are not masked. None: T.
            stacked: frames stacked in one row (Wav2Vec2-BERT: 2); a frequency mask covers the same bins of
                each.

        Returns:
            [T, F], same dtype.
        """
        length = len(features) if length is None else length
        masked = features.clone()
        if length == 0:
            return masked
        bins = features.shape[1] // stacked
        frames = masked[:length].unflatten(1, (stacked, bins))
        mean = float(features[:length].mean())
        for _ in range(self.frequency_masks):
            start, width = self._span(bins, int(self.frequency_share * bins))
            frames[:, :, start : start + width] = mean
        for _ in range(self.time_masks):
            start, width = self._span(length, int(self.time_share * length))
            frames[start : start + width] = mean
        return masked

    def _span(self, size: int, widest: int) -> tuple[int, int]:
        width = self._draw(widest + 1)
        return self._draw(size - width + 1), width

    def _draw(self, below: int) -> int:
        if self._generator is None or self._process != os.getpid():
            self._process = os.getpid()
            self._generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
        return int(torch.randint(below, (), generator=self._generator))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": None}
