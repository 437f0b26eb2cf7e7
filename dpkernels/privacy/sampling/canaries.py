"""Canaries of an audit: examples of which a secret coin decides whether the run is trained on them.

**N and q are those of all places.** A canary has a place in the data set, and counts in N, whether it is present or
not; the sampler draws over all N places with q = batch_size/N, and the places of absent canaries are taken out of the
draw. A present example is then drawn independently with probability q, as ever, and an absent one contributes nothing.
Two runs that differ in one coin thus differ in one example that is there or not, and in nothing else: neither in q, nor
in the noise, nor in the divisor. That is the adjacency of the claim, add or remove one example. Were absent canaries
left out of N instead, q = batch_size/N would change with the coins, and the audited mechanism would not be the claimed
one; were others put in their places, the adjacency would be to replace one, whose ε is larger.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from dpkernels.privacy.rng.streams import PURPOSE_CANARIES, SecretStream
from dpkernels.privacy.sampling.samplers import ExampleSampler


def draw_coins(canaries: int) -> np.ndarray:
    """A fair coin for each canary, under a fresh key of the operating system: [m] bool, True for a present one.

    Raises:
        ValueError: fewer than one canary.
    """
    if canaries < 1:
        raise ValueError(f"canaries={canaries}: an audit needs at least one; give some hundreds")
    return coins_of(canaries, SecretStream())


def coins_of(canaries: int, stream: SecretStream) -> np.ndarray:
    """`draw_coins` from a given stream."""
    words = stream.words(canaries, draw=stream.next_draw(), purpose=PURPOSE_CANARIES)
    return words < np.uint64(2**63)


class CanaryDataset(Subset[Any]):
    """A data set whose last m examples are canaries, each present or absent by its coin.

    `make_private` takes a DataLoader over it and trains on the present ones: absent canaries never leave the sampler.
    Reading an absent one raises, so that nothing can be trained on it by another way. The error does not name it, so
    that no log shows a coin. The attacker reads all canaries from `dataset`. An audited run has one process,
    unit="example" and no max_batch_size. The ledger records m.

    Args:
        dataset: map-style, N examples. An example of its first N − m must not be that of a canary, too: its two copies
            would be one unit.
        coins: [m] bool, from `draw_coins`, 1 <= m <= N.

    Raises:
        ValueError: coins of another kind or number, or no example is present.
    """

    def __init__(self, dataset: Dataset[Any], coins: Any) -> None:
        size = len(dataset)  # type: ignore[arg-type]
        super().__init__(dataset, range(size))
        coins = np.asarray(coins)
        if coins.dtype != np.bool_ or coins.ndim != 1 or not 1 <= len(coins) <= size:
            raise ValueError(
                f"coins: expected a bool for each canary, from 1 to all {size} examples, got {coins.dtype} of shape "
                f"{coins.shape}; draw_coins(m) draws them"
            )
        if not coins.any() and len(coins) == size:
            raise ValueError(
                "coins: no example is present; add examples that are no canaries, or more canaries"
            )
        self.canaries = len(coins)
        self._present = np.concatenate([np.ones(size - len(coins), dtype=bool), coins])

    @property
    def present(self) -> np.ndarray:
        """Indices of the examples that are present, ascending. Secret, as the coins are."""
        return np.flatnonzero(self._present)

    def __getitem__(self, index: Any) -> Any:
        self._check_present([index])
        return super().__getitem__(index)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The examples at these indices, as torch's fetcher asks for them."""
        self._check_present(indices)
        return super().__getitems__(indices)

    def _check_present(self, indices: Sequence[int]) -> None:
        if not all(self._present[index] for index in indices):
            # No index: which canaries are absent is secret, and messages are written to logs.
            raise RuntimeError(
                f"CanaryDataset: {len(indices)} examples were asked for, among them a canary that its coin left out of "
                "this run, so it must not be trained on. To score canaries, read them from the data set that "
                "CanaryDataset was given (.dataset); read the others by the indices in .present"
            )


class PresentSampler:
    """Draws as another sampler does, over all places, and takes the places of absent canaries out of each draw."""

    def __init__(self, sampler: ExampleSampler, dataset: CanaryDataset) -> None:
        self._sampler = sampler
        self._dataset = dataset

    def draw(self) -> np.ndarray:
        """Indices of one logical batch, possibly empty."""
        drawn = self._sampler.draw()
        return drawn[np.isin(drawn, self._dataset.present)]


def present_part(dataset: Any, lengths: np.ndarray | None) -> tuple[Any, np.ndarray | None]:
    """What may be read of a data set, and the lengths of that: all of it, or the present part of a `CanaryDataset`."""
    if not isinstance(dataset, CanaryDataset):
        return dataset, lengths
    present = dataset.present
    return Subset(dataset.dataset, present.tolist()), None if lengths is None else lengths[present]


def check_audited(dataset: Any, *, unit: str, max_batch_size: int | None) -> None:
    """Raise ValueError where the claim of a run with canaries would not be that of one without."""
    if not isinstance(dataset, CanaryDataset):
        return
    if unit != "example":
        raise ValueError(
            f"unit={unit!r} with a CanaryDataset: a coin decides about one example, so the audit is of "
            "unit='example'; leave unit out"
        )
    if max_batch_size is not None:
        raise ValueError(
            f"max_batch_size={max_batch_size} with a CanaryDataset is refused: whether a batch is truncated would "
            "depend on the number of present canaries; leave it out"
        )


def check_one_process(dataset: Any, ranks: int) -> None:
    """Raise ValueError where several processes would each have drawn coins of their own."""
    if isinstance(dataset, CanaryDataset) and ranks > 1:
        raise ValueError(
            f"a CanaryDataset with {ranks} processes is refused: each has drawn coins of its own, and the parts of a "
            "batch would be those of different data sets; audit in one process"
        )
