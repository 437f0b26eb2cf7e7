"""Corpora: recordings with transcripts, and what was left out of them.

One utterance is one example: what a privacy claim counts, unless the unit is a speaker. Whatever cannot be
used becomes a `Problem`, by name and with its reason. Whether an utterance is a problem depends on its own
record and on public settings only, never on the other recordings: leaving it out is part of the preparation of
each example, and adding or removing one person's recording changes nothing else. All listings of one recording are
one example, whatever id they have: the first is kept. Repeated ids of unlike recordings are noted, not merged.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asr_finetune.config.schema import ConfigError
from asr_finetune.data.audio import AudioError, Encoded, decode
from asr_finetune.data.repeats import first_listed
from asr_finetune.progress import Reporter

if TYPE_CHECKING:
    from asr_finetune.models.recognizer import Recognizer

_SHOWN = 5  # names in a message
_CHECKED_AT_ONCE = 256  # recordings handed to the threads that decode them


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
        digest: of `encoded`, by which repeats are found; see `repeats.digest`.
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
    digest: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The id, with the place: ids may collide."""
        return _name(self.id, self.place)


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
        return _name(self.id, self.place)

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
        disputed: names of the recordings that are listed under more than one speaker.
    """

    utterances: list[Utterance]
    problems: list[Problem] = field(default_factory=list)
    source: str = ""
    disputed: tuple[str, ...] = ()

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
        """What is odd, but was kept: ids that several recordings have."""
        ids = Counter(utterance.id for utterance in self.utterances)
        repeated = [name for name, count in ids.items() if count > 1]
        if not repeated:
            return []
        return [
            f"{len(repeated)} ids are of more than one recording; each recording counts as an example of its own: "
            f"{_some(repeated)}"
        ]

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

    def distinct(self) -> Corpus:
        """Each recording once, as it is listed first; its repeats become problems, see `repeats.first_listed`."""
        reasons: list[str | None] = []
        disputed: dict[str, None] = {}
        for place, (item, first) in enumerate(
            zip(self.utterances, first_listed(self.utterances), strict=True)
        ):
            kept = self.utterances[first]
            repeat = f"the same recording as one listed before: {kept.name}"
            reasons.append(None if place == first else repeat)
            if item.speaker != kept.speaker:
                disputed[kept.name] = None
        return replace(self._without(reasons), disputed=tuple(disputed))

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


def _name(identity: str, place: str) -> str:
    return f"{identity} ({place})" if place else identity


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
