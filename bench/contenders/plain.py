"""Training without privacy: PyTorch's (and PEFT's) own layers, and this package's layers with nothing attached."""

from __future__ import annotations

import torch
from torch import nn

import dpkernels
from bench.cases.models import Batch, Case, forward
from bench.contenders.base import Contender, Settings


class NonPrivate(Contender):
    """Plain PyTorch; for LoRA, PEFT's own layers."""

    private = False

    def __init__(self, case: Case, model: nn.Module, batch: Batch, settings: Settings) -> None:
        super().__init__(case, model, batch, settings)
        self.optimizer = self.new_optimizer()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.case.losses(forward(self.model, self.batch), self.batch["labels"]).mean().backward()
        self.optimizer.step()


class Compiled(NonPrivate):
    """As NonPrivate, under torch.compile."""

    def __init__(self, case: Case, model: nn.Module, batch: Batch, settings: Settings) -> None:
        super().__init__(case, model, batch, settings)
        self.model = torch.compile(model)
        self._is_compiled = False

    def prepare(self) -> None:
        # The first step compiles. With lr=0, as the checker has it, it changes nothing.
        if not self._is_compiled:
            self.step()
        self._is_compiled = True


class OwnLayers(NonPrivate):
    """`dpkernels.swap` without an engine, for the cost of the swap alone."""

    def __init__(self, case: Case, model: nn.Module, batch: Batch, settings: Settings) -> None:
        super().__init__(case, dpkernels.swap(model), batch, settings)
