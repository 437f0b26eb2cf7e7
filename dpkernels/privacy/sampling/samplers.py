"""The samplers: Poisson sampling over examples or speakers, by 64-bit words of a cryptographic stream.

Inclusion: a unit joins when its word < ⌊q·2⁶⁴⌋, so its probability is at most q and less than 2⁻⁶⁴ below it.
ε grows with q, so accounting with q itself is an upper bound.
"""

from collections.abc import Hashable, Sequence
from fractions import Fraction

import numpy as np

from dpkernels.privacy.rng.streams import PURPOSE_INCLUSION, PURPOSE_SUBSET, SecretStream


def inclusion_threshold(sample_rate: float) -> int:
    """⌊q·2⁶⁴⌋, exactly. Raises ValueError for q outside (0, 1]."""
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate must lie in (0, 1], got {sample_rate}")
    return int(Fraction(sample_rate) * 2**64)


def poisson(count: int, sample_rate: float, stream: SecretStream) -> np.ndarray:
    """Indices (int64, ascending) of the units that join: each of `count` independently with probability q."""
    threshold = inclusion_threshold(sample_rate)
    if threshold == 2**64:
        return np.arange(count)
    words = stream.words(count, draw=stream.next_draw(), purpose=PURPOSE_INCLUSION)
    return np.flatnonzero(words < np.uint64(threshold))


def uniform_subset(items: np.ndarray, size: int, stream: SecretStream) -> np.ndarray:
    """A uniformly random subset of `size` items (all items if there are at most `size`), in their order.

    Every item gets a 64-bit word, and the items with the smallest words are kept. Equal words would favour one order,
    so all words are then drawn again.
    """
    if len(items) <= size:
        return items
    while True:
        words = stream.words(len(items), draw=stream.next_draw(), purpose=PURPOSE_SUBSET)
        if len(np.unique(words)) == len(words):
            return items[np.sort(np.argsort(words)[:size])]


class ExampleSampler:
    """Poisson sampling over examples. A capacity, if given, truncates a batch to a uniformly random subset.

    Args:
        dataset_size: N.
        sample_rate: q.
        stream: the secret stream.
        max_batch_size: capacity, or None.
    """

    def __init__(
        self, dataset_size: int, sample_rate: float, stream: SecretStream, max_batch_size: int | None = None
    ) -> None:
        self.dataset_size = dataset_size
        self.sample_rate = sample_rate
        self.max_batch_size = max_batch_size
        self._stream = stream

    def draw(self) -> np.ndarray:
        """Indices of one logical batch, possibly empty."""
        chosen = poisson(self.dataset_size, self.sample_rate, self._stream)
        if self.max_batch_size is None:
            return chosen
        return uniform_subset(chosen, self.max_batch_size, self._stream)


class SpeakerSampler:
    """Poisson sampling over speakers. At most k uniformly random examples of each chosen speaker join.

    Clipped by themselves, a speaker's examples add at most k·C; clipped together (clipping_unit="speaker"), C.

    Args:
        speakers: the speaker of every example, in the dataset's order.
        sample_rate: q, the probability of a speaker to be chosen.
        max_examples_per_speaker: k >= 1.
        stream: the secret stream.
    """

    def __init__(
        self,
        speakers: Sequence[Hashable],
        sample_rate: float,
        max_examples_per_speaker: int,
        stream: SecretStream,
    ) -> None:
        groups: dict[Hashable, list[int]] = {}
        for index, speaker in enumerate(speakers):
            groups.setdefault(speaker, []).append(index)
        self._examples = [np.array(group) for group in groups.values()]
        self.sample_rate = sample_rate
        self.max_examples_per_speaker = max_examples_per_speaker
        self._stream = stream

    @property
    def speakers(self) -> int:
        """Number of speakers: the N of the accounting."""
        return len(self._examples)

    def draw(self) -> np.ndarray:
        """Indices of one logical batch, possibly empty."""
        chosen = poisson(len(self._examples), self.sample_rate, self._stream)
        parts = [
            uniform_subset(self._examples[speaker], self.max_examples_per_speaker, self._stream)
            for speaker in chosen
        ]
        return np.sort(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int64)
