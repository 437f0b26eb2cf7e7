"""Transcripts of audio of any length, with times: Whisper's own long-form decoding, windows for others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asr_finetune.config.values import ConfigError
from asr_finetune.models.ctc import CTCRecognizer
from asr_finetune.models.quiet import without_warnings
from asr_finetune.models.recognizer import Recognizer, to_device
from asr_finetune.models.transducer import TransducerRecognizer
from asr_finetune.models.whisper import WhisperRecognizer
from dpkernels.precision import arithmetic

WINDOW_SECONDS, OVERLAP_SECONDS = 20.0, 4.0  # of one window, and shared by two neighbours
PAUSE_SECONDS = 0.6  # a longer time without a label ends a segment
# Whisper's generate() passes arguments to itself in a way that it warns of.
_OF_GENERATE = "Passing `generation_config` together with generation-related arguments"
_FRAME_SECONDS = 0.01  # of Whisper's features

Progress = Callable[[float], None]  # gets the seconds that are done


@dataclass(frozen=True)
class Segment:
    """A piece of a transcript.

    Attributes:
        start: of its speech, in seconds from the recording's start.
        end: of its speech.
        text: the transcript.
    """

    start: float
    end: float
    text: str


@torch.inference_mode()
def transcribe_long(recognizer: Recognizer, samples: np.ndarray, progress: Progress) -> list[Segment]:
    """The transcript of a recording of any length.

    Whisper decodes segment by segment with its own timestamps (transformers' `generate`). A CTC model or a
    transducer reads overlapping windows; of each overlap the half counts that is further from the window's edge.
    Another sequence-to-sequence model reads one window after the other, each a segment, and may lose a word that a
    window's edge cuts.

    Args:
        recognizer: in any mode; it is evaluated.
        samples: [n] float32 at the recogniser's rate.
        progress: is told the seconds that are done.

    Raises:
        ConfigError: a Whisper checkpoint without timestamps, for more audio than its window.
    """
    recognizer.model.eval()
    with arithmetic(recognizer.dtype, recognizer.device):
        if isinstance(recognizer, WhisperRecognizer):
            return _by_whisper(recognizer, samples, progress)
        if isinstance(recognizer, CTCRecognizer):
            return list(_segments(recognizer, list(_by_ctc(recognizer, samples, progress))))
        if isinstance(recognizer, TransducerRecognizer):
            return list(_segments(recognizer, list(_by_transducer(recognizer, samples, progress))))
        return list(_by_pieces(recognizer, samples, progress))


def _by_whisper(recognizer: WhisperRecognizer, samples: np.ndarray, progress: Progress) -> list[Segment]:
    seconds = len(samples) / recognizer.sampling_rate
    no_timestamps = recognizer.tokenizer.convert_tokens_to_ids("<|notimestamps|>")
    # Times are the tokens behind this one; a checkpoint that was trained without them has none.
    if no_timestamps is None or recognizer.classes <= no_timestamps + 1:
        raise ConfigError(
            f"{recognizer.name} has no tokens for times, so it takes {recognizer.window_seconds:g} s of audio at most, "
            f"not {seconds:.1f} s: cut the recording, or use a checkpoint with timestamps"
        )
    generation = copy.deepcopy(recognizer.base.generation_config)
    generation.no_timestamps_token_id = int(no_timestamps)
    generation.num_beams, generation.do_sample = 1, False
    features = recognizer.feature_extractor(
        samples,
        sampling_rate=recognizer.sampling_rate,
        truncation=False,
        padding="max_length" if seconds <= recognizer.window_seconds else "longest",
        max_length=round(recognizer.window_seconds * recognizer.sampling_rate),
        return_attention_mask=True,
        return_tensors="pt",
    )
    dtype = next(recognizer.model.parameters()).dtype
    spoken = {"language": recognizer.language, "task": recognizer.task} if recognizer.multilingual else {}
    with without_warnings(_OF_GENERATE):
        result = recognizer.base.generate(
            features["input_features"].to(recognizer.device, dtype),
            attention_mask=features["attention_mask"].to(recognizer.device),
            generation_config=generation,
            return_timestamps=True,
            return_segments=True,
            monitor_progress=lambda seek: progress(float(seek[0, 0]) * _FRAME_SECONDS),
            **spoken,
        )
    found = []
    for segment in result["segments"][0]:
        text = recognizer.tokenizer.decode(segment["tokens"], skip_special_tokens=True).strip()
        if text:
            found.append(Segment(float(segment["start"]), min(float(segment["end"]), seconds), text))
    return found


def _by_pieces(recognizer: Recognizer, samples: np.ndarray, progress: Progress) -> Iterator[Segment]:
    rate = recognizer.sampling_rate
    size = round(WINDOW_SECONDS * rate)
    for start in range(0, len(samples), size):
        piece = samples[start : start + size]
        end = (start + len(piece)) / rate
        # The rest behind the last whole window may be too short for a frame.
        if recognizer.inputs.frames(len(piece)) > 1:
            (text,) = recognizer.transcribe(recognizer.collate([recognizer.encode_audio(piece)]))
            if text:
                yield Segment(start / rate, end, text)
        progress(end)


Spoken = tuple[float, float, int]
"""First and last time of a label, and the label."""


def _by_ctc(recognizer: CTCRecognizer, samples: np.ndarray, progress: Progress) -> Iterator[Spoken]:
    spoken: list[Spoken] = []
    previous = recognizer.blank
    for window in _windows(recognizer, samples):
        logits, lengths = recognizer.logits(recognizer.model, window.batch)
        classes = logits[0, : int(lengths[0])].argmax(dim=-1).tolist()
        for index in range(*window.counted(len(classes))):
            label, time = classes[index], window.time(index + 0.5, len(classes))
            if label == previous and label != recognizer.blank:
                spoken[-1] = (spoken[-1][0], time, label)
            elif label != recognizer.blank:
                spoken.append((time, time, label))
            previous = label
        progress(window.end)
    yield from spoken


def _by_transducer(
    recognizer: TransducerRecognizer, samples: np.ndarray, progress: Progress
) -> Iterator[Spoken]:
    for window in _windows(recognizer, samples):
        frames = int(recognizer.frames(window.batch["attention_mask"].sum(dim=1))[0])
        first, last = window.counted(frames)
        for index, label in recognizer.emitted(window.batch)[0]:
            if first <= index < last:
                time = window.time(index + 0.5, frames)
                yield time, time, label
        progress(window.end)


def _segments(
    recognizer: CTCRecognizer | TransducerRecognizer, spoken: Sequence[Spoken]
) -> Iterator[Segment]:
    segment: list[Spoken] = []
    for entry in spoken:
        if segment and entry[0] - segment[-1][1] > PAUSE_SECONDS:
            yield from _segment(recognizer, segment)
            segment = []
        segment.append(entry)
    yield from _segment(recognizer, segment)


def _segment(recognizer: CTCRecognizer | TransducerRecognizer, labels: Sequence[Spoken]) -> Iterator[Segment]:
    text = recognizer.text_of([label for _, _, label in labels])
    if text:
        yield Segment(labels[0][0], labels[-1][1], text)


@dataclass(frozen=True)
class _Window:
    """A batch of one window of a recording.

    Attributes:
        batch: from `Recognizer.collate`, on the model's device.
        offset, seconds: where the window begins, and its length.
        start, end: the part that counts; the parts of all windows follow on one another.
    """

    batch: dict[str, Any]
    offset: float
    seconds: float
    start: float
    end: float

    def time(self, place: float, frames: int) -> float:
        """The time of a place among so many frames of the window."""
        return self.offset + self.seconds * place / frames

    def counted(self, frames: int) -> tuple[int, int]:
        """The first frame that counts, and the first behind it that does not."""
        shares = ((self.start - self.offset) / self.seconds, (self.end - self.offset) / self.seconds)
        return round(shares[0] * frames), round(shares[1] * frames)


def _windows(recognizer: Recognizer, samples: np.ndarray) -> Iterator[_Window]:
    rate = recognizer.sampling_rate
    size, overlap = round(WINDOW_SECONDS * rate), round(OVERLAP_SECONDS * rate)
    for start in range(0, max(len(samples) - overlap, 1), size - overlap):
        window = samples[start : start + size]
        batch = to_device(recognizer.collate([recognizer.encode_audio(window)]), recognizer.device)
        first = 0 if start == 0 else overlap // 2
        last = len(window) if start + size >= len(samples) else size - overlap // 2
        places = (start, len(window), start + first, start + last)
        yield _Window(batch, *(place / rate for place in places))
