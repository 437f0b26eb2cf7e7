"""Corpora: recordings with transcripts, and the problems that were left out.

One utterance is one example, the unit of a privacy claim unless the unit is a speaker. Every unusable utterance becomes
a `Problem` with its name and reason. Whether an utterance is a problem depends only on its own record and on public
settings, never on other recordings: adding or removing one person's recording therefore changes nothing else. All
listings of one recording are one example, whatever their ids; the first listing is kept. Ids that different recordings
share are noted, and the recordings are not merged.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from asr_finetune.config.schema import ConfigError
from asr_finetune.console import Reporter
from asr_finetune.data.audio import decode
from asr_finetune.data.repeats import same_audio
from asr_finetune.data.utterance import AudioError, Problem, Utterance

_SHOWN = 5  # names in a message
_DECODED_AT_ONCE = 32  # recordings that the decoding threads receive at once, and whose samples are held


@dataclass(frozen=True)
class Corpus:
    """Utterances, and the problems that were left out.

    Attributes:
        utterances: the examples.
        problems: the utterances left out, with reasons.
        source: the corpus's source, for messages.
        disputed: names of the recordings that are listed under more than one speaker.
        cut: names of utterances, one of each recording that several utterances are pieces of.
        overlapping: such pieces that share samples, in pairs.
        copied: names of utterances that may be copies, in another format, of one in another source.
    """

    utterances: list[Utterance]
    problems: list[Problem] = field(default_factory=list)
    source: str = ""
    disputed: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    overlapping: tuple[tuple[Utterance, Utterance], ...] = ()
    copied: tuple[str, ...] = ()

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

    @property
    def doubts(self) -> list[Problem]:
        """The utterances that were kept, but should be listened to, with reasons."""
        return [Problem(item.id, doubt, item.place) for item in self.utterances for doubt in item.doubts]

    @cached_property
    def notes(self) -> list[str]:
        """Notes on utterances that were kept: ids that several recordings share, and copies in another source."""
        ids = Counter(utterance.id for utterance in self.utterances)
        repeated = [name for name, count in ids.items() if count > 1]
        notes = []
        if repeated:
            notes.append(
                f"{len(repeated)} ids belong to more than one recording; each recording counts as an example of its "
                f"own: {_some(repeated)}"
            )
        if self.copied:
            notes.append(
                f"{len(self.copied)} recordings have the name, transcript and length of one in another source: if they "
                f"are copies of it, leave them out, since ε does not cover a recording twice: {_some(self.copied)}"
            )
        return notes

    def summary(self) -> str:
        """Utterances, time and speakers; then the problems, grouped by reason, and the notes."""
        seconds = 3600 * self.hours
        time = f"{self.hours:.2f} h" if self.hours >= 1 else f"{seconds / 60:.1f} min"
        speakers = {speaker for speaker in self.speakers if speaker is not None}
        known = f", {len(speakers)} speakers" if speakers else ", speakers unknown"
        lines = [f"{len(self)} utterances, {time}{known}"]
        for problems, what in ((self.problems, "left out"), (self.doubts, "kept, but listen to them")):
            kinds = Counter(item.kind for item in problems)
            most = "; ".join(f"{count} × {kind}" for kind, count in kinds.most_common(_SHOWN))
            if problems:
                lines.append(f"{len(problems)} {what}: {most}")
        return "\n".join([*lines, *self.notes])

    def without(self, reasons: Iterable[str | None]) -> Corpus:
        """The corpus without the utterances that have a reason; these become problems.

        Raises:
            ConfigError: no utterance is left.
        """
        kept, problems = [], list(self.problems)
        for utterance, reason in zip(self.utterances, reasons, strict=True):
            if reason is None:
                kept.append(utterance)
            else:
                problems.append(Problem(utterance.id, reason, utterance.place))
        return require_utterances(replace(self, utterances=kept, problems=problems))

    def distinct(self) -> Corpus:
        """The corpus with the first listing of each recording (or piece of one); repeats become problems."""
        reasons: list[str | None] = []
        disputed: dict[str, None] = {}
        kept: dict[Hashable, dict[Any, Utterance]] = defaultdict(dict)  # by recording, then by piece
        for item, label in zip(self.utterances, same_audio(self.utterances), strict=True):
            first = kept[label].setdefault(item.piece, item)
            repeat = f"the same recording as one listed before: {first.name}"
            reasons.append(None if first is item else repeat)
            if item.speaker != first.speaker:
                disputed[first.name] = None
        cut = [sorted(pieces.values(), key=_extent) for pieces in kept.values() if len(pieces) > 1]
        pairs = ((a, b) for pieces in cut for a, b in pairwise(pieces) if _extent(b)[0] < _extent(a)[1])
        return replace(
            self.without(reasons),
            disputed=tuple(disputed),
            cut=tuple(pieces[0].name for pieces in cut),
            overlapping=tuple(pairs),
        )

    def decoded(
        self,
        reporter: Reporter,
        name: str,
        read: Callable[[Utterance], Any] = decode,
        use: Callable[[int, Utterance, Any], None] | None = None,
    ) -> Corpus:
        """The corpus without recordings that do not decode. Every file is decoded once: its header is no proof.

        Args:
            reporter: shows the progress.
            name: the name of the progress bar.
            read: decodes a recording, in one of several threads; raises AudioError if that fails.
            use: receives each recording that decodes: its place in the corpus returned, the utterance, and the result
                of `read`, which is not kept. It is called in this thread, in the order of the places.

        Raises:
            ConfigError: no utterance is left.
        """

        def attempt(utterance: Utterance) -> Any:
            try:
                return read(utterance)
            except AudioError as error:
                return error

        reasons: list[str | None] = []
        place = 0
        threads = ThreadPoolExecutor(os.cpu_count())  # libsndfile works without Python's lock
        with threads, reporter.bar(name, len(self)) as bar:
            for start in range(0, len(self), _DECODED_AT_ONCE):
                utterances = self.utterances[start : start + _DECODED_AT_ONCE]
                for utterance, result in zip(utterances, threads.map(attempt, utterances), strict=True):
                    if isinstance(result, AudioError):
                        reasons.append(str(result))
                        continue
                    reasons.append(None)
                    if use is not None:
                        use(place, utterance, result)
                    place += 1
                bar.update(len(reasons))
        return self.without(reasons)


def require_utterances(corpus: Corpus) -> Corpus:
    """The corpus, which must have utterances.

    Raises:
        ConfigError: it has none; the message lists the first problems.
    """
    if corpus.utterances:
        return corpus
    reason = (
        f"all {len(corpus.problems)} recordings were left out" if corpus.problems else "no recordings match"
    )
    listed = "".join(f"\n  {item.name}: {item.reason}" for item in corpus.problems[:_SHOWN])
    raise ConfigError(
        f"{corpus.source}: no usable utterance: {reason}; check the split, data.corpus, data.speakers, "
        f"data.exclude_speakers, data.min_seconds and data.max_seconds{listed}"
    )


def _extent(item: Utterance) -> tuple[float, float]:
    """Where an utterance starts and ends in its recording, in seconds."""
    return item.piece or (0.0, item.seconds)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
