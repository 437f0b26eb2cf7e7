"""Training: one loop for private and ordinary runs, with checkpoints that a killed run continues from."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from asr_finetune.config.schema import Config
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.provenance import shared_recordings
from asr_finetune.models.methods import apply_method
from asr_finetune.models.parameters import total_parameters, trained_parameters
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.progress import Reporter, duration
from asr_finetune.training import checkpoint, record
from asr_finetune.training.dataset import SpeechDataset
from asr_finetune.training.evaluate import Evaluation, evaluate
from asr_finetune.training.loop import Interrupted, Run, epsilon_spent, run_steps
from asr_finetune.training.plain import PlainLoader, PlainOptimizer
from asr_finetune.training.run_folder import RunFolder
from asr_finetune.training.setup import (
    check_data,
    check_public,
    load,
    make_optimizer,
    make_private,
    prepare_blocks,
    recognizer_of,
    self_check,
    training_dataset,
)
from dpkernels import PrivacyEngine

__all__ = ["Interrupted", "TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        output: its folder.
        epsilon: ε spent at `delta`; None for a run without privacy or without noise.
        delta: δ; None without privacy.
        noise_multiplier: σ; None without privacy.
        steps: logical steps that the model took.
        seconds: time spent training, resumed parts included.
        history: one dict a step; NOT PRIVATE.
    """

    output: Path
    epsilon: float | None
    delta: float | None
    noise_multiplier: float | None
    steps: int
    seconds: float
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class _Session:
    """What every part of a run needs."""

    config: Config
    folder: RunFolder
    reporter: Reporter
    recognizer: Recognizer

    def load(self, name: str, source: str, split: str | None) -> Corpus:
        """A corpus; the names of what was left out go to the folder of what is not for others."""
        corpus = load(source, split, self.config.data, self.reporter, name, self.recognizer)
        self.folder.note_problems(name, corpus.problems)
        return corpus

    def dataset(self, corpus: Corpus) -> SpeechDataset:
        """A corpus's features, kept for several evaluations."""
        return SpeechDataset(corpus, self.recognizer, cache=self.config.train.cache_features)

    def tests(self, train: Corpus) -> tuple[tuple[Corpus, SpeechDataset] | None, bool | None]:
        """The test data, and whether it holds training recordings; None where no source is set."""
        source = self.config.data.test
        if source is None:
            self.reporter.say("data.test is not set: no error rates before and after")
            return None, None
        corpus = self.load("test", source, self.config.data.test_split)
        shared = len(shared_recordings(train, corpus))
        if shared:
            self.reporter.say(
                f"WARNING: {shared} of {len(corpus)} test recordings are training recordings too. Error rates on "
                "them say nothing about other recordings, and are figures of private data without noise: no "
                "epsilon covers them. The report says so",
                style="bold red",
            )
        return (corpus, self.dataset(corpus)), shared > 0

    def valid(self, train: Corpus) -> tuple[Corpus, SpeechDataset] | None:
        """The public validation data, where there is to be a curve."""
        if not self.config.train.eval_every:
            return None
        assert self.config.data.valid is not None  # check_trainable saw to it
        corpus = self.load("valid", self.config.data.valid, self.config.data.valid_split)
        check_public(corpus, train, self.config.privacy.unit)
        return corpus, self.dataset(corpus)

    def evaluate(self, name: str, data: tuple[Corpus, SpeechDataset]) -> Evaluation:
        """Error rates, said on the screen; transcripts go to the folder of what is not for others."""
        corpus, dataset = data
        result = evaluate(
            self.recognizer,
            corpus,
            self.config.evaluate,
            dataset=dataset,
            reporter=self.reporter,
            name=name,
        )
        self.reporter.say(f"{name}: {result}")
        lines = "".join("\t".join(entry) + "\n" for entry in result.hypotheses)
        checkpoint.write_text(self.folder.not_private / f"transcripts_{name}.tsv", lines)
        return result


