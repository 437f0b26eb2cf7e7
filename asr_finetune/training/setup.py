"""The objects that the loop needs, from a configuration: corpora, datasets, optimizer and loader, private or not."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from asr_finetune.config.schema import Config, ConfigError, DataConfig, TrainConfig
from asr_finetune.config.values import as_config_error
from asr_finetune.console import Reporter, duration
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.provenance import of_speakers, shared_recordings
from asr_finetune.data.sources import Source, Split, load_corpus
from asr_finetune.models.loading import load_recognizer
from asr_finetune.models.recognizer import Recognizer, fit, to_device
from asr_finetune.training.dataset import SpeechDataset
from asr_finetune.training.sampling import check_batch, micro_batch_limits, sigma_of, unit_arguments, units
from dpkernels import PrivacyEngine
from dpkernels.auditing import CanaryDataset
from dpkernels.blocks import CompilerError, checkpoint_blocks, compile_frozen_blocks, has_checkpointing
from dpkernels.privacy import Ranks, Sampling, plan_sampling, read_ledger
from dpkernels.rounding import shown_sigma

SELF_CHECK_EXAMPLES = 3
SELF_CHECK_LENGTHS = (0.05, 0.4)  # quantiles, from and to
_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
_NAMES_SHOWN = 10


def recognizer_of(config: Config) -> Recognizer:
    """The recogniser of a run, with the run's transcript prefix; see `models.load_recognizer`."""
    recognizer = load_recognizer(config.model)
    recognizer.target_prefix = config.data.target_prefix or recognizer.target_prefix
    return recognizer


def fitted_corpus(
    source: Source, split: Split, data: DataConfig, recognizer: Recognizer, *, training: bool = True
) -> Corpus:
    """The utterances of a corpus that the recogniser accepts; see `sources.load_corpus` and `recognizer.fit`."""
    return fit(load_corpus(source, split=split, data=data), recognizer, training=training)


def load(
    source: Source,
    split: Split,
    data: DataConfig,
    reporter: Reporter,
    name: str,
    recognizer: Recognizer,
    **options: Any,
) -> SpeechDataset:
    """Load the utterances of a corpus that decode and that the recogniser accepts; print a summary and the rest.

    Args:
        source: as in `sources.load_corpus`.
        split: as there.
        data: filters and preparation of transcripts.
        reporter: prints the summary.
        name: the use of the corpus; only for "train" must transcripts be learnable.
        recognizer: utterances that it does not accept are left out.
        options: of the `SpeechDataset`. With cache=True, the check of the audio fills the cache.

    Raises:
        ConfigError: the corpus does not exist, or has no usable utterance.
    """
    with reporter.working(f"{name}: reading the list of recordings"):
        corpus = fitted_corpus(source, split, data, recognizer, training=name == "train")
    dataset = SpeechDataset(corpus, recognizer, **options)
    if data.check_audio:
        dataset.check_audio(reporter, f"{name}: reading audio")
    corpus = dataset.corpus
    reporter.say(f"{name}: {corpus.summary()}")
    for problems, what in ((corpus.problems, "left out"), (corpus.doubts, "listen to")):
        for problem in problems[:_NAMES_SHOWN]:
            reporter.say(f"  {what} {problem.name}: {problem.reason}")
        if len(problems) > _NAMES_SHOWN:
            reporter.say(f"  and {len(problems) - _NAMES_SHOWN} more")
    return dataset


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The torch optimizer over the trained parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _OPTIMIZERS[config.optimizer](trained, lr=config.learning_rate, weight_decay=config.weight_decay)


def prepare_blocks(config: TrainConfig, recognizer: Recognizer, reporter: Reporter) -> None:
    """Checkpoint and compile the model's blocks as configured, in place: after the method, before `make_private`.

    Raises:
        ConfigError: the model has no such blocks, or torch.compile fails; the message names the key.
    """
    if config.checkpointing:
        if not has_checkpointing(recognizer.model):
            raise ConfigError(
                f"train.checkpointing=true: {type(recognizer.base).__name__} has no activation checkpointing: set it "
                "to false, and lower train.physical_batch_size if memory is short"
            )
        checkpoint_blocks(recognizer.model)
    if config.compile_frozen:
        try:
            names = compile_frozen_blocks(recognizer.model)
        except CompilerError as error:
            raise ConfigError(f"train.compile_frozen=true: {error}: set it to false") from error
        if not names:
            raise ConfigError(
                f"train.compile_frozen=true: every block of {recognizer.name} holds a trained parameter, so there "
                "is nothing to compile: set it to false, or choose a method or method.targets that leave blocks frozen"
            )
        reporter.say(f"{len(names)} frozen blocks are compiled when they are first called")


