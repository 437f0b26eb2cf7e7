"""The public constants of a run's sampling (unit, N, q), computed from the arguments of make_private."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from dpkernels.privacy.rng.streams import SecretStream
from dpkernels.privacy.sampling.canaries import CanaryDataset, PresentSampler, check_audited
from dpkernels.privacy.sampling.given_loader import check_data_loader
from dpkernels.privacy.sampling.samplers import ExampleSampler, SpeakerSampler

UNITS = ("example", "speaker")


@dataclass(frozen=True)
class Sampling:
    """Public constants of the sampling: the sampled units, their number and their probability.

    Attributes:
        unit: the protected unit, "example" or "speaker".
        units: N, the number of units.
        sample_rate: q. For examples: batch_size/N. For speakers: batch_size/(k·N), so that batch_size bounds
            the expected number of examples.
        expected_batch_size: the DataLoader's batch_size, in examples: the noised sum's divisor.
        per_unit: largest number of examples of one unit in a step: 1, or k = max_examples_per_speaker.
        max_batch_size: capacity of truncated Poisson sampling, or None.
    """

    unit: str
    units: int
    sample_rate: float
    expected_batch_size: int
    per_unit: int
    max_batch_size: int | None

    @property
    def epoch_steps(self) -> int:
        """Logical batches in a pass over the data: round(1/q), at least 1."""
        return max(1, round(1 / self.sample_rate))


def speaker_ids(speakers: Sequence[Hashable]) -> list[Hashable]:
    """The ids as plain values that compare by value. Elements of a tensor would each be a different speaker.

    Raises:
        TypeError: an id that is a tensor.
        ValueError: an id that is None or NaN.
    """
    ids = list(speakers.tolist() if hasattr(speakers, "tolist") else speakers)
    for index, speaker in enumerate(ids):
        if isinstance(speaker, torch.Tensor):
            raise TypeError(
                f"speakers[{index}] is a tensor, and no two tensors are equal; give plain ids: speakers.tolist()"
            )
        if speaker is None or speaker != speaker:
            raise ValueError(
                f"speakers[{index}] is {speaker}: every example needs a speaker; give an id, or drop the example"
            )
    return ids


def plan_sampling(
    data_loader: DataLoader,
    *,
    unit: str = "example",
    speakers: Sequence[Hashable] | None = None,
    max_examples_per_speaker: int | None = None,
    max_batch_size: int | None = None,
) -> Sampling:
    """The sampling that `make_private` would use for these arguments.

    Raises:
        ValueError: an argument missing, superfluous or out of range; a DataLoader that Poisson sampling
            cannot replace.
    """
    examples, batch_size = check_data_loader(data_loader)
    check_audited(data_loader.dataset, unit=unit, max_batch_size=max_batch_size)
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r}: expected 'example' or 'speaker'")
    if unit == "example":
        if speakers is not None or max_examples_per_speaker is not None:
            raise ValueError(
                "speakers and max_examples_per_speaker go with unit='speaker'; got unit='example'"
            )
        if max_batch_size is not None and max_batch_size < batch_size:
            raise ValueError(
                f"max_batch_size={max_batch_size} is below the expected batch size {batch_size}: most "
                "batches would be cut; B + 6√B costs next to nothing"
            )
        return Sampling(unit, examples, batch_size / examples, batch_size, 1, max_batch_size)
    if speakers is None or len(speakers) != examples:
        given = "none" if speakers is None else f"{len(speakers)}"
        raise ValueError(
            f"unit='speaker' needs speakers, one id for each of the {examples} examples; got {given}"
        )
    if max_examples_per_speaker is None or max_examples_per_speaker < 1:
        raise ValueError(
            f"unit='speaker' needs max_examples_per_speaker >= 1, got {max_examples_per_speaker}: without a "
            "bound on a speaker's examples in a step, one speaker's contribution has no bound either"
        )
    if max_batch_size is not None:
        raise ValueError(
            "max_batch_size with unit='speaker' is refused: truncated Poisson accounting is for batches of "
            "examples; leave it out"
        )
    count = len(set(speaker_ids(speakers)))
    rate = batch_size / (max_examples_per_speaker * count)
    if rate > 1:
        raise ValueError(
            f"batch_size={batch_size} exceeds max_examples_per_speaker × speakers = "
            f"{max_examples_per_speaker} × {count}; lower batch_size or raise max_examples_per_speaker"
        )
    return Sampling(unit, count, rate, batch_size, max_examples_per_speaker, None)


def sampler_of(
    sampling: Sampling,
    speakers: Sequence[Hashable] | None,
    stream: SecretStream,
    dataset: Any = None,
) -> ExampleSampler | SpeakerSampler | PresentSampler:
    """The sampler that draws the logical batches of this sampling from `stream`.

    Args:
        sampling: from `plan_sampling`.
        speakers: the same as in `plan_sampling`, from `speaker_ids`; None if examples are sampled.
        stream: the secret stream.
        dataset: what is drawn from; of a `CanaryDataset` absent canaries are taken out of each draw.
    """
    if speakers is not None:
        return SpeakerSampler(speakers, sampling.sample_rate, sampling.per_unit, stream)
    sampler = ExampleSampler(sampling.units, sampling.sample_rate, stream, sampling.max_batch_size)
    return PresentSampler(sampler, dataset) if isinstance(dataset, CanaryDataset) else sampler
