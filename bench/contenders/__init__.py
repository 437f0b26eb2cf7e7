"""The ways to take one optimizer step, all of the same interface and the same work.

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
from dpkernels.privacy.keywords import STRATEGIES

TIMED_STRATEGIES = tuple(name for name in STRATEGIES if name != "per_layer")
"""All that clip as every contender does: by the norm of the whole gradient."""


class CannotRun(Exception):
    """This contender cannot train this model; the message is the reason."""


@dataclass(frozen=True)
class Settings:
    """Of a step. clip: C; noise: σ; optimizer: "adamw", or "sgd" where only gradients are of interest."""

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
        """Untimed: what a data loader would have done before the step."""

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

NON_PRIVATE, OWN_LAYERS = "non-private", "own layers, non-private"
OPACUS_HOOKS, OPACUS_GHOST, TORCH_FUNC = "Opacus hooks", "Opacus ghost", "torch.func"
OPACUS_OURS = "Opacus ghost + dpkernels"


def ours(strategy: str = "bookkeeping") -> str:
    """The name of this package's contender of a strategy."""
    return f"dpkernels {strategy}"


def registry() -> dict[str, Factory]:
    """Name -> factory, in the order of a round and of the tables."""
    from bench.contenders import functorch, opacus, own, plain

    return {
        NON_PRIVATE: plain.NonPrivate,
        OWN_LAYERS: plain.OwnLayers,
        **{ours(name): own.with_strategy(name) for name in TIMED_STRATEGIES},
        OPACUS_HOOKS: opacus.Hooks,
        OPACUS_GHOST: opacus.Ghost,
        OPACUS_OURS: opacus.GhostWithOurNorms,
        TORCH_FUNC: functorch.PerSample,
    }
