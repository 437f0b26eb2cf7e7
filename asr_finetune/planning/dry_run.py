"""A dry run: every check of a run that is possible before it begins. It writes nothing, and spends no ε.

Model, data, accounting and the private path are those of `train`; a dry run has no ledger, draws no noise and makes no
output folder. It reads the header of every recording, and decodes a sample of them.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.config.values import as_config_error
from asr_finetune.console import Reporter
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.sources import Source, Split
from asr_finetune.planning.memory import MARGIN, losses_of
from asr_finetune.planning.tables import size
from asr_finetune.planning.workload import typical_speech
from asr_finetune.training.augment import SpecAugment
from asr_finetune.training.dataset import SpeechDataset
from asr_finetune.training.sampling import sampling_of, sigma_of
from asr_finetune.training.setup import fitted_corpus, make_private
from asr_finetune.training.start import STAGES, Run
from dpkernels.errors import UserError
from dpkernels.memory import MemoryEstimator
from dpkernels.privacy import SAFE_DELTA_TIMES_N, epsilon, read_ledger
from dpkernels.rounding import shown_epsilon, shown_sigma

_NAMED = 3  # recordings left out that a check names
DECODED = 64  # recordings of a corpus that are decoded, evenly spread


@dataclass(frozen=True)
class Check:
    """One line of a dry run.

    Attributes:
        what: what was checked.
        passed: whether a run would pass it; False also if it could not be checked.
        found: the result, or the error and its fix.
    """

    what: str
    passed: bool
    found: str


def check_run(
    config: Config, *, resume: bool = True, compare: str | Path | None = None, progress: bool = True
) -> list[Check]:
    """Go through a run's start without starting it.

    Args:
        config: the run; `config.check_trainable()` was called.
        resume, compare: as `train`'s.
        progress: print lines and bars along the way.

    Returns:
        The checks, in order. A check that needs a failed one is failed too, and names it.
    """
    run = _DryRun(config, Reporter(False), resume=resume, compare=compare, progress=Reporter(progress))
    checks: list[Check] = []
    with closing(run):
        for what, needs in STAGES.items():
            missing = [check.what for check in checks if check.what in needs and not check.passed]
            if missing:
                checks.append(Check(what, False, f"{_NOT_CHECKED}: needs {', '.join(missing)}"))
                continue
            try:
                checks.append(Check(what, True, run.stage(what)))
            except UserError as error:
                checks.append(Check(what, False, str(error)))
    return checks


_NOT_CHECKED = "not checked"


def check_table(checks: list[Check]) -> Table:
    """The checks as a table for the screen."""
    failed = sum(not check.passed and not check.found.startswith(_NOT_CHECKED) for check in checks)
    result = f"{failed} of {len(checks)} checks failed" if failed else "a run would start"
    title = f"dry run: nothing was written or spent; {result}"
    table = Table(title=title, show_header=False, title_justify="left")
    for check in checks:
        verdict = Text("ok", "green") if check.passed else Text("FAILED", "bold red")
        if not check.passed and check.found.startswith(_NOT_CHECKED):
            verdict = Text("not checked", "yellow")
        table.add_row(
            check.what, verdict, Text(check.found)
        )  # a Text, so that brackets are not read as rich's markup
    return table


@dataclass
class _DryRun(Run):
    """The start of a run that writes nothing; every stage returns its result as text."""

    progress: Reporter = field(default_factory=Reporter)
    sigma: float | None = None

    def _claim(self) -> bool:
        return self.folder.check(self.config, resume=self.resume)

    def _note_data(self) -> None:
        """Nothing is written."""

    def output(self) -> str:
        folder = super().output()
        if not self.resuming:
            return f"{folder}: free"
        ledger = self.folder.ledger
        spent = read_ledger(ledger).steps if ledger.exists() else 0
        return f"{folder}: holds this run, which would be continued; its ledger counts {spent} steps"

    def model(self) -> str:
        super().model()
        facts = self.recognizer.describe()
        return (
            f"{facts['name']}: {facts['class']}, {facts['total_parameters']:,} parameters in {facts['dtype']} on "
            f"{self.recognizer.device}, {facts['vocabulary']} classes{' (new)' if facts['new_head'] else ''}"
        )

    def _read(
        self, name: str, source: Source, split: Split, augment: SpecAugment | None = None
    ) -> tuple[SpeechDataset, str]:
        """Load a corpus, and decode a sample of it."""
        corpus = fitted_corpus(source, split, self.config.data, self.recognizer, training=name == "train")
        places = np.linspace(0, len(corpus) - 1, min(DECODED, len(corpus))).astype(int)
        sample = Corpus([corpus.utterances[place] for place in places], source=corpus.source)
        heard = sample.decoded(self.progress, "decoding a sample")
        broken, doubts = heard.problems, heard.doubts
        summary = corpus.summary()
        if corpus.problems:
            named = [f"{problem.name}: {problem.reason}" for problem in corpus.problems[:_NAMED]]
            summary += "".join(f"\n  {line}" for line in [*named, *["..."][: len(corpus.problems) > _NAMED]])
        summary += f"\n{len(sample)} decoded"
        if broken:
            summary += (
                f": {len(broken)} do not, and would be left out, e.g. {broken[0].name}: {broken[0].reason}"
            )
        if doubts:
            summary += f"; listen to {len(doubts)}, e.g. {doubts[0].name}: {doubts[0].reason}"
        return SpeechDataset(corpus, self.recognizer, augment=augment), summary

    @as_config_error()
    def privacy(self) -> str:
        config = self.config
        privacy, steps = config.privacy, config.train.steps
        if not privacy.enabled:
            return "NOT PRIVATE: privacy.enabled is false. Such a run has no epsilon"
        assert privacy.delta is not None  # check_trainable ensures it
        sampling = sampling_of(config, self.corpus)
        ledger = self.folder.ledger
        if self.origin is not None and self.origin.begins(ledger):
            ledger = self.origin.folder.ledger
            steps += self.origin.steps
        started = [run for run in read_ledger(ledger).runs if run.steps] if ledger.exists() else []
        self.sigma = started[0].mechanism.noise_multiplier if started else sigma_of(config, sampling)
        summary = (
            f"σ = {shown_sigma(self.sigma)}{' (its ledger)' if started else ''}: {steps:,} steps, Poisson at rate "
            f"{sampling.sample_rate:.5f} of {sampling.units:,} {sampling.unit}s"
        )
        if self.sigma == 0:
            return f"NOT PRIVATE, {summary}: without noise ε is infinite"
        spends = epsilon(
            self.sigma,
            sampling.sample_rate,
            steps,
            privacy.delta,
            accountant=privacy.accountant,
            max_batch_size=privacy.max_batch_size,
            dataset_size=sampling.units,
        )
        summary += f"; would spend ε = {shown_epsilon(spends)} at δ = {privacy.delta:g}"
        if privacy.epsilon is not None:
            summary += f", target {privacy.epsilon:g}"
            if spends > privacy.epsilon:
                summary += ": it would stop early"
        if privacy.delta * sampling.units >= 1:
            summary += f"\nWARNING: δ is not below 1 / {sampling.units:,}: such a δ would allow publishing one of them"
        elif privacy.delta * sampling.units > SAFE_DELTA_TIMES_N:
            summary += (
                f"\nWARNING: δ is close to 1 / {sampling.units:,}: such a δ may allow publishing one of them; choose "
                f"at most {SAFE_DELTA_TIMES_N / sampling.units:.1g}"
            )
        return summary

    @as_config_error()
    def memory(self) -> str:
        """The predicted peak with a micro-batch of the longest utterances, against the available memory."""
        config, recognizer = self.config, self.recognizer
        if not config.privacy.enabled:
            return "not predicted: memory plans are of private steps"
        width = min(config.train.physical_batch_size, config.train.batch_size)
        speech = typical_speech(recognizer, self.corpus)
        losses = losses_of(recognizer, speech.item(recognizer, speech.longest))
        device: torch.device = recognizer.device
        with MemoryEstimator(
            recognizer.model,
            strategy=config.privacy.strategy,
            optimizer=config.train.optimizer,
            target="cuda" if device.type == "cuda" else "cpu",
            checkpointing=config.train.checkpointing,
        ) as stage:
            peak = stage.peak(losses, width)
        available = _capacity(device)
        recomputed = ", checkpointing" if config.train.checkpointing else ""
        parts = (
            (peak.weights, "weights"),
            (peak.sums, "float64 sums"),
            (peak.optimizer, "optimizer"),
            (peak.micro_batch, f"micro-batch of {width} × {speech.longest:.1f} s{recomputed}"),
        )
        listed = " + ".join(f"{size(part)} {name}" for part, name in parts)
        prediction = f"predicted peak {size(peak.total)} ({listed}) of the {size(available)} of {device}"
        if peak.total > MARGIN * available:
            raise ConfigError(
                f"{prediction}, of which {MARGIN:.0%} can be used: lower train.physical_batch_size, or choose a method "
                "that trains less; "
                f"`asr-finetune plan --config ... --gpu-memory {available / 2**30:.0f}` finds one that fits"
            )
        return prediction

    def gradients(self) -> str:
        super().gradients()
        if not self.config.privacy.enabled:
            return "one utterance went forward and backward"
        return "every trained parameter has a norm rule; an utterance's gradient is the same in a batch and alone"

    def _make_plain(self, plain: torch.optim.Optimizer, lengths: list[int]) -> None:
        recognizer = self.recognizer
        recognizer.loss_per_example(recognizer.model, recognizer.collate([self.dataset[0]])).sum().backward()

    def _make_private(self, plain: torch.optim.Optimizer, lengths: list[int]) -> None:
        """Make the run private with the noise of the stage `privacy`, and without a ledger."""
        config, recognizer = self.config.with_values("privacy", noise_multiplier=self.sigma), self.recognizer
        self.engine, self.optimizer, self.loader = make_private(
            config,
            recognizer,
            plain,
            self.dataset,
            lengths,
            self.reporter,
            None,
            config.train.steps,
            self.ranks,
        )


def _capacity(device: torch.device) -> int:
    """Bytes of memory of a device, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