@as_config_error()
def make_private(
    config: Config,
    recognizer: Recognizer,
    optimizer: torch.optim.Optimizer,
    dataset: SpeechDataset,
    lengths: Sequence[int],
    reporter: Reporter,
    ledger: Path | None,
    remaining: int,
    ranks: Ranks,
    coins: np.ndarray | None = None,
) -> tuple[PrivacyEngine, Any, Iterable[Any]]:
    """The engine, the private optimizer and the private loader for `remaining` more steps.

    σ is that of the ledger's first steps; else `privacy.noise_multiplier`; else the smallest for the target ε over
    `train.steps` steps. A resumed run must not calibrate σ again, since the lost steps are spent.

    coins: of an audit; the last examples of the data set are then its canaries.
    """
    privacy = config.privacy
    unit = unit_arguments(config, dataset.corpus)
    data_loader = DataLoader(
        dataset if coins is None else CanaryDataset(dataset, coins),
        batch_size=config.train.batch_size,
        collate_fn=recognizer.collate,
        num_workers=config.train.num_workers,
        persistent_workers=config.train.num_workers > 0,
    )
    sampling = plan_sampling(data_loader, **unit)
    contents = ranks.first(lambda: read_ledger(ledger) if ledger is not None and ledger.exists() else None)
    spent = contents.steps if contents else 0
    started = [run for run in contents.runs if run.steps] if contents else []
    if started:
        sigma = _earlier_noise(started[0].mechanism, config, sampling)
        reporter.say(f"noise multiplier {shown_sigma(sigma)}, as before (ledger: {spent} steps spent)")
    else:
        with reporter.working("calibrating the noise") if privacy.noise_multiplier is None else nullcontext():
            sigma = sigma_of(config, sampling)
        if privacy.noise_multiplier is None:
            reporter.say(
                f"noise multiplier {shown_sigma(sigma)} for epsilon {privacy.epsilon:g} at delta {privacy.delta:g}: "
                f"{config.train.steps} steps, sampling rate {sampling.sample_rate:.4g} of {sampling.units:,} "
                f"{sampling.unit}s"
            )
    size, frames = micro_batch_limits(config.train, lengths)
    engine = PrivacyEngine(accountant=privacy.accountant, ledger=ledger)
    with warnings.catch_warnings():
        if not remaining:  # the run was stopped after its last step, and has its results to write
            warnings.filterwarnings("ignore", ".* nothing will be trained", UserWarning)
        _, private, loader = engine.make_private(
            module=recognizer.model,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_multiplier=sigma,
            max_grad_norm=privacy.max_grad_norm,
            clipping=privacy.clipping,
            clipping_unit=privacy.clips(),
            strategy=privacy.strategy,
            physical_batch_size=size,
            max_padded_frames=frames,
            lengths=list(lengths),
            steps=max(spent + remaining, 1),
            target_epsilon=privacy.epsilon,
            target_delta=privacy.delta,
            **unit,
        )
    return engine, private, loader


def _earlier_noise(earlier: Any, config: Config, sampling: Sampling) -> float:
    """σ of a ledger's earlier steps, which those to come must be like: ε is stated for one mechanism.

    Raises:
        ConfigError: the configuration has another sampling or noise.
    """
    given = config.privacy.noise_multiplier
    pairs = {
        "train.batch_size: the sampling rate": (sampling.sample_rate, earlier.sample_rate),
        "privacy.max_batch_size": (sampling.max_batch_size, earlier.max_batch_size),
        "privacy.noise_multiplier": (given or earlier.noise_multiplier, earlier.noise_multiplier),
    }
    for key, (value, before) in pairs.items():
        if value != before:
            raise ConfigError(
                f"{key} is {value}, but {before} in the steps that the ledger counts already: continue with the same"
            )
    return float(earlier.noise_multiplier)


