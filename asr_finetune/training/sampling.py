"""Who is sampled in a run, with what probability, and the noise that follows: of a run, its dry run and its plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from asr_finetune.config.schema import Config, ConfigError, TrainConfig
from asr_finetune.config.values import as_config_error
from asr_finetune.data.corpus import Corpus
from dpkernels.privacy import Sampling, noise_multiplier, plan_sampling


def units(config: Config, corpus: Corpus) -> int:
    """N: the number of utterances, each a recording of its own, or of speakers where they are what is protected.

    Raises:
        ConfigError: the unit is a speaker, and an utterance has none, or a recording has several.
    """
    if not _of_speakers(config):
        return len(corpus)
    nameless = [utterance.id for utterance in corpus.utterances if utterance.speaker is None]
    if nameless:
        raise ConfigError(
            f"privacy.unit=speaker needs the speaker of every utterance; {len(nameless)} have none, e.g. "
            f"{nameless[0]}. Add them to the data (manifest: `speaker`; datasets: data.speaker_column), or "
            "set privacy.unit=example"
        )
    if corpus.disputed:
        raise ConfigError(
            f"privacy.unit=speaker: {len(corpus.disputed)} recordings are listed under more than one speaker, so that "
            f"a speaker's data is not that speaker's alone, e.g. {corpus.disputed[0]}. List each under one speaker, or "
            "leave it out"
        )
    return len(set(corpus.speakers))


def unit_arguments(config: Config, corpus: Corpus) -> dict[str, Any]:
    """What make_private and plan_sampling need to know about the privacy unit."""
    return _arguments(config, corpus.speakers if config.privacy.unit == "speaker" else None)


def _arguments(config: Config, speakers: Any) -> dict[str, Any]:
    privacy = config.privacy
    if privacy.unit == "example":
        return {"unit": "example", "max_batch_size": privacy.max_batch_size}
    return {
        "unit": "speaker",
        "speakers": speakers,
        "max_examples_per_speaker": privacy.max_examples_per_speaker,
        "max_batch_size": privacy.max_batch_size,  # the engine refuses it, with the reason
    }


def sampling_of(config: Config, corpus: Corpus) -> Sampling:
    """The sampling that a run on this corpus has.

    Raises:
        ConfigError: a batch that there are too few of, or an utterance without the speaker that is to be protected.
        ValueError: see `dpkernels.privacy.plan_sampling`.
    """
    check_batch(config, units(config, corpus), len(corpus))
    return _planned(config, len(corpus), unit_arguments(config, corpus))


def assumed_sampling(config: Config, count: int) -> Sampling:
    """The sampling of a run on `count` units, of which nothing else is known: each speaker has utterances enough.

    Raises:
        ConfigError: a batch that there are too few of.
        ValueError: see `dpkernels.privacy.plan_sampling`.
    """
    each = _most_of_a_unit(config)
    check_batch(config, count, each * count)
    return _planned(config, each * count, _arguments(config, np.repeat(np.arange(count), each)))


@as_config_error()
def _planned(config: Config, utterances: int, unit: dict[str, Any]) -> Sampling:
    # The engine's own rule, so that it is written once; it asks the loader for its sizes only.
    loader: Any = DataLoader(range(utterances), batch_size=config.train.batch_size)  # type: ignore[arg-type]
    return plan_sampling(loader, **unit)


def _most_of_a_unit(config: Config) -> int:
    """Utterances of one unit that may join a step: 1, or k of a speaker."""
    if not _of_speakers(config):
        return 1
    assert config.privacy.max_examples_per_speaker is not None  # PrivacyConfig.check saw to it
    return config.privacy.max_examples_per_speaker


def _of_speakers(config: Config) -> bool:
    return config.privacy.enabled and config.privacy.unit == "speaker"


def check_batch(config: Config, count: int, utterances: int) -> None:
    """Whether there are enough units, and enough utterances of them, for the expected batch.

    Args:
        config: the batch, and what is protected.
        count: number of units; see `units`.
        utterances: number of utterances.

    Raises:
        ConfigError: there are not; the message says how large the batch may be.
    """
    batch, each = config.train.batch_size, _most_of_a_unit(config)
    if batch <= min(each * count, utterances):
        return
    if _of_speakers(config) and each * count <= utterances:
        raise ConfigError(
            f"train.batch_size={batch} (--batch-size) exceeds {each * count:,}: {each} utterances in a step "
            f"(privacy.max_examples_per_speaker) of each of {count:,} training speakers: lower it, or raise that"
        )
    raise ConfigError(
        f"train.batch_size={batch} (--batch-size) exceeds the {utterances:,} training utterances: lower it"
    )


def expected_utterances(config: Config, corpus: Corpus | None) -> float:
    """Expected utterances in a logical step: fewer than the batch where speakers have fewer than may join.

    Without a corpus each speaker is taken to have enough.
    """
    batch = config.train.batch_size
    if corpus is None or not _of_speakers(config):
        return batch
    each, counts = _most_of_a_unit(config), Counter(corpus.speakers).values()
    return batch * sum(min(count, each) for count in counts) / (each * len(counts))


@as_config_error()
def sigma_of(config: Config, sampling: Sampling) -> float:
    """σ of a run from its start: by hand, else the smallest for the target ε over `train.steps` steps."""
    privacy = config.privacy
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.epsilon is not None  # PrivacyConfig.check saw to it
    assert privacy.delta is not None
    return noise_multiplier(
        privacy.epsilon,
        privacy.delta,
        sampling.sample_rate,
        config.train.steps,
        accountant=privacy.accountant,
        max_batch_size=privacy.max_batch_size,
        dataset_size=sampling.units,
    )


def micro_batch_limits(config: TrainConfig, lengths: Sequence[int] | np.ndarray) -> tuple[int, int | None]:
    """The largest micro-batch: (utterances, frames with padding, or None for no such limit).

    With `fill_micro_batches` it is as many frames as `physical_batch_size` of the longest utterances have: what fits of
    those fits of shorter ones in larger numbers.
    """
    if not config.fill_micro_batches:
        return config.physical_batch_size, None
    return config.batch_size, config.physical_batch_size * int(np.max(lengths))
