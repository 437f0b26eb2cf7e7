"""Corpora of recordings with transcripts, and the dataset that turns them into tensors.

One utterance is one example: what a privacy claim counts, unless the unit is a speaker. Whatever cannot be
used becomes a `Problem`, by name and with its reason. Whether an utterance is a problem depends on its own
record and on public settings only, never on the other records: leaving it out is part of the preparation of
each example, and adding or removing one person's recording changes nothing else. For the same reason repeated
ids are noted, not merged.

Transcripts: `data.text_case` and `data.strip_punctuation` change what is learnt. What is scored is normalised
separately, in `evaluate.normalise` (references and hypotheses alike): neither spells out digits, so a corpus
whose transcripts say "FIVE" does not match a model that writes "5" until one of them is changed.
"""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from asr_finetune.audio import AudioError, Encoded, decode, read_audio
from asr_finetune.augment import SpecAugment
from asr_finetune.config import ConfigError, DataConfig
from asr_finetune.progress import Reporter
from asr_finetune.recognizer import Recognizer

logger = logging.getLogger("asr_finetune")
_SHOWN = 5  # names in a message
_CHECKED_AT_ONCE = 256  # recordings handed to the threads that decode them
CACHE_BYTES = 4 * 2**30  # of features kept by one dataset in one process


@dataclass(frozen=True)
class Utterance:
    """One recording and its transcript: one example.

    Attributes:
        id: its name, for messages.
        path: the audio file, or None.
        array: samples [n] or [n, channels] instead of a file, or None.
        sampling_rate: of `array`, Hz.
        text: the transcript as it is learnt.
        speaker: who speaks, or None where that is not known.
        seconds: duration, from the file's header.
        encoded: an audio file's bytes held elsewhere, instead of `path`.
        place: "file:line" where a manifest lists it, or "".
    """

    id: str
    path: Path | None
    array: np.ndarray | None = field(compare=False)
    sampling_rate: int | None
    text: str
    speaker: str | None
    seconds: float
    encoded: Encoded | None = field(default=None, compare=False, repr=False)
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Problem:
    """An utterance that was left out, and why.

    Attributes:
        id: its name.
        reason: why; up to its first colon the same for all problems of one kind.
        place: "file:line" where a manifest lists it, or "".
    """

    id: str
    reason: str
    place: str = ""

    @property
    def name(self) -> str:
        """The id, with the place: ids may collide."""
        return f"{self.id} ({self.place})" if self.place else self.id

    @property
    def kind(self) -> str:
        """The reason without what is this utterance's own."""
        return self.reason.partition(":")[0]