def train(
    config: Config, *, progress: bool = True, resume: bool = True, compare: str | Path | None = None
) -> TrainResult:
    """Fine-tune a recogniser as `config` says, and write everything to `config.output` (see `run_folder`).

    A run that was killed continues from its last checkpoint when it is called again with the same
    configuration: the steps since that checkpoint are taken again with fresh noise and counted again, and
    training stops before the target ε would be exceeded. A finished run is returned as it is.

    Args:
        config: the run.
        progress: print lines and bars.
        resume: continue a run in `config.output`; False refuses instead.
        compare: folder of a finished run without privacy, whose error rates are put beside this one's.

    Raises:
        ConfigError: parts of the configuration that do not fit together, or differ from the run being
            resumed.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was written.
        FileNotFoundError, ValueError: data or model that cannot be read.
        dpkernels.privacy.SelfCheckError: an utterance's gradient depends on its batch.
    """
    config.check_trainable()
    reporter = Reporter(progress)
    folder = RunFolder(Path(config.output))
    non_private = record.read_comparison(compare)
    resuming = folder.prepare(config, resume=resume)
    finished = folder.read_json(folder.run)
    if finished is not None:
        reporter.say(f"{folder.run} is there: this run is finished. Another run needs another --output.")
        return _result(folder, finished)
    if not config.privacy.enabled:
        reporter.say("NOT PRIVATE: privacy.enabled is false. This run has no epsilon.", style="bold red")

    torch.manual_seed(config.train.seed)
    session = _Session(config, folder, reporter, recognizer_of(config))
    recognizer = session.recognizer
    corpus = session.load("train", config.data.train, config.data.train_split)
    check_data(config, corpus, recognizer)
    fingerprint = folder.note_data(corpus, resuming=resuming)
    tests, shares_training = session.tests(corpus)
    valid = session.valid(corpus)
    torch.manual_seed(config.train.seed)  # adapters start the same, whatever was drawn before
    apply_method(recognizer, config.method)
    with ExitStack() as stack:
        # Before the first evaluation: what cannot be trained is found in seconds.
        run = _prepare(session, corpus, valid, stack)
        before = _evaluate_before(session, tests)
        if resuming:
            _restore(run)
        run_steps(run)
        data = record.data_record(config, corpus, fingerprint)
        if config.privacy.enabled:  # exact, and of who is in the data: not for others
            folder.note_test_data(shares_training)
        else:
            data["test_shares_training"] = shares_training
        return _finish(run, session, data, tests, {"before": before, "non_private": non_private})


def _evaluate_before(session: _Session, tests: tuple[Corpus, SpeechDataset] | None) -> dict[str, Any] | None:
    """Error rates of the checkpoint as it was published; read back on resume.

    A Whisper cut to a short window repeats itself until it is trained for it (WER above 1000 % was seen): what
    a user has before is the checkpoint with its own window, so that is what is measured.
    """
    noted = session.folder.read_json(session.folder.metrics) or {}
    if tests is None or "before" in noted or not session.config.evaluate.before:
        return noted.get("before")
    if session.config.model.window_seconds is not None:
        whole = replace(session.config, model=replace(session.config.model, window_seconds=None))
        session = replace(session, recognizer=recognizer_of(whole))
        tests = tests[0], SpeechDataset(tests[0], session.recognizer, cache=False)
    result = session.evaluate("before", tests).to_dict()
    session.folder.note_metrics(private=session.config.privacy.enabled, before=result)
    return result


def _prepare(
    session: _Session, corpus: Corpus, valid: tuple[Corpus, SpeechDataset] | None, stack: ExitStack
) -> Run:
    """Model, optimizer and loader, private or not, checked and ready."""
    config, recognizer, reporter = session.config, session.recognizer, session.reporter
    model = recognizer.model
    trained, total = trained_parameters(model), total_parameters(model)
    reporter.say(f"{recognizer.name}: {trained:,} of {total:,} parameters are trained ({config.method.kind})")
    dataset = training_dataset(config, corpus, recognizer)
    lengths = [recognizer.length(utterance) for utterance in corpus.utterances]
    model.train()
    prepare_blocks(config.train, recognizer, reporter)
    plain = make_optimizer(config.train, model)
    optimizer: Any
    loader: Iterable[Any]
    engine: PrivacyEngine | None = None
    if config.privacy.enabled:
        # Where a run was here before, its ledger holds σ and what was spent, the checkpoint the model's step.
        saved = checkpoint.load(session.folder.checkpoint)
        remaining = config.train.steps - (saved.step if saved else 0)
        engine, optimizer, loader = make_private(
            config, recognizer, plain, dataset, lengths, reporter, session.folder.ledger, remaining
        )
        stack.callback(engine.close)
        self_check(engine, recognizer, dataset, lengths, config.train.physical_batch_size, reporter)
    else:
        optimizer = PlainOptimizer(plain, config.train.batch_size)
        loader = PlainLoader(config.train, dataset, recognizer, lengths)
    return Run(
        config,
        session.folder,
        reporter,
        recognizer,
        optimizer,
        loader,
        engine,
        valid=valid,
        lost=dataset.problems,
    )


