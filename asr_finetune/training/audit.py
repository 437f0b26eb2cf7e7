"""`asr-finetune audit`: train a configuration with canaries, attack the result, and state what the attack shows of ε.

A canary is a recording of the run's own data whose transcript is replaced by public words at random. Each of m canaries
is included with probability 1/2 by a secret coin (`dpkernels.auditing.CanaryDataset`). A recording is in the data once,
as itself or as a canary, so N, q, σ and C are those of the configuration, and ε is stated for the same change of the
data: one recording more or less.

The audited run is a run of its own, in a folder of its own: its model has learnt wrong transcripts, and is for nobody.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.console import Reporter
from asr_finetune.data.sources import prepare_text
from asr_finetune.data.utterance import Utterance
from asr_finetune.files import write_json
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.training.dataset import SpeechDataset
from asr_finetune.training.loop import epsilon_spent
from asr_finetune.training.processes import joined
from asr_finetune.training.run import complete
from asr_finetune.training.run_folder import RunFolderError
from asr_finetune.training.start import Run
from dpkernels.auditing import LowerBound, draw_coins, lower_bound, read_coins, write_coins
from dpkernels.errors import UserError
from dpkernels.rounding import shown_epsilon, shown_lower_bound

CANARIES = 1000
"""Canaries of an audit, where the data has at least twice as many recordings; else half of them."""
_WORDS = """
a about after again all also an and any apple as ask at away back be because before big blue book but by call can come
could day did do door down even every eye far find first for four from garden get give go good green had hand have he
her here high him his house how if in into it just keep know last left light like little long look low made make man
many may me more morning most move mother much must my name near never new next night no not now of off old on one only
open or other our out over own paper people place play put red right river room run said same say school sea see she
should show small so some stand still stop street such sun take tell ten than that the their them then there they thing
think this three through time to too town tree turn two under up us use very walk want was water way we well went were
what when where which white who why will window winter with word work world would year yes you young your
"""
PUBLIC_WORDS = tuple(_WORDS.split())
"""Common English words: the sentences of canaries are drawn from them by default."""
_BINS = 20  # of the plot
_DRAWS = 50  # of a sentence, until one is not the recording's own: of two words, all fail once in 10¹⁵


@dataclass
class AuditedRun(Run):
    """A run whose training data holds canaries.

    Attributes:
        canaries: m; None: CANARIES, or half of the recordings if they are fewer than twice as many.
        words: public words that canaries' sentences are drawn from.
        confidence: of the lower bound.
    """

    audited: ClassVar[bool] = True
    canaries: int | None = None
    words: Sequence[str] = PUBLIC_WORDS
    confidence: float = 0.95
    _start: np.ndarray | None = field(default=None, init=False)
    _scored: SpeechDataset = field(init=False)

    def training_data(self) -> str:
        """Load the training data as for any run, and put canaries in the places of some recordings."""
        if self.ranks.size > 1:
            raise UserError(
                f"asr-finetune audit takes one process, got {self.ranks.size}: start it without torchrun"
            )
        summary = super().training_data()
        corpus = self.corpus
        noted = self.folder.read_json(self.folder.canaries)
        if noted is None:
            noted = self._new_canaries(corpus.utterances)
            self._note(noted)
        places, texts = noted["places"], noted["texts"]
        if self.canaries not in (None, len(places)):
            raise ConfigError(
                f"--canaries {self.canaries}: the audit in {self.folder.path} began with {len(places)}: leave it out, "
                "or give another --output"
            )
        if not self.folder.coins.is_file():
            write_coins(self.folder.coins, draw_coins(len(places)))
        self.coins = read_coins(self.folder.coins)
        self._start = None if noted["start"] is None else np.array(noted["start"], dtype=float)
        chosen = set(places)
        others = [item for place, item in enumerate(corpus.utterances) if place not in chosen]
        canaries = [
            replace(corpus.utterances[place], text=text) for place, text in zip(places, texts, strict=True)
        ]
        self.dataset = SpeechDataset(
            replace(corpus, utterances=others + canaries),
            self.recognizer,
            cache=self.config.train.cache_features,
            augment=self.dataset.augment,
        )
        self._scored = SpeechDataset(replace(corpus, utterances=canaries), self.recognizer)
        said = f"{len(canaries)} of the recordings are canaries, each included by a secret coin"
        self.reporter.say(said)
        return f"{summary}\n{said}"

    def _new_canaries(self, utterances: Sequence[Utterance]) -> dict[str, Any]:
        """Recordings at random, with sentences at random: by the public seed, for only the coins must be secret."""
        count = self.canaries if self.canaries is not None else min(CANARIES, len(utterances) // 2)
        if not 1 <= count <= len(utterances):
            raise ConfigError(
                f"--canaries {count}: expected from 1 to the {len(utterances):,} training recordings; some hundreds "
                "are needed to show anything"
            )
        generator = random.Random(self.config.train.seed)
        places = generator.sample(range(len(utterances)), count)
        words = _known_words(self.words, self.recognizer, self.config)
        texts = [sentence(utterances[place], words, generator, self.recognizer) for place in places]
        return {"places": places, "texts": texts, "start": None}

    def _note(self, values: dict[str, Any]) -> None:
        write_json(self.folder.canaries, values, secret=True)

    def test_data(self) -> str:
        """Read no test set: the error rates of a model with wrong transcripts say nothing about the run."""
        summary = "an audit measures no error rates: no test data is read"
        self.reporter.say(summary)
        return summary

    def before_steps(self) -> None:
        """Measure each canary's loss under the starting model, before the first step; a resumed run has it."""
        if self._start is None:
            self._start = self._losses("audit: losses before training")
            self._note({**self.folder.read_json(self.folder.canaries), "start": _plain(self._start)})

    def after_steps(self) -> None:
        """Score the canaries, and write audit.json."""
        assert self._start is not None  # before_steps measures it
        assert self.coins is not None
        assert self.config.privacy.delta is not None  # check_trainable ensures it
        final = self._losses("audit: losses after training")
        scores = scores_of(self._start, final)
        self._note({**self.folder.read_json(self.folder.canaries), "final": _plain(final)})
        bound = lower_bound(scores, self.coins, delta=self.config.privacy.delta, confidence=self.confidence)
        stated = epsilon_spent(self)
        record = audit_record(bound, scores, self.coins, stated)
        write_json(self.folder.audit, record)
        upper = "infinite, for there is no noise" if stated is None else f"at most {shown_epsilon(stated)}"
        shown = f"{shown_lower_bound(bound.epsilon)} at {bound.confidence:.0%} confidence"
        self.reporter.say(
            f"audit [not private]: epsilon is at least {shown}{'' if bound.epsilon else ' (nothing was shown)'}; by "
            f"the accountant it is {upper}",
            style="bold",
        )
        self.reporter.say(
            f"audit [not private]: {bound.correct} of {bound.guesses.total} guesses about {bound.canaries} canaries "
            f"were correct, {bound.guesses.total / 2:g} are expected by chance; all correct would show "
            f"{shown_lower_bound(bound.largest)}"
        )
        if record["contradicts"]:
            self.reporter.say(
                "audit: the lower bound is above the stated epsilon: the run does NOT keep its claim",
                style="bold red",
            )
        self.reporter.say(
            f"audit: the model has learnt wrong transcripts and is for nobody; delete {self.folder.not_private}, whose "
            "coins say which recordings it was trained on, when the scores are no longer needed"
        )

    @torch.no_grad()
    def _losses(self, name: str) -> np.ndarray:
        """The loss of each canary under the present model, in evaluation mode: [m]. NOT PRIVATE."""
        recognizer, utterances = self.recognizer, self._scored.corpus.utterances
        size = 1 if recognizer.equal_lengths_only else self.config.evaluate.batch_size
        order = sorted(range(len(utterances)), key=lambda place: -recognizer.length(utterances[place]))
        losses = np.empty(len(order))
        training = recognizer.model.training
        recognizer.model.eval()
        try:
            with self.reporter.bar(name, len(order)) as bar:
                for start in range(0, len(order), size):
                    chosen = order[start : start + size]
                    batch = recognizer.collate([self._scored[place] for place in chosen])
                    losses[chosen] = (
                        recognizer.loss_per_example(recognizer.model, batch).double().cpu().numpy()
                    )
                    bar.update(start + len(chosen))
        finally:
            recognizer.model.train(training)
        return losses


