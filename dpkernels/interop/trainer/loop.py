"""Two parts of Trainer's loop in a private form: the accelerator, and the batches that it iterates over."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from dpkernels.interop.trainer.losses import TrainerError
from dpkernels.privacy import DPDataLoader, LogicalBatch


class PrivateAccelerator(Accelerator):
    """Accelerate without its wrappers: model and optimizer are private already, and each step is a logical batch's."""

    def prepare_model(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        """The model itself: DistributedDataParallel would average gradients before they are clipped."""
        return model

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any
    ) -> torch.optim.Optimizer:
        """The optimizer itself: AcceleratedOptimizer decides on its own whether a step is taken."""
        return optimizer

    def backward(self, loss: Any, **_: Any) -> NoReturn:
        """Refused: TrainerError."""
        raise TrainerError(
            "accelerator.backward(loss) is refused in a private Trainer: the gradient of one number for a batch cannot "
            "be clipped by example. Leave training_step as it is, and give compute_loss_per_example="
        )


class SubstepBatches:
    """What Trainer iterates over: as many batches for each optimizer step as gradient_accumulation_steps says.

    The first of them is a whole logical batch, and the others are None: `training_step` does nothing for these. The
    micro-batches of a Poisson sample have no fixed number.

    Args:
        data_loader: the data set with its data collator; its batch_size is the expected logical batch.
        epoch_steps: logical batches in an epoch.
        substeps: gradient_accumulation_steps.

    Attributes:
        loader: the private loader, once there is one.
    """

    def __init__(self, data_loader: DataLoader, epoch_steps: int, substeps: int) -> None:
        self.data_loader = data_loader
        self.dataset = data_loader.dataset
        self.loader: DPDataLoader | None = None
        self._epoch_steps = epoch_steps
        self._substeps = substeps
        self._run: Iterator[LogicalBatch] | None = None

    def __len__(self) -> int:
        return self._epoch_steps * self._substeps

    def __iter__(self) -> Iterator[LogicalBatch | None]:
        """An epoch: the next `epoch_steps` logical batches of the run, or as many as are left."""
        assert self.loader is not None  # set before training begins
        if self._run is None:
            self._run = iter(self.loader)
        for logical_batch in itertools.islice(self._run, self._epoch_steps):
            yield logical_batch
            yield from [None] * (self._substeps - 1)

    def collated(self, count: int, first: int) -> Any:
        """A batch of `count` examples from `first` on, or of as many as there are; None without any."""
        dataset: Any = self.dataset
        examples = range(first, min(first + count, len(dataset)))
        return self.data_loader.collate_fn([dataset[index] for index in examples]) if examples else None
