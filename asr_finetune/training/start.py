"""The start of a run, in stages: `train` walks them before its first step, a dry run to check the run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from asr_finetune.config.schema import Config
from asr_finetune.console import Reporter
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.provenance import shared_recordings
from asr_finetune.data.sources import Source, Split
from asr_finetune.models.methods import apply_method, left_out
from asr_finetune.models.recognizer import Recognizer, total_parameters, trained_parameters
from asr_finetune.training.augment import SpecAugment
from asr_finetune.training.dataset import SpeechDataset
from asr_finetune.training.origin import Origin, origin_of
from asr_finetune.training.run_folder import RunFolder, read_comparison
from asr_finetune.training.run_log import RunLog
from asr_finetune.training.sampling import micro_batch_limits
from asr_finetune.training.setup import (
    check_data,
    check_public,
    load,
    make_optimizer,
    make_private,
    prepare_blocks,
    readable_part,
    recognizer_of,
    self_check,
)
from dpkernels import PrivacyEngine, checkpoint
from dpkernels.errors import UserError
from dpkernels.plain import PlainLoader, PlainOptimizer
from dpkernels.privacy import Ranks, shard_frozen

# stage, in order -> the stages it needs; each stage is the method of `Run` with that name
STAGES: dict[str, tuple[str, ...]] = {
    "output": (),
    "model": (),
    "training data": ("model",),
    "test data": ("model", "training data"),
    "validation data": ("model", "training data"),
    "method": ("model",),
    "privacy": ("output", "training data"),
    "memory": ("training data", "method"),
    "gradients": ("privacy", "method", "memory"),
}


class Finished(UserError):
    """The output folder holds a finished run."""


@dataclass
class Run:
    """A run: the results of its stages, which later stages and the loop need, and its progress.

    Attributes:
        audited: whether the last examples of its data are canaries (`audit.AuditedRun`).
        coins: [m] bool, which of these are present.
    """

    audited: ClassVar[bool] = False

    config: Config
    reporter: Reporter
    resume: bool = True
    compare: str | Path | None = None
    resuming: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    non_private: dict[str, Any] | None = None
    recognizer: Recognizer = field(init=False)
    dataset: SpeechDataset = field(init=False)
    fingerprint: str = ""
    tests: dict[str, SpeechDataset] = field(default_factory=dict)
    shares_training: bool | None = None
    origin: Origin | None = None
    valid: SpeechDataset | None = None
    engine: PrivacyEngine | None = None
    optimizer: Any = None
    loader: Iterable[Any] = ()
    step: int = 0
    saved: int | None = None  # the last checkpoint's
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    log: RunLog = field(init=False)
    warned_of_impossible: bool = False
    coins: np.ndarray | None = None

    @property
    def folder(self) -> RunFolder:
        """The output folder."""
        return RunFolder(Path(self.config.output), self.ranks)

    @property
    def corpus(self) -> Corpus:
        """The training data."""
        return self.dataset.corpus

    def walk(self) -> None:
        """Go through STAGES."""
        for name in STAGES:
            self.stage(name)

    def stage(self, name: str) -> str:
        """Do one of STAGES after those it needs. Returns a description of the result, for a dry run's table."""
        return str(getattr(self, name.replace(" ", "_"))())

    def output(self) -> str:
        """Claim the output folder, which must be free or hold this run.

        Raises:
            Finished: the folder holds a finished run.
        """
        self.non_private = read_comparison(self.compare, list(self.config.data.test_sets()))
        self.resuming = self._claim()
        self.folder.check_audited(self.audited, resuming=self.resuming)
        if self.folder.finished:
            raise Finished(
                f"{self.folder.run} exists: this run is finished. For another run give another --output."
            )
        return str(self.folder.path)

    def _claim(self) -> bool:
        """Prepare the folder. Returns whether a run in it is continued."""
        if not self.config.privacy.enabled:
            warning = "NOT PRIVATE: privacy.enabled is false. This run has no epsilon."
            self.reporter.say(warning, style="bold red")
        return self.folder.prepare(self.config, resume=self.resume)

    def model(self) -> str:
        """Load the recogniser."""
        torch.manual_seed(self.config.train.seed)
        with self.reporter.working(f"loading {self.config.model.name}"):
            self.recognizer = recognizer_of(self.config)
        return self.recognizer.name

    def training_data(self) -> str:
        """Load the training data, and check it against the configuration."""
        data = self.config.data
        augment = SpecAugment() if self.config.train.spec_augment else None
        self.dataset, summary = self._read("train", data.train, data.train_split, augment)
        check_data(self.config, self.corpus, self.recognizer)
        self._note_data()
        self.origin = origin_of(self.config, self.corpus)
        if self.origin is not None:
            self.reporter.say(f"the starting model is that of {self.origin}")
            summary += f"\nthe starting model is that of {self.origin}"
        return summary

    def _read(
        self, name: str, source: Source, split: Split, augment: SpecAugment | None = None
    ) -> tuple[SpeechDataset, str]:
        """Load a corpus, and write the names of recordings that are left out or doubtful to `not_private`."""
        options = {"cache": self.config.train.cache_features, "augment": augment}
        data = self.config.data
        dataset = load(source, split, data, self.reporter, name, self.recognizer, **options)
        self.folder.note_problems(name, dataset.corpus.problems, dataset.corpus.doubts)
        return dataset, dataset.corpus.summary()

    def _note_data(self) -> None:
        self.fingerprint = self.folder.note_data(self.corpus, resuming=self.resuming)

    def test_data(self) -> str:
        """Load the test sets, and find whether they hold training recordings."""
        sets = self.config.data.test_sets()
        if not sets:
            summary = "data.test is not set: no error rates before and after"
            self.reporter.say(summary)
            return summary
        self.shares_training = False
        return "\n".join(self._test_set(name, *source) for name, source in sets.items())

    def _test_set(self, name: str, source: Source, split: Split) -> str:
        label = "test" if name == "test" else f"test_{name}"
        self.tests[name], summary = self._read(label, source, split)
        corpus = self.tests[name].corpus
        shared = len(shared_recordings(self.corpus, corpus))
        self.shares_training = bool(self.shares_training) or shared > 0
        if shared:
            self.reporter.say(
                f"WARNING: {shared} of {len(corpus)} {label} recordings are training recordings too. Error rates on "
                "them say nothing about other recordings, and are figures of private data without noise: no "
                "epsilon covers them. The report states this",
                style="bold red",
            )
            summary += f"\nWARNING: {shared} of them are training recordings too: no epsilon covers error rates on them"
        return summary if name == "test" else f"{name}: {summary}"

    def validation_data(self) -> str:
        """Load the public validation data, if the run records a curve."""
        if not self.config.train.eval_every:
            return "train.eval_every is 0: no curve"
        assert self.config.data.valid is not None  # check_trainable ensures it
        valid, summary = self._read("valid", self.config.data.valid, self.config.data.valid_split)
        check_public(valid.corpus, self.corpus, self.config.privacy.unit)
        self.valid = valid
        return summary

    def method(self) -> str:
        """Choose the trained parameters."""
        torch.manual_seed(self.config.train.seed)  # adapters start the same, whatever draws preceded
        apply_method(self.recognizer, self.config.method)
        name, kind, model = self.recognizer.name, self.config.method.kind, self.recognizer.model
        trained, total = trained_parameters(model), total_parameters(model)
        self.reporter.say(f"{name}: {trained:,} of {total:,} parameters are trained ({kind})")
        kept = left_out(self.recognizer, self.config.method)
        for part in kept:
            self.reporter.say(f"  not trained: {part}")
        return "\n  not trained: ".join([f"{kind}: {trained:,} parameters are trained", *kept])

    def privacy(self) -> str:
        """The ε that the run will spend: a dry run computes it here, a run gets it from its engine."""
        return ""

    def memory(self) -> str:
        """The memory that the run will need: a dry run predicts it here, a run does nothing."""
        return ""

    def gradients(self) -> str:
        """Make optimizer and loader; a private run also checks that gradients do not depend on the batch."""
        config, recognizer = self.config, self.recognizer
        lengths = [recognizer.length(utterance) for utterance in self.corpus.utterances]
        recognizer.model.train()
        prepare_blocks(config.train, recognizer, self.reporter)
        if config.model.shard:
            shard_frozen(recognizer.model)
        plain = make_optimizer(config.train, recognizer.model)
        if config.privacy.enabled:
            self._make_private(plain, lengths)
            assert self.engine is not None
            size = config.train.physical_batch_size
            readable = readable_part(self.dataset, lengths, self.coins)
            self_check(self.engine, recognizer, *readable, size, self.reporter)
        else:
            self._make_plain(plain, lengths)
        return ""

    def _make_private(self, plain: torch.optim.Optimizer, lengths: list[int]) -> None:
        if self.origin is not None:
            origin = self.origin
            self.ranks.first(lambda: origin.continue_ledger(self.folder.ledger))
        # For a resumed run the ledger holds σ and the steps spent, and the checkpoint the model's step.
        saved = self.checkpoint()
        remaining = self.config.train.steps - (saved.step if saved else 0)
        self.engine, self.optimizer, self.loader = make_private(
            self.config,
            self.recognizer,
            plain,
            self.dataset,
            lengths,
            self.reporter,
            self.folder.ledger,
            remaining,
            self.ranks,
            self.coins,
        )

    def checkpoint(self) -> checkpoint.Checkpoint | None:
        """The last checkpoint, if there is one. Every process gets what rank 0 reads."""
        return self.ranks.first(lambda: checkpoint.load_usable(self.folder.checkpoint, self.reporter.say))

    def _make_plain(self, plain: torch.optim.Optimizer, lengths: list[int]) -> None:
        if self.ranks.size > 1:
            raise UserError(
                f"privacy.enabled=false under torchrun with {self.ranks.size} processes: a run without privacy is for "
                "comparison and takes one process; start it without torchrun"
            )
        train = self.config.train
        self.optimizer = PlainOptimizer(plain, train.batch_size)
        size, frames = micro_batch_limits(train, lengths)
        self.loader = PlainLoader(
            self.dataset,
            lengths,
            batch_size=train.batch_size,
            steps=train.steps,
            physical_batch_size=size,
            max_padded_frames=frames,
            seed=train.seed,
            num_workers=train.num_workers,
            collate_fn=self.recognizer.collate,
        )

    def close(self) -> None:
        """Close the engine, if there is one."""
        if self.engine is not None:
            self.engine.close()

    def before_steps(self) -> None:
        """Called with the model as the first step, or the first after a resume, finds it."""

    def after_steps(self) -> None:
        """Called with the model as the last step left it, before the run is recorded as finished."""