def audit(
    config: Config,
    *,
    canaries: int | None = None,
    words: Sequence[str] = PUBLIC_WORDS,
    confidence: float = 0.95,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a configuration with canaries in `config.output`, attack the result, and write audit.json there.

    A killed audit continues with the same canaries and coins. Test and validation data are not used.

    Args:
        config: of the run to be audited; its output is the audit's own folder.
        canaries, words, confidence: see `AuditedRun`.
        progress: print lines and bars.

    Returns:
        The values of audit.json; see `audit_record`.

    Raises:
        ConfigError: the run is not private, protects speakers, or truncates its batches; too many canaries; no word
            that the recogniser knows.
        RunFolderError: the folder holds a run without canaries.
        and what `asr_finetune.training.run.train` raises.
    """
    privacy = config.privacy
    refused = {
        "privacy.enabled=false": not privacy.enabled and "nothing is claimed that could be audited",
        "privacy.unit=speaker": privacy.unit == "speaker" and "a canary is one recording: set it to example",
        f"privacy.max_batch_size={privacy.max_batch_size}": privacy.max_batch_size is not None
        and "whether a batch is truncated would depend on the canaries: set it to null",
    }
    for key, reason in refused.items():
        if reason:
            raise ConfigError(f"asr-finetune audit: {key}: {reason}")
    if not 0 < confidence < 1:
        raise ConfigError(f"--confidence {confidence}: expected a number between 0 and 1, such as 0.95")
    config = config.with_values("data", test=None, test_split=None).with_values("train", eval_every=0)
    config.check_trainable()
    with joined() as ranks:
        run = AuditedRun(
            config,
            Reporter(progress and ranks.is_first),
            ranks=ranks,
            canaries=canaries,
            words=words,
            confidence=confidence,
        )
        complete(run)
    values = run.folder.read_json(run.folder.audit)
    if values is None:
        raise RunFolderError(
            f"output={config.output!r}: its run is finished, but has no audit.json: give another one"
        )
    return dict(values)


def _known_words(words: Sequence[str], recognizer: Recognizer, config: Config) -> list[str]:
    """The words, prepared as transcripts are, that the recogniser's vocabulary has."""
    prepared = [prepare_text(word, config.data) for word in words]
    known = [word for word in prepared if word and recognizer.unknown_words(word) is None]
    if not known:
        raise ConfigError(
            f"--words: the vocabulary of {recognizer.name} has none of the {len(words)} words: give public words of "
            "its language"
        )
    return known


def sentence(
    utterance: Utterance, words: Sequence[str], generator: random.Random, recognizer: Recognizer
) -> str:
    """Words at random, as many as the utterance's own transcript has, or as many fewer as the model can align to it.

    Raises:
        ConfigError: not even one word but its own can be learnt with this recording.
    """
    reason: str | None = ""
    for count in range(max(len(utterance.text.split()), 1), 0, -1):
        drawn = (" ".join(generator.choices(words, k=count)) for _ in range(_DRAWS))
        text = next((text for text in drawn if text != utterance.text), None)
        if text is None:
            reason = "the words give no other transcript than its own"
            continue
        reason = recognizer.text_problem(replace(utterance, text=text))
        if reason is None:
            return text
    raise ConfigError(
        f"canary {utterance.name}: no public word can be its transcript ({reason}): give others, or shorter ones, with "
        "--words, or leave the shortest recordings out with data.min_seconds"
    )


def scores_of(start: np.ndarray, final: np.ndarray) -> np.ndarray:
    """By how much training lowered each canary's loss: higher for one that looks included.

    A loss that is not finite, before or after, scores 0: a rule that does not know the coins.
    """
    finite = np.isfinite(start) & np.isfinite(final)
    return np.where(finite, np.where(finite, start, 0.0) - np.where(finite, final, 0.0), 0.0)


def audit_record(
    bound: LowerBound, scores: np.ndarray, coins: np.ndarray, stated: float | None
) -> dict[str, Any]:
    """The values of audit.json: the bound, and a histogram of the scores by coin. NOT PRIVATE.

    stated: ε of the accountant, which the bound contradicts if it is above; None: infinite.
    """
    edges = np.histogram_bin_edges(scores, bins=_BINS)
    return {
        "epsilon": bound.epsilon,
        "delta": bound.delta,
        "confidence": bound.confidence,
        "canaries": bound.canaries,
        "included": bound.included,
        "guessed_included": bound.guesses.highest,
        "guessed_excluded": bound.guesses.lowest,
        "correct": bound.correct,
        "tried": bound.tried,
        "largest": bound.largest,
        "contradicts": stated is not None and bound.epsilon > stated,
        "scores": {
            "edges": edges.tolist(),
            "included": np.histogram(scores[coins], edges)[0].tolist(),
            "excluded": np.histogram(scores[~coins], edges)[0].tolist(),
        },
    }


def _plain(losses: np.ndarray) -> list[float | None]:
    """For JSON, which has no infinity: None for a loss that is not finite."""
    return [float(loss) if np.isfinite(loss) else None for loss in losses]
