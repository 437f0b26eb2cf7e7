"""Word and character error rates, with a bootstrap interval over utterances."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jiwer
import numpy as np
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from asr_finetune.config.schema import ConfigError, EvaluateConfig
from asr_finetune.console import Reporter
from asr_finetune.data.corpus import Corpus
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.training.dataset import SpeechDataset
from dpkernels.privacy import Ranks

# A fixed seed, so that others can recompute the interval.
BOOTSTRAP_SEED = 0
BOOTSTRAP_LEVEL = 0.95
_APOSTROPHES = "'’ʼ`"
_ENGLISH = EnglishTextNormalizer({})


@dataclass(frozen=True)
class Evaluation:
    """Error rates of one recogniser on one corpus.

    Attributes:
        wer: word errors (substitutions + deletions + insertions) over reference words.
        cer: the same for characters, spaces between words included.
        wer_ci: 95 % bootstrap interval of `wer` over utterances, or None if it was not requested.
        utterances: number of utterances.
        words: number of reference words, after normalisation.
        hypotheses: (id, normalised reference, normalised hypothesis) of every utterance, in the corpus's
            order.
        left_out: number of the corpus's recordings that were left out, by the kind of reason.
    """

    wer: float
    cer: float
    wer_ci: tuple[float, float] | None
    utterances: int
    words: int
    hypotheses: list[tuple[str, str, str]]
    left_out: dict[str, int] = field(default_factory=dict)

    def to_dict(self, *, hypotheses: bool = False) -> dict[str, Any]:
        """Plain values; the texts only on request, since they are the content of the test set."""
        values: dict[str, Any] = {
            "wer": self.wer,
            "cer": self.cer,
            "wer_ci": list(self.wer_ci) if self.wer_ci else None,
            "utterances": self.utterances,
            "words": self.words,
            "left_out": self.left_out,
        }
        if hypotheses:
            values["hypotheses"] = [list(entry) for entry in self.hypotheses]
        return values

    def __str__(self) -> str:
        interval = f" ({self.wer_ci[0]:.1%} to {self.wer_ci[1]:.1%})" if self.wer_ci else ""
        rates = f"WER {self.wer:.1%}{interval}, CER {self.cer:.1%}"
        missing = sum(self.left_out.values())
        of_all = f" of {self.utterances + missing}" if missing else ""
        return f"{rates} on {self.utterances}{of_all} utterances, {self.words} words"


def normalise(text: str, how: str = "basic") -> str:
    """The normalised text, as it is scored.

    "basic": Unicode NFKC; lower case; apostrophes removed (`don't` = `dont`); all other punctuation (Unicode
    categories P*) replaced by a space; runs of spaces collapsed. Numbers, abbreviations and spelling
    variants are unchanged, so the figures are not comparable with those of Whisper's English normaliser.
    "english": that normaliser (Radford et al. 2022, appendix C) in transformers' version, without its list of
    British spellings: "twenty one" = "21", contractions written out, fillers dropped.
    "none": only outer spaces are removed.

    Raises:
        ConfigError: `how` has another value.
    """
    if how == "none":
        return text.strip()
    if how == "english":
        return str(_ENGLISH(text)).strip()
    if how != "basic":
        raise ConfigError(f"normalize={how!r}: expected 'basic', 'english' or 'none'")
    text = unicodedata.normalize("NFKC", text).lower()
    kept = (
        "" if char in _APOSTROPHES else " " if unicodedata.category(char).startswith("P") else char
        for char in text
    )
    return " ".join("".join(kept).split())


def score(entries: Sequence[tuple[str, str, str]], config: EvaluateConfig) -> Evaluation:
    """Error rates of (id, reference, hypothesis) entries.

    An empty reference has no words, and every word of its hypothesis is an insertion.

    Raises:
        ConfigError: there are no entries, or none has a reference word (the rate would be 0/0).
    """
    if not entries:
        raise ConfigError("evaluation: the corpus holds no utterances; check data.test and its filters")
    texts = [
        (name, normalise(ref, config.normalize), normalise(hyp, config.normalize))
        for name, ref, hyp in entries
    ]
    words = np.array([_word_counts(reference, hypothesis) for _, reference, hypothesis in texts])
    chars = np.array([_character_counts(reference, hypothesis) for _, reference, hypothesis in texts])
    if words[:, 1].sum() == 0:
        raise ConfigError(
            "evaluation: every reference is empty, so there is no error rate; check the transcripts"
        )
    return Evaluation(
        wer=float(words[:, 0].sum() / words[:, 1].sum()),
        cer=float(chars[:, 0].sum() / chars[:, 1].sum()),
        wer_ci=bootstrap_interval(words, config.bootstrap) if config.bootstrap else None,
        utterances=len(texts),
        words=int(words[:, 1].sum()),
        hypotheses=texts,
    )


def bootstrap_interval(counts: np.ndarray, resamples: int) -> tuple[float, float]:
    """Percentile interval of Σ errors / Σ words over utterances drawn with replacement.

    Args:
        counts: [N, 2], errors and words of each utterance.
        resamples: number of resamples. The generator's seed is fixed: the same counts give the same interval.
    """
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    size = len(counts)
    totals = np.empty((resamples, 2))
    for index in range(resamples):
        totals[index] = counts[generator.integers(size, size=size)].sum(axis=0)
    totals = totals[totals[:, 1] > 0]  # a resample without reference words has no rate
    tail = 100 * (1 - BOOTSTRAP_LEVEL) / 2
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [tail, 100 - tail])
    return float(low), float(high)


def _word_counts(reference: str, hypothesis: str) -> tuple[int, int]:
    output = jiwer.process_words(reference, hypothesis)
    errors = output.substitutions + output.deletions + output.insertions
    return errors, output.hits + output.substitutions + output.deletions


def _character_counts(reference: str, hypothesis: str) -> tuple[int, int]:
    output = jiwer.process_characters(reference, hypothesis)
    errors = output.substitutions + output.deletions + output.insertions
    return errors, output.hits + output.substitutions + output.deletions


def evaluate(
    recognizer: Recognizer,
    corpus: Corpus,
    config: EvaluateConfig,
    *,
    dataset: SpeechDataset | None = None,
    reporter: Reporter | None = None,
    name: str = "evaluate",
    ranks: Ranks | None = None,
) -> Evaluation:
    """Transcribe a corpus and score it. A recording that can no longer be read is left out, and counted.

    Args:
        recognizer: decodes greedily, or chooses from `config.restrict_to`.
        corpus: references and audio.
        config: batch size (1 if the recogniser's result would depend on padding), restriction, bootstrap,
            normalisation.
        dataset: the corpus's dataset, which caches its features for several evaluations; None: a new one without a
            cache.
        reporter: progress; None prints nothing.
        name: of the progress bar.
        ranks: the processes that share the work; each gets the whole result.

    Raises:
        ConfigError: the corpus is empty, or has empty references only.
    """
    reporter = reporter or Reporter(enabled=False)
    utterances, size = corpus.utterances, config.batch_size
    if recognizer.equal_lengths_only and size > 1:
        reporter.say(f"{name}: one utterance at a time, since {recognizer.equal_lengths_only}")
        size = 1
    if dataset is None:
        dataset = SpeechDataset(corpus, recognizer, cache=False, augment=None)
    # Utterances of similar length share a batch: less padding, and the largest batch comes first.
    order = sorted(range(len(utterances)), key=lambda index: -recognizer.length(utterances[index]))
    ranks = ranks or Ranks()
    order = order[ranks.rank :: ranks.size]
    transcribed: dict[int, str] = {}
    with reporter.bar(name, len(order)) as bar:
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            items = {index: dataset[index] for index in chosen}
            read = [index for index in chosen if index not in dataset.unread]
            if read:
                batch = recognizer.collate([items[index] for index in read])
                texts = recognizer.transcribe(batch, restrict_to=config.restrict_to)
                transcribed.update(zip(read, texts, strict=True))
            bar.update(min(start + size, len(order)))
    unread = [problem for index, problem in dataset.unread.items() if index in order]
    by_index: dict[int, str] = {}
    left_out = Counter(problem.kind for problem in corpus.problems)
    for texts_of_rank, unread_by_rank in ranks.gathered((transcribed, unread)):
        by_index |= texts_of_rank
        left_out.update(problem.kind for problem in unread_by_rank)
    entries = [
        (item.id, item.text, by_index[index]) for index, item in enumerate(utterances) if index in by_index
    ]
    return replace(score(entries, config), left_out=dict(left_out))
