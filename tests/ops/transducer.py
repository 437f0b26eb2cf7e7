"""Batches for the transducer ops: ragged lengths, and the utterances at the edges of what has a path."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpkernels import ops, reference

TDT = (0, 1, 2, 3, 4)
"""Parakeet's durations."""
VARIANTS = {"rnnt": (), "tdt": TDT, "tdt without 0": (2, 1)}


@dataclass(frozen=True)
class Batch:
    """The arguments of `transducer_loss`."""

    encoder: Tensor
    predictor: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    frame_lengths: Tensor
    target_lengths: Tensor
    durations: tuple[int, ...] = ()
    blank: int = 0
    activation: str = "relu"
    sigma: float = 0.0

    @property
    def joint(self) -> tuple[Any, ...]:
        return (*self.states, self.targets, self.frame_lengths, self.target_lengths)

    @property
    def states(self) -> tuple[Any, ...]:
        return (self.encoder, self.predictor, self.weight, self.bias)

    @property
    def options(self) -> dict[str, Any]:
        return {"blank": self.blank, "durations": self.durations, "activation": self.activation}

    def loss(self) -> Tensor:
        return ops.transducer_loss(*self.joint, **self.options, sigma=self.sigma)

    def backward_arguments(self) -> tuple[Any, ...]:
        """Those of `transducer_gradients` and `transducer_cells`, by the definitions."""
        scores, normalizers = reference.transducer_scores(*self.joint, **self.options, sigma=self.sigma)
        lengths = (self.frame_lengths, self.target_lengths)
        losses, flows = reference.transducer_lattice(scores, *lengths, durations=self.durations)
        generator = torch.Generator().manual_seed(1)
        grad_losses = torch.randn(len(losses), dtype=torch.float64, generator=generator)
        return (*self.joint, normalizers, flows, grad_losses.to(losses))

    def to(self, dtype: torch.dtype) -> "Batch":
        weights = {name: getattr(self, name) for name in ("encoder", "predictor", "weight", "bias")}
        return replace(self, **{name: None if t is None else t.to(dtype) for name, t in weights.items()})

    def alone(self, i: int) -> "Batch":
        """Utterance i by itself, without padding."""
        n, m = int(self.frame_lengths[i]), int(self.target_lengths[i])
        return replace(
            self,
            encoder=self.encoder[i : i + 1, :n].clone(),
            predictor=self.predictor[i : i + 1, : m + 1].clone(),
            targets=self.targets[i : i + 1, :m].clone(),
            frame_lengths=self.frame_lengths[i : i + 1],
            target_lengths=self.target_lengths[i : i + 1],
        )


def make(
    durations: tuple[int, ...] = (),
    *,
    frames: tuple[int, ...] = (7, 1, 5, 0, 2, 6),
    labels: tuple[int, ...] = (3, 0, 2, 1, 3, 0),
    hidden: int = 6,
    classes: int = 9,
    bias: bool = True,
    blank: int = 0,
    activation: str = "relu",
    sigma: float = 0.05,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Standard normal states and labels, padded; without a 0 among the durations some utterances have no path."""
    batch, outputs = len(frames), classes + len(durations)
    others = torch.tensor([label for label in range(classes) if label != blank])
    return Batch(
        torch.randn(batch, max(frames), hidden).to(dtype),
        torch.randn(batch, max(labels) + 1, hidden).to(dtype),
        torch.randn(outputs, hidden).to(dtype),
        torch.randn(outputs).to(dtype) if bias else None,
        others[torch.randint(len(others), (batch, max(labels)))],
        torch.tensor(frames),
        torch.tensor(labels),
        durations,
        blank,
        activation,
        sigma,
    )


def arguments(op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one of the ops, as its schema takes them."""
    batch = make(TDT)
    options = {**batch.options, "durations": list(TDT)}
    if op == "transducer_scores":
        return batch.joint, {**options, "sigma": batch.sigma}
    if op == "transducer_lattice":
        scores, _ = reference.transducer_scores(*batch.joint, **options)
        return (scores, batch.frame_lengths, batch.target_lengths), {"durations": list(TDT)}
    return batch.backward_arguments(), options
