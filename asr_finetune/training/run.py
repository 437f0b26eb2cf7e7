"""Training: one loop for private and ordinary runs. A killed run continues from its last checkpoint."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asr_finetune.config.schema import Config
from asr_finetune.console import Reporter, duration
from asr_finetune.files import write_json
from asr_finetune.training import record
from asr_finetune.training.card import write_card
from asr_finetune.training.dataset import SpeechDataset
from asr_finetune.training.evaluate import evaluate
from asr_finetune.training.loop import Interrupted, epsilon_spent, run_steps
from asr_finetune.training.processes import joined
from asr_finetune.training.run_folder import RunFolder, as_recorded, weights_folder, whole_folder
from asr_finetune.training.run_log import RunLog
from asr_finetune.training.setup import recognizer_of
from asr_finetune.training.start import Finished, Run
from dpkernels import checkpoint
from dpkernels.files import WriteError
from dpkernels.plain import PlainLoader
from dpkernels.rounding import shown_epsilon

__all__ = ["Interrupted", "TrainResult", "complete", "train"]


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        output: its folder.
        epsilon: ε spent at `delta`; None without privacy or without noise.
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


def train(
    config: Config, *, progress: bool = True, resume: bool = True, compare: str | Path | None = None
) -> TrainResult:
    """Fine-tune a recogniser as `config` says, and write everything to `config.output` (see `run_folder`).

    A call with the same configuration continues a killed run from its last checkpoint: it takes the steps since that
    checkpoint again with fresh noise, counts them again, and stops before the target ε is exceeded. For a finished run
    it returns the result.

    Under torchrun all processes train one model: each has its part of every step and of every evaluation, and rank 0
    prints and writes.

    Args:
        config: the run.
        progress: print lines and bars.
        resume: continue a run in `config.output`; False raises an error instead.
        compare: folder of a finished run without privacy; its error rates are shown beside those of this run.

    Raises:
        ConfigError: parts of the configuration are inconsistent, or differ from the run being resumed.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was written.
        FileNotFoundError, ValueError: the data or the model cannot be read.
        dpkernels.privacy.SelfCheckError: an utterance's gradient depends on its batch.
        dpkernels.privacy.RanksError: another of torchrun's processes failed, or has other data or another model.
        dpkernels.files.WriteError: a file of the output folder cannot be written; the message says what is kept.
    """
    config.check_trainable()
    with joined() as ranks:
        return complete(
            Run(config, Reporter(progress and ranks.is_first), resume=resume, compare=compare, ranks=ranks)
        )


def complete(run: Run) -> TrainResult:
    """Take a run from its start, or from its last checkpoint, to its end; see `train`."""
    try:
        return _train(run)
    except WriteError as error:
        raise WriteError(f"the run stopped: {error}. {_kept(run)}") from error


def _kept(run: Run) -> str:
    """What a run keeps whose output folder cannot be written, and how it goes on."""
    facts = [f"its last checkpoint is of step {run.saved}"] if run.saved is not None else []
    if run.engine is not None:
        facts.insert(0, f"its ledger counts {run.engine.steps} steps")
    if not facts:
        facts = ["this start took no step that was saved, and what an earlier one saved is kept"]
    return f"Nothing is lost: {' and '.join(facts)}. Then give the same command again, which continues from there"


def _train(run: Run) -> TrainResult:
    config = run.config
    with closing(run):
        try:
            run.walk()  # before the first evaluation, so that errors appear within seconds
        except Finished as reason:
            run.reporter.say(str(reason))
            return _result(run.folder, run.folder.read_json(run.folder.run))
        before = _evaluate_before(run)
        if run.resuming:
            _restore(run)
        run.before_steps()
        with closing(RunLog(config.log, run.folder, run.step)) as run.log:
            run_steps(run)
        run.after_steps()
        data = record.data_record(config, run.corpus, run.fingerprint)
        if config.privacy.enabled:  # an exact fact about the private data: it must not be passed on
            run.folder.note_test_data(run.shares_training)
        else:
            data["test_shares_training"] = run.shares_training
            data["left_out"] = dict(Counter(problem.kind for problem in run.corpus.problems))
        return _finish(run, data, {"before": before, "non_private": run.non_private})


def _evaluate(run: Run, name: str, tests: dict[str, SpeechDataset]) -> dict[str, Any] | None:
    """Measure and print error rates, and write the transcripts to the folder `not_private`."""
    config, results = run.config.evaluate, {}
    for test_set, dataset in tests.items():
        label = name if test_set == "test" else f"{name}_{test_set}"
        result = evaluate(
            dataset.recognizer,
            dataset.corpus,
            config,
            dataset=dataset,
            reporter=run.reporter,
            name=label,
            ranks=run.ranks,
        )
        run.reporter.say(f"{label}: {result}")
        lines = "".join("\t".join(entry) + "\n" for entry in result.hypotheses)
        run.folder.write(run.folder.not_private / f"transcripts_{label}.tsv", lines)
        results[test_set] = result.to_dict()
    recorded = as_recorded(results)
    if recorded is not None:
        run.folder.note_metrics(private=run.config.privacy.enabled, **{name: recorded})
    return recorded


def _evaluate_before(run: Run) -> dict[str, Any] | None:
    """Error rates of the checkpoint as published; a resumed run reads them back.

    A Whisper model with a shortened window repeats itself until it is trained with that window (WER above 1000 % was
    measured). A user's starting point is the checkpoint with its own window, so this function measures that one.
    """
    noted, tests = run.folder.read_json(run.folder.metrics) or {}, run.tests
    if not tests or "before" in noted or not run.config.evaluate.before:
        return noted.get("before")
    if run.config.model.window_seconds is not None:
        published = recognizer_of(run.config.with_values("model", window_seconds=None))
        tests = {name: SpeechDataset(one.corpus, published, cache=False) for name, one in tests.items()}
    return _evaluate(run, "before", tests)


def _restore(run: Run) -> None:
    """Restore the checkpoint, if there is one, and print the consequences."""
    saved = run.checkpoint()
    spent = run.engine.steps if run.engine else 0
    if saved is None:
        lost = f" {spent} steps were spent before the first checkpoint and remain counted." if spent else ""
        run.folder.trim_history(0)
        run.reporter.say(f"resuming: no checkpoint yet, starting from step 0.{lost}")
        return
    checkpoint.restore_parameters(run.recognizer.model, saved.parameters)
    run.optimizer.load_state_dict(saved.optimizer)
    if saved.random is not None:
        checkpoint.restore_random(saved.random)
    run.step, run.seconds, run.curve = saved.step, saved.seconds, saved.curve
    run.saved = saved.step
    run.folder.trim_history(saved.step)
    if isinstance(run.loader, PlainLoader):
        run.loader.first_step = saved.step
    message = f"resuming from the checkpoint at step {saved.step} of {run.config.train.steps}"
    if run.engine is not None and saved.privacy is not None:
        run.engine.load_state_dict(saved.privacy)
        replayed = spent - sum(int(entry["steps"]) for entry in saved.privacy["runs"].values())
        message += (
            f"; the ledger counts {spent} steps, {replayed} of them after the checkpoint: they are taken again with "
            "fresh noise, and count twice"
        )
    run.reporter.say(message)


def _finish(run: Run, data: dict[str, Any], evaluation: dict[str, Any]) -> TrainResult:
    """Evaluate and save the recogniser, then write run.json, whose presence marks the run as finished."""
    config, folder, reporter = run.config, run.folder, run.reporter
    if run.dataset.problems:
        folder.note_problems("train_later", run.dataset.problems)
        reporter.say(
            f"{len(run.dataset.problems)} recordings could not be read during training: they count in N, but "
            "contributed nothing (see not_private/problems_train_later.tsv)",
            style="bold red",
        )
    evaluation["after"] = _evaluate(run, "after", run.tests)
    epsilon = epsilon_spent(run)
    values = record.run_record(run, data, evaluation, epsilon)

    def write() -> None:
        with whole_folder(weights_folder(folder.path, config.method)) as weights:
            run.recognizer.save(weights)
            write_card(weights, values, folder.path.resolve().name)
        write_json(folder.run, values)

    run.ranks.first(write)
    if run.engine is None:
        reporter.say("this model is NOT PRIVATE", style="bold red")
    elif epsilon is None:
        reporter.say("this model is NOT PRIVATE: it was trained without noise", style="bold red")
    else:
        spent = f"epsilon {shown_epsilon(epsilon)} at delta {config.privacy.delta:g}"
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
