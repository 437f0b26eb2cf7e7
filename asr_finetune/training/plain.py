"""Ordinary training in the shape of the private loop, for comparison. Nothing here is private."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from asr_finetune.config.schema import TrainConfig
from asr_finetune.models.recognizer import Recognizer
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
    """Logical batches of Poisson size from an ordinary seeded generator, split as private ones are."""

    def __init__(
        self, config: TrainConfig, dataset: Dataset[Any], recognizer: Recognizer, lengths: Sequence[int]
    ) -> None:
        self._config = config
        self._dataset = dataset
        self._collate = recognizer.collate
        self._lengths = np.asarray(lengths)
        self.first_step = 0

    def __iter__(self) -> Iterator[Iterator[Any]]:
        parts = [self._draw(step) for step in range(self.first_step, self._config.steps)]
        batches = iter(
            DataLoader(
                self._dataset,
                batch_sampler=[part for step in parts for part in step],
                collate_fn=self._collate,
                num_workers=self._config.num_workers,
            )
        )
        for step in parts:
            yield (next(batches) for _ in step)

    def _draw(self, step: int) -> list[list[int]]:
        size = len(self._lengths)
        generator = np.random.default_rng([self._config.seed, step])
        chosen = np.flatnonzero(generator.random(size) < self._config.batch_size / size)
        size, frames = micro_batch_limits(self._config, self._lengths)
        return micro_batches(chosen, size, self._lengths, frames)


def micro_batch_limits(config: TrainConfig, lengths: Sequence[int] | np.ndarray) -> tuple[int, int | None]:
    """The largest micro-batch: (utterances, frames with padding, or None for no such limit).

    With `fill_micro_batches` it is as many frames as `physical_batch_size` of the longest utterances have: what fits of
    those fits of shorter ones in larger numbers.
    """
    if not config.fill_micro_batches:
        return config.physical_batch_size, None
    return config.batch_size, config.physical_batch_size * int(np.max(lengths))
