"""The utterances of a plan: their lengths, and noise of these lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from asr_finetune.config.schema import ConfigError
from asr_finetune.data.corpus import Corpus
from asr_finetune.models.recognizer import Recognizer

# LibriSpeech's mean, which a plan without data assumes.
TYPICAL_SECONDS = 12.3
TYPICAL_LABELS_PER_SECOND = 4.0


@dataclass(frozen=True)
class Speech:
    """The utterances of a plan: seconds of the mean and the longest one, and labels per second."""

    mean: float
    longest: float
    labels_per_second: float

    def item(self, recognizer: Recognizer, seconds: float) -> dict[str, torch.Tensor]:
        """Noise of that length and a made-up transcript, as an item for `Recognizer.collate`."""
        noise = np.random.default_rng(0).normal(size=max(round(seconds * recognizer.sampling_rate), 1))
        # Two alternating classes, neither of them padding or blank; time and memory do not depend on the classes.
        config = recognizer.base.config
        special = (config.pad_token_id, getattr(config, "blank_token_id", None))
        first, second = [number for number in range(4) if number not in special][:2]
        labels = max(1, round(seconds * self.labels_per_second))
        text = torch.tensor([first, second] * labels)[:labels]
        return {**recognizer.encode_audio(0.1 * noise.astype(np.float32)), "labels": text}


def typical_speech(recognizer: Recognizer, corpus: Corpus | None, seconds: float | None = None) -> Speech:
    """The lengths of a corpus; without one, `seconds`, by default `TYPICAL_SECONDS` or the model's window if shorter.

    Raises:
        ConfigError: `seconds` is above the model's window.
    """
    window = float(getattr(recognizer, "window_seconds", math.inf))
    if seconds is not None and seconds > window:
        raise ConfigError(
            f"plan: --seconds {seconds:g} is longer than the model's window of {window:g} s: lower it, or raise "
            "model.window_seconds"
        )
    seconds = min(TYPICAL_SECONDS, window) if seconds is None else seconds
    if corpus is None:
        return Speech(seconds, seconds, TYPICAL_LABELS_PER_SECOND)
    lengths = [utterance.seconds for utterance in corpus.utterances]
    longest = float(np.max(lengths))
    text = max((utterance.text for utterance in corpus.utterances), key=len)
    return Speech(float(np.mean(lengths)), longest, len(recognizer.encode_text(text)) / longest)