@dataclass(frozen=True)
class Corpus:
    """Utterances, and what was left out of them.

    Attributes:
        utterances: the examples.
        problems: what was left out.
        source: where they came from, for messages.
    """

    utterances: list[Utterance]
    problems: list[Problem] = field(default_factory=list)
    source: str = ""

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def speakers(self) -> list[str | None]:
        """The speaker of each utterance, in their order."""
        return [utterance.speaker for utterance in self.utterances]

    @property
    def hours(self) -> float:
        """Total duration."""
        return sum(utterance.seconds for utterance in self.utterances) / 3600

    @cached_property
    def notes(self) -> list[str]:
        """What is odd, but was kept: ids and files that appear more than once."""
        notes = []
        ids = Counter(utterance.id for utterance in self.utterances)
        files = Counter(str(utterance.path) for utterance in self.utterances if utterance.path is not None)
        for what, counts in (("ids", ids), ("audio files", files)):
            repeated = [name for name, count in counts.items() if count > 1]
            if repeated:
                notes.append(
                    f"{len(repeated)} {what} appear more than once; each time counts as an example of its "
                    f"own, so the guarantee for such a recording is weaker than stated: {_some(repeated)}"
                )
        return notes

    def summary(self) -> str:
        """Utterances, time, speakers; then what was left out, grouped by reason, and the notes."""
        seconds = 3600 * self.hours
        time = f"{self.hours:.2f} h" if self.hours >= 1 else f"{seconds / 60:.1f} min"
        speakers = {speaker for speaker in self.speakers if speaker is not None}
        known = f", {len(speakers)} speakers" if speakers else ", speakers unknown"
        lines = [f"{len(self)} utterances, {time}{known}"]
        if self.problems:
            kinds = Counter(item.kind for item in self.problems)
            most = "; ".join(f"{count} × {kind}" for kind, count in kinds.most_common(_SHOWN))
            lines.append(f"{len(self.problems)} left out: {most}")
        return "\n".join([*lines, *self.notes])

    def _without(self, reasons: Iterable[str | None]) -> Corpus:
        """Without the utterances that have a reason, which become problems."""
        kept, problems = [], list(self.problems)
        for utterance, reason in zip(self.utterances, reasons, strict=True):
            if reason is None:
                kept.append(utterance)
            else:
                problems.append(Problem(utterance.id, reason, utterance.place))
        return require_utterances(replace(self, utterances=kept, problems=problems))

    def fit(self, recognizer: Recognizer, *, training: bool = True) -> Corpus:
        """Without what the recogniser cannot take, which joins the problems.

        Longer than Whisper's window; too short for one frame; and, for training, transcripts outside the
        vocabulary or with no CTC alignment in that many frames.

        Raises:
            ConfigError: nothing is left.
        """

        def problem(utterance: Utterance) -> str | None:
            reason = recognizer.audio_problem(utterance)
            return recognizer.text_problem(utterance) if reason is None and training else reason

        return self._without(map(problem, self.utterances))

    def decoded(self, reporter: Reporter, name: str) -> Corpus:
        """Without what does not decode: every file is read to its end once, as its header alone does not show.

        Args:
            reporter: progress.
            name: of the progress bar.

        Raises:
            ConfigError: nothing is left.
        """

        def problem(utterance: Utterance) -> str | None:
            try:
                decode(utterance)
            except AudioError as error:
                return str(error)
            return None

        reasons: list[str | None] = []
        threads = ThreadPoolExecutor(os.cpu_count())  # libsndfile works without Python's lock
        with threads, reporter.bar(name, len(self)) as bar:
            for start in range(0, len(self), _CHECKED_AT_ONCE):
                reasons += threads.map(problem, self.utterances[start : start + _CHECKED_AT_ONCE])
                bar.update(len(reasons))
        return self._without(reasons)


def require_utterances(corpus: Corpus) -> Corpus:
    """The corpus, if there is something in it.

    Raises:
        ConfigError: there is not; with the first problems.
    """
    if corpus.utterances:
        return corpus
    found = (
        f"all {len(corpus.problems)} recordings were left out" if corpus.problems else "no recordings match"
    )
    listed = "".join(f"\n  {item.name}: {item.reason}" for item in corpus.problems[:_SHOWN])
    raise ConfigError(
        f"{corpus.source}: no usable utterance: {found}; check the split, data.corpus, data.speakers, "
        f"data.exclude_speakers, data.min_seconds and data.max_seconds{listed}"
    )


def prepare_text(text: str, data: DataConfig) -> str:
    """A transcript as it is learnt: single spaces, case, and on request no punctuation but apostrophes."""
    if data.strip_punctuation:
        text = "".join(
            " " if unicodedata.category(char).startswith("P") and char not in "'’" else char for char in text
        )
    text = " ".join(text.split())
    return {"keep": text, "lower": text.lower(), "upper": text.upper()}[data.text_case]


def load_corpus(source: str, *, split: str | None = None, data: DataConfig) -> Corpus:
    """Read what recordings there are: headers and transcripts, no samples.

    Args:
        source: a LibriSpeech tree (a folder with *.trans.txt somewhere below), a manifest (*.jsonl), or a
            `datasets` id ("name" or "name:configuration"), saved dataset or dataset folder. A manifest's line
            holds audio (path, relative to the manifest), text, and optionally utt_id, speaker, split and
            corpus.
        split: LibriSpeech subset folder ("train-clean-100+train-clean-360"), value of `split` in a manifest,
            or split of a dataset; None: everything.
        data: filters, limits, and how transcripts are prepared.

    Raises:
        ConfigError: no such source or split, or nothing usable in it. Single bad recordings are
            `Corpus.problems`.
    """
    from asr_finetune import sources

    return require_utterances(sources.read(source, split, data))


def _size(item: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in item.values())


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


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
