"""Ordinary training with the interface of the private loop, for comparison. Nothing here is private."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dpkernels.deprecation import renamed_argument
from dpkernels.privacy import micro_batches


class PlainOptimizer:
    """The private optimizer's interface over plain layers: Σ of the losses / expected batch size."""

    def __init__(self, optimizer: torch.optim.Optimizer, batch_size: int) -> None:
        self._optimizer = optimizer
        self._batch_size = batch_size
        self.param_groups = optimizer.param_groups

    def backward(self, losses: torch.Tensor) -> None:
        """Add the gradient of losses [B]."""
        (losses.sum() / self._batch_size).backward()

    def step(self) -> None:
        """Take the wrapped optimizer's step."""
        self._optimizer.step()

    def zero_grad(self) -> None:
        """Clear gradients."""
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the wrapped optimizer's."""
        self._optimizer.load_state_dict(state)
        self.param_groups = self._optimizer.param_groups


class PlainLoader:
    """Poisson-sampled logical batches from an ordinary seeded generator, split into micro-batches like private ones.

    Each iteration yields a logical batch for every step from `first_step` on: an iterator of its micro-batches.

    Args:
        dataset: the examples.
        lengths: length of each example; a micro-batch holds examples of similar lengths.
        batch_size: expected logical batch: each example joins with probability batch_size / N.
        steps: total number of logical batches.
        physical_batch_size: examples in a micro-batch.
        max_padded_frames: see `dpkernels.privacy.micro_batches`. physical_frames: its deprecated name.
        seed: seed of the sampling, together with the step's number.
        options: more arguments of `torch.utils.data.DataLoader`: collate_fn, num_workers.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        lengths: Sequence[int],
        *,
        batch_size: int,
        steps: int,
        physical_batch_size: int,
        max_padded_frames: int | None = None,
        physical_frames: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        max_padded_frames = renamed_argument(
            "physical_frames", physical_frames, "max_padded_frames", max_padded_frames
        )
        self._dataset = dataset
        self._lengths = np.asarray(lengths)
        self._rate, self._steps, self._seed = batch_size / len(lengths), steps, seed
        self._size, self._frames = physical_batch_size, max_padded_frames
        self._options = options
        self.first_step = 0

    def __iter__(self) -> Iterator[Iterator[Any]]:
        parts = [self._draw(step) for step in range(self.first_step, self._steps)]
        sampler = [part for step in parts for part in step]
        batches = iter(DataLoader(self._dataset, batch_sampler=sampler, **self._options))
        for step in parts:
            yield (next(batches) for _ in step)

    def _draw(self, step: int) -> list[list[int]]:
        generator = np.random.default_rng([self._seed, step])
        chosen = np.flatnonzero(generator.random(len(self._lengths)) < self._rate)
        return micro_batches(chosen, self._size, self._lengths, self._frames)
