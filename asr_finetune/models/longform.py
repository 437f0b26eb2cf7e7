"""Transcripts of audio of any length, with times: Whisper's own long-form decoding, windows for others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from asr_finetune.config.values import ConfigError
from asr_finetune.models.ctc import CTCRecognizer
from asr_finetune.models.quiet import without_warnings
from asr_finetune.models.recognizer import Recognizer, to_device
from asr_finetune.models.whisper import WhisperRecognizer
from dpkernels.precision import arithmetic

WINDOW_SECONDS, OVERLAP_SECONDS = 20.0, 4.0  # CTC: of one forward, and shared by two neighbours
PAUSE_SECONDS = 0.6  # CTC: a longer time without a label ends a segment
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

    Whisper decodes segment by segment with its own timestamps (transformers' `generate`). A CTC model reads overlapping
    windows; of each overlap the half counts that is further from the window's edge. Another sequence-to-sequence model
    reads one window after the other, each a segment, and may lose a word that a window's edge cuts.

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
            return list(_by_ctc(recognizer, samples, progress))
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


def _by_ctc(recognizer: CTCRecognizer, samples: np.ndarray, progress: Progress) -> Iterator[Segment]:
    times, labels = [], []
    for start, end, frames in _windows(recognizer, samples, progress):
        times += [start + (end - start) * (index + 0.5) / len(frames) for index in range(len(frames))]
        labels += frames
    spoken: list[tuple[float, float, int]] = []  # first and last time of each label
    previous = recognizer.blank
    for time, label in zip(times, labels, strict=True):
        if label == previous and label != recognizer.blank:
            spoken[-1] = (spoken[-1][0], time, label)
        elif label != recognizer.blank:
            spoken.append((time, time, label))
        previous = label
    segment: list[tuple[float, float, int]] = []
    for entry in spoken:
        if segment and entry[0] - segment[-1][1] > PAUSE_SECONDS:
            yield from _segment(recognizer, segment)
            segment = []
        segment.append(entry)
    yield from _segment(recognizer, segment)


def _segment(recognizer: CTCRecognizer, labels: list[tuple[float, float, int]]) -> Iterator[Segment]:
    text = recognizer.text_of([label for _, _, label in labels])
    if text:
        yield Segment(labels[0][0], labels[-1][1], text)


def _windows(
    recognizer: CTCRecognizer, samples: np.ndarray, progress: Progress
) -> Iterator[tuple[float, float, list[int]]]:
    """(start, end, the most likely class of each frame) of the parts that count, which follow on one another."""
    rate = recognizer.sampling_rate
    size, overlap = round(WINDOW_SECONDS * rate), round(OVERLAP_SECONDS * rate)
    for start in range(0, max(len(samples) - overlap, 1), size - overlap):
        window = samples[start : start + size]
        batch = to_device(recognizer.collate([recognizer.encode_audio(window)]), recognizer.device)
        logits, lengths = recognizer.logits(recognizer.model, batch)
        classes = logits[0, : int(lengths[0])].argmax(dim=-1).tolist()
        first = 0 if start == 0 else overlap // 2
        last = len(window) if start + size >= len(samples) else size - overlap // 2
        kept = classes[round(first / len(window) * len(classes)) : round(last / len(window) * len(classes))]
        yield (start + first) / rate, (start + last) / rate, kept
        progress((start + last) / rate)
