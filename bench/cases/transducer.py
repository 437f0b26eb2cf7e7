"""The transducer loss, forward and backward by the encoder's and the predictor's states, the output layer frozen.

The contenders that take logits compute them as a joint network does, so their memory is that of [B, T, U+1, V].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpkernels import ops
from dpkernels.backends import torch_ops
from dpkernels.reference import transducer as definition

OURS, COMPOSED = "dpkernels", "dpkernels, composed from PyTorch"
TORCHAUDIO, TRANSFORMERS = "torchaudio rnnt_loss", "transformers tdt_loss"
FLOOR = "the three products, torch.mm"
DURATIONS = {"rnnt": (), "tdt": (0, 1, 2, 3, 4)}
CONTENDERS = {"rnnt": (OURS, COMPOSED, TORCHAUDIO, FLOOR), "tdt": (OURS, COMPOSED, TRANSFORMERS, FLOOR)}
TITLES = {"rnnt": "RNN-T loss and gradient", "tdt": "TDT loss and gradient"}
BLOCK = 511
"""Cells of a block of the products: those of the composition."""


class CannotLoad(Exception):
    """A contender's package is missing or does not load here; the message is the reason."""


Step = Callable[[], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """`kind` of loss ("rnnt", "tdt") on B utterances of T frames and U labels each; V tokens, joint width H."""

    kind: str
    B: int
    T: int
    U: int
    V: int
    H: int = 640
    device: str = "cpu"

    @property
    def shape(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("B", "T", "U", "H", "V")}

    @property
    def durations(self) -> tuple[int, ...]:
        return DURATIONS[self.kind]


class Inputs:
    """States of a network at its start: logits of a deviation below 1."""

    def __init__(self, problem: Problem, dtype: torch.dtype = torch.float32) -> None:
        p, outputs = problem, problem.V + len(problem.durations)
        generator = torch.Generator().manual_seed(7)

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.randn(*shape, generator=generator).mul_(scale).to(p.device, dtype)

        self.encoder, self.predictor = normal(p.B, p.T, p.H, scale=0.5), normal(p.B, p.U + 1, p.H, scale=0.5)
        self.weight, self.bias = normal(outputs, p.H, scale=p.H**-0.5), normal(outputs, scale=0.1)
        self.targets = torch.randint(1, p.V, (p.B, p.U), generator=generator).to(p.device)
        self.frame_lengths = torch.full((p.B,), p.T, device=p.device)
        self.target_lengths = torch.full((p.B,), p.U, device=p.device)

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        return self.frame_lengths, self.target_lengths

    @property
    def joint(self) -> tuple[Tensor, ...]:
        return (self.encoder, self.predictor, self.weight, self.bias, self.targets, *self.lengths)


def step_of(name: str, problem: Problem, inputs: Inputs | None = None) -> Step:
    """The function that returns losses and gradients by encoder and predictor; of FLOOR it returns products.

    Raises:
        CannotLoad: the contender's package is missing or does not load here.
    """
    inputs = inputs or Inputs(problem)
    if name in (OURS, COMPOSED):
        return _from_states(ops if name == OURS else torch_ops, problem, inputs)
    if name == FLOOR:
        return _products(problem, inputs)
    losses = _torchaudio_losses if name == TORCHAUDIO else _transformers_losses
    return _from_logits(losses(problem, inputs), inputs)


def _from_states(module: Any, problem: Problem, inputs: Inputs) -> Step:
    options: dict[str, Any] = {"blank": 0, "durations": problem.durations, "activation": "relu"}

    def step() -> tuple[Tensor, Tensor, Tensor]:
        scores, normalizers = module.transducer_scores(*inputs.joint, **options)
        losses, flows = module.transducer_lattice(scores, *inputs.lengths, durations=problem.durations)
        ones = torch.ones_like(losses)
        return losses, *module.transducer_gradients(*inputs.joint, normalizers, flows, ones, **options)

    return step


def _from_logits(losses_of: Callable[[Tensor], Tensor], inputs: Inputs) -> Step:
    def step() -> tuple[Tensor, Tensor, Tensor]:
        states = inputs.encoder.detach().requires_grad_(), inputs.predictor.detach().requires_grad_()
        z = (states[0][:, :, None] + states[1][:, None]).relu()
        losses = losses_of(torch.nn.functional.linear(z, inputs.weight, inputs.bias))
        return losses.detach(), *torch.autograd.grad(losses.sum(), states)

    return step


def _torchaudio_losses(problem: Problem, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    try:
        from torchaudio.functional import rnnt_loss
    except (ImportError, OSError) as error:
        raise CannotLoad(f"torchaudio: {str(error).splitlines()[0]}") from error
    targets, *lengths = (t.int() for t in (inputs.targets, *inputs.lengths))
    return lambda logits: rnnt_loss(logits, targets, *lengths, blank=0, reduction="none")


def _transformers_losses(problem: Problem, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    try:
        from transformers.loss.loss_tdt import tdt_loss
    except ImportError as error:
        raise CannotLoad(f"transformers: {error}") from error

    def losses(logits: Tensor) -> Tensor:
        tokens, steps = logits[..., : problem.V], logits[..., problem.V :]
        durations = list(problem.durations)
        loss: Tensor = tdt_loss(
            tokens, steps, inputs.targets, *inputs.lengths, 0, durations, sigma=0.0, reduction="none"
        )
        return loss

    return losses


def _products(problem: Problem, inputs: Inputs) -> Step:
    """Logits, logits again, and the derivative by z, of as many rows as there are cells."""
    cells = problem.B * problem.T * (problem.U + 1)
    z = torch.randn(min(BLOCK, cells), problem.H, device=problem.device)
    g = torch.randn(len(z), len(inputs.weight), device=problem.device)
    logits, of_z = torch.empty_like(g), torch.empty_like(z)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        for first in range(0, cells, len(z)):
            rows = min(len(z), cells - first)
            torch.mm(z[:rows], inputs.weight.T, out=logits[:rows])
            torch.mm(z[:rows], inputs.weight.T, out=logits[:rows])
            # not the logits themselves: their sizes would be those of no gradient
            torch.mm(g[:rows], inputs.weight, out=of_z[:rows])
        return logits, of_z, of_z

    return step


def error(name: str, problem: Problem) -> float:
    """The largest error of losses and gradients on a small problem of the kind, relative to float64's largest.

    Raises:
        CannotLoad: see `step_of`.
    """
    small = replace(problem, B=2, T=9, U=3, V=37, H=24)
    exact = Inputs(small, torch.float64)
    states = exact.encoder.requires_grad_(), exact.predictor.requires_grad_()
    options: dict[str, Any] = {"blank": 0, "durations": small.durations, "activation": "relu"}
    losses = definition.transducer_loss(*exact.joint, **options)
    truth = [losses.detach(), *torch.autograd.grad(losses.sum(), states)]
    given = step_of(name, small)()
    pairs = zip(given, truth, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)
