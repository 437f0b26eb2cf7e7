"""Sampled units, their probability, and the resulting noise, for a run, its dry run and its plan."""

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
    """N: the number of utterances (each a distinct recording), or of speakers if the privacy unit is a speaker.

    Raises:
        ConfigError: the unit is a speaker, and an utterance has no speaker, or a recording has several.
    """
    _check_pieces(config, corpus)
    if not _of_speakers(config):
        return len(corpus)
    nameless = [utterance.id for utterance in corpus.utterances if utterance.speaker is None]
    if nameless:
        raise ConfigError(
            f"privacy.unit=speaker needs the speaker of every utterance; {len(nameless)} have none, e.g. "
            f"{nameless[0]}. Add them to the data (a column `speaker`, or another that data.columns names), or "
            "set privacy.unit=example"
        )
    if corpus.disputed:
        raise ConfigError(
            f"privacy.unit=speaker: {len(corpus.disputed)} recordings are listed under more than one speaker, so "
            f"one speaker's data is not separate from another's, e.g. {corpus.disputed[0]}. List each "
            "under one speaker, or leave it out"
        )
    return len(set(corpus.speakers))


def _check_pieces(config: Config, corpus: Corpus) -> None:
    """Check that no sound is in two units: pieces of a recording are the units only where that is said."""
    if not config.privacy.enabled:
        return
    shared = [
        pair for pair in corpus.overlapping if not _of_speakers(config) or pair[0].speaker != pair[1].speaker
    ]
    if shared:
        first, second = shared[0]
        raise ConfigError(
            f"data.train: {len(shared)} pieces share samples with another {config.privacy.unit}'s, e.g. {first.name} "
            f"and {second.name}, so removing one would not remove what was said: trim them, or leave them out"
        )
    if corpus.cut and not _of_speakers(config) and config.data.pieces == "refuse":
        raise ConfigError(
            f"data.train: {len(corpus.cut)} recordings are listed in several pieces, e.g. {corpus.cut[0]}; each would "
            "count as an example, and ε would protect one piece, not the recording. Set data.pieces=examples if that "
            "is meant, or protect all of a speaker with privacy.unit=speaker"
        )


def unit_arguments(config: Config, corpus: Corpus) -> dict[str, Any]:
    """The arguments of make_private and plan_sampling that describe the privacy unit."""
    return _arguments(config, corpus.speakers if config.privacy.unit == "speaker" else None)


def _arguments(config: Config, speakers: Any) -> dict[str, Any]:
    privacy = config.privacy
    if privacy.unit == "example":
        return {"unit": "example", "max_batch_size": privacy.max_batch_size}
    return {
        "unit": "speaker",
        "speakers": speakers,
        "max_examples_per_speaker": privacy.max_examples_per_speaker,
        "max_batch_size": privacy.max_batch_size,  # the engine raises an error with the reason
    }


def sampling_of(config: Config, corpus: Corpus) -> Sampling:
    """The sampling of a run on this corpus.

    Raises:
        ConfigError: the batch is larger than the corpus, or an utterance lacks the speaker that is to be protected.
        ValueError: see `dpkernels.privacy.plan_sampling`.
    """
    check_batch(config, units(config, corpus), len(corpus))
    return _planned(config, len(corpus), unit_arguments(config, corpus))


def assumed_sampling(config: Config, count: int) -> Sampling:
    """The sampling of a run on `count` units without a corpus: it assumes that each speaker has enough utterances.

    Raises:
        ConfigError: the batch is larger than the units allow.
        ValueError: see `dpkernels.privacy.plan_sampling`.
    """
    each = _most_of_a_unit(config)
    check_batch(config, count, each * count)
    return _planned(config, each * count, _arguments(config, np.repeat(np.arange(count), each)))


@as_config_error()
def _planned(config: Config, utterances: int, unit: dict[str, Any]) -> Sampling:
    # The engine's own rule, so that it is written once; it reads only the loader's sizes.
    loader: Any = DataLoader(range(utterances), batch_size=config.train.batch_size)  # type: ignore[arg-type]
    return plan_sampling(loader, **unit)


def _most_of_a_unit(config: Config) -> int:
    """The most utterances of one unit that may join a step: 1, or k for a speaker."""
    if not _of_speakers(config):
        return 1
    assert config.privacy.max_examples_per_speaker is not None  # PrivacyConfig.check ensures it
    return config.privacy.max_examples_per_speaker


def _of_speakers(config: Config) -> bool:
    return config.privacy.enabled and config.privacy.unit == "speaker"


def check_batch(config: Config, count: int, utterances: int) -> None:
    """Check that there are enough units, and enough utterances of them, for the expected batch.

    Args:
        config: the batch, and the privacy unit.
        count: number of units; see `units`.
        utterances: number of utterances.

    Raises:
        ConfigError: there are not; the message gives the largest batch.
    """
    batch, each = config.train.batch_size, _most_of_a_unit(config)
    if batch <= min(each * count, utterances):
        return
    if _of_speakers(config) and each * count <= utterances:
        raise ConfigError(
            f"train.batch_size={batch} (--batch-size) exceeds {each * count:,}: {each} utterances in a step "
            f"(privacy.max_examples_per_speaker) of each of {count:,} training speakers: lower the batch size, "
            "or raise that limit"
        )
    raise ConfigError(
        f"train.batch_size={batch} (--batch-size) exceeds the {utterances:,} training utterances: lower it"
    )


def expected_utterances(config: Config, corpus: Corpus | None) -> float:
    """Expected utterances in a logical step: fewer than the batch size if speakers have fewer than may join.

    Without a corpus each speaker is assumed to have enough.
    """
    batch = config.train.batch_size
    if corpus is None or not _of_speakers(config):
        return batch
    each, counts = _most_of_a_unit(config), Counter(corpus.speakers).values()
    return batch * sum(min(count, each) for count in counts) / (each * len(counts))


@as_config_error()
def sigma_of(config: Config, sampling: Sampling) -> float:
    """σ of a new run: `privacy.noise_multiplier`, else the smallest for the target ε over `train.steps` steps."""
    privacy = config.privacy
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.epsilon is not None  # PrivacyConfig.check ensures it
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
    """The limits of a micro-batch: (utterances, padded frames or None for no such limit).

    With `fill_micro_batches` the limit is the padded frames of `physical_batch_size` of the longest utterances, so that
    a micro-batch holds more of the shorter ones.
    """
    if not config.fill_micro_batches:
        return config.physical_batch_size, None
    return config.batch_size, config.physical_batch_size * int(np.max(lengths))