def check_data(config: Config, corpus: Corpus, recognizer: Recognizer) -> None:
    """Check that the training data is consistent with the rest of the configuration.

    Raises:
        ConfigError: it is not; the message names the key.
    """
    check_batch(config, units(config, corpus), len(corpus))
    batched = config.train.physical_batch_size > 1 or config.train.fill_micro_batches
    if recognizer.equal_lengths_only and batched:
        lengths = {recognizer.samples(utterance) for utterance in corpus.utterances}
        if len(lengths) > 1:
            raise ConfigError(
                f"train.physical_batch_size={config.train.physical_batch_size}: {recognizer.name} takes batches "
                f"of equal lengths only ({recognizer.equal_lengths_only}), and the recordings' differ: set it to 1, "
                "and train.fill_micro_batches to false"
            )


def check_public(valid: Corpus, train: Corpus, unit: str) -> None:
    """Check that validation data can be public: it holds no training recording, and none of a protected speaker.

    Args:
        valid: the validation data.
        train: the training data.
        unit: the privacy unit; "speaker" protects all recordings of a training speaker.

    Raises:
        ConfigError: it holds such recordings; the message names them.
    """
    shared, origin = shared_recordings(train, valid), "training recordings too"
    if not shared and unit == "speaker":
        shared, origin = of_speakers(train, valid), "of training speakers, who are protected as a whole"
    if shared:
        named = ", ".join(shared[:_NAMES_SHOWN]) + (", ..." if len(shared) > _NAMES_SHOWN else "")
        raise ConfigError(
            f"data.valid: {len(shared)} of its {len(valid)} recordings are {origin} ({named}): the "
            "curve over training would be computed from private data without noise. Give public data, or set "
            "train.eval_every=0"
        )


def readable_part(
    dataset: SpeechDataset, lengths: Sequence[int], coins: np.ndarray | None
) -> tuple[Dataset[Any], Sequence[int]]:
    """What a check before training may read, and its lengths: all, or in an audit what the coins left in the run.

    Args:
        dataset: the training data.
        lengths: of its examples.
        coins: of an audit; the last examples are then its canaries.
    """
    if coins is None:
        return dataset, lengths
    present = CanaryDataset(dataset, coins).present.tolist()
    return Subset(dataset, present), [lengths[index] for index in present]


def self_check(
    engine: PrivacyEngine,
    recognizer: Recognizer,
    dataset: Dataset[Any],
    lengths: Sequence[int],
    physical_batch_size: int,
    reporter: Reporter,
) -> None:
    """Check that the gradients of a few utterances of different lengths are the same in a batch and alone.

    The check takes 2 to 3 utterances, no more than a micro-batch holds, from the shorter ones, so that they fit into
    the planned memory. If the recogniser accepts equal lengths only, all are cut to the length of the shortest and get
    its labels. The check runs in float32 whatever the run's dtype, since in a half type the gradient of a small
    parameter can be rounding alone. A run in a half type also checks batch independence in that type.

    Raises:
        SelfCheckError: the gradients differ; the message names the layers.
    """
    order = np.argsort(lengths)
    places = np.linspace(*SELF_CHECK_LENGTHS, min(SELF_CHECK_EXAMPLES, max(physical_batch_size, 2))) * (
        len(order) - 1
    )
    compared = f"{len(places)} utterances"
    items = [dataset[int(order[int(place)])] for place in places]
    if recognizer.equal_lengths_only:
        compared += f" of one length ({recognizer.equal_lengths_only})"
        name, labels = recognizer.input_name, items[0]["labels"]
        shortest = min(len(item[name]) for item in items)
        items = [{**item, name: item[name][:shortest], "labels": labels} for item in items]
    singles = [to_device(recognizer.collate([item]), recognizer.device) for item in items]
    batch = to_device(recognizer.collate(items), recognizer.device)
    began = time.monotonic()
    with reporter.working(f"self-check: comparing the gradients of {compared}, in a batch and alone"):
        with recognizer.in_float32():
            report = engine.self_check(
                recognizer.loss_per_example, batch, singles=singles, samples=len(items)
            )
        if recognizer.dtype is not torch.float32:
            engine.check_batch_independence(recognizer.loss_per_example, batch, samples=len(items))
    modes = (
        ""
        if "train" in report.modes
        else " in evaluation mode, and independent of the batch in training mode, which is random"
    )
    reporter.say(
        f"self-check passed: the gradients of {compared} are the same in a batch and alone{modes} "
        f"({duration(time.monotonic() - began)})"
    )