def _restore(run: Run) -> None:
    """Continue from the checkpoint, where there is one, and say what that means."""
    saved = checkpoint.load(run.folder.checkpoint)
    spent = run.engine.steps if run.engine else 0
    if saved is None:
        lost = f" {spent} steps were spent before the first checkpoint and stay counted." if spent else ""
        run.folder.trim_history(0)
        run.reporter.say(f"resuming: no checkpoint yet, starting from step 0.{lost}")
        return
    checkpoint.restore_parameters(run.recognizer.model, saved.parameters)
    run.optimizer.load_state_dict(saved.optimizer)
    if saved.random is not None:
        checkpoint.restore_random(saved.random)
    run.step, run.seconds, run.curve = saved.step, saved.seconds, saved.curve
    run.folder.trim_history(saved.step)
    if isinstance(run.loader, PlainLoader):
        run.loader.first_step = saved.step
    message = f"resuming from the checkpoint at step {saved.step} of {run.config.train.steps}"
    if run.engine is not None and saved.privacy is not None:
        run.engine.load_state_dict(saved.privacy)
        replayed = spent - sum(int(entry["steps"]) for entry in saved.privacy["runs"].values())
        message += (
            f"; the ledger counts {spent} steps, {replayed} of them after it: they are taken again with "
            "fresh noise, and count twice"
        )
    run.reporter.say(message)


def _finish(
    run: Run,
    session: _Session,
    data: dict[str, Any],
    tests: tuple[Corpus, SpeechDataset] | None,
    evaluation: dict[str, Any],
) -> TrainResult:
    """Evaluate and save the recogniser; run.json comes last: its presence says the run is finished."""
    config, folder, reporter = run.config, run.folder, run.reporter
    if run.lost:
        folder.note_problems("train_later", run.lost)
        reporter.say(
            f"{len(run.lost)} recordings could not be read while training: they are counted in N, and contributed "
            "nothing (not_private/problems_train_later.tsv)",
            style="bold red",
        )
    evaluation["after"] = None
    if tests is not None:
        evaluation["after"] = session.evaluate("after", tests).to_dict()
        folder.note_metrics(private=config.privacy.enabled, after=evaluation["after"])
    adapters = config.method.kind in ("lora", "dp_rp")
    run.recognizer.save(folder.path / ("adapter" if adapters else "model"))
    epsilon = epsilon_spent(run)
    values = record.run_record(run, data, evaluation, epsilon)
    checkpoint.write_json(folder.run, values)
    if run.engine is None:
        reporter.say("this model is NOT PRIVATE", style="bold red")
    elif epsilon is None:
        reporter.say("this model is NOT PRIVATE: it was trained without noise", style="bold red")
    else:
        spent = f"epsilon {epsilon:.3f} at delta {config.privacy.delta:g}"
        reporter.say(f"{spent}, {run.step} steps, {duration(run.seconds)}", style="bold")
    reporter.say(f"written to {folder.path}")
    return _result(folder, values)


def _result(folder: RunFolder, values: dict[str, Any]) -> TrainResult:
    privacy = values["privacy"]
    return TrainResult(
        output=folder.path,
        epsilon=privacy["epsilon"],
        delta=privacy["delta"],
        noise_multiplier=privacy["noise_multiplier"],
        steps=values["steps"],
        seconds=values["seconds"],
        history=folder.history(),
    )
