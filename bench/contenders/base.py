"""The interface of the ways to take one optimizer step, which all do the same work.

Private contenders clip every example's gradient to C, sum, add noise of σ·C, divide by the batch size and take an
AdamW step; non-private ones take the AdamW step on the mean gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.cases.models import Batch, Case, trained


class CannotRun(Exception):
    """This contender cannot train this model; the message is the reason."""


@dataclass(frozen=True)
class Settings:
    """A step's settings. clip: C; noise: σ; optimizer: "adamw", or "sgd" to measure gradients only."""

    clip: float = 1.0
    noise: float = 1.0
    lr: float = 1e-4
    optimizer: str = "adamw"


class Contender(ABC):
    """One way to take a step. `model` becomes its own; `private` says whether gradients are clipped."""

    private = True

    def __init__(self, case: Case, model: nn.Module, batch: Batch, settings: Settings) -> None:
        self.case, self.model, self.batch, self.settings = case, model, batch, settings
        self.parameters = trained(model)

    @property
    def size(self) -> int:
        """Examples in the batch."""
        return len(self.batch["labels"])

    def new_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that all contenders use."""
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[self.settings.optimizer]
        return kind(self.parameters.values(), lr=self.settings.lr)

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Prepare the step, untimed, as a data loader would."""

    @abstractmethod
    def step(self) -> None:
        """Timed: gradients cleared, forward, backward, clip, noise, optimizer step."""

    def released(self) -> dict[str, Tensor]:
        """After a step: batch size × the gradient that the optimizer saw; with σ = 0 the (clipped) sum."""
        missing = [name for name, p in self.parameters.items() if p.grad is None]
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing[:3])} ({len(missing)} parameters)")
        return {
            name: p.grad.detach() * self.size for name, p in self.parameters.items() if p.grad is not None
        }


Factory = Callable[[Case, nn.Module, Batch, Settings], Contender]
