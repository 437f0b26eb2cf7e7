"""A small private run, and the independent arithmetic that its results are compared with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels.privacy import DPDataLoader, DPOptimizer, PrivacyEngine

KEY = bytes(range(32))


class Unfused(torch.optim.SGD):
    """SGD that the fused step does not cover, being a class of its own: noise first, then its step."""


class Net(nn.Module):
    """Two trained layers, a norm, and a parameter that no gradient reaches."""

    def __init__(self, features: int = 6, hidden: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(features, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.unused = nn.Linear(30, 40)
        self.last = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(x)))).mean(1)


def losses_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")


@dataclass
class Run:
    model: nn.Module
    optimizer: DPOptimizer
    loader: DPDataLoader
    engine: PrivacyEngine
    data: TensorDataset
    loss_fn: Callable[..., Tensor]
    stability: float | None = None

    def begin(self, examples: int) -> None:
        """A logical batch of so many examples, in place of one that is open still: what no loader does."""
        self.optimizer._batch.close()
        self.optimizer.begin_logical_batch(examples)

    def release(self, *parts: Sequence[int]) -> dict[str, Tensor]:
        """One step over micro-batches of the given examples: the gradient that was released, by name, in
        float64."""
        self.begin(sum(len(part) for part in parts))
        for part in parts:
            self.optimizer.backward(self.loss_fn(self.model, self.data[list(part)]))
        self.optimizer.step()
        released = {name: p.grad.double() for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer.zero_grad()
        return released

    def gradients(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Each example's gradient alone, through torch's own layers, in float64."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        rows = []
        with self.optimizer.tape.paused():
            for index in indices:
                loss = self.loss_fn(self.model, self.data[[index]]).sum()
                found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
                rows.append(
                    {
                        name: (torch.zeros_like(p) if g is None else g).double()
                        for (name, p), g in zip(trained.items(), found, strict=True)
                    }
                )
        return rows

    def clipped_sum(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Σ_i min(1, C/‖g_i‖) g_i, done the slow way, C of this step; in automatic clipping Σ_i C/(‖g_i‖ + γ) g_i."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in trained.items()}
        for gradient in self.gradients(indices):
            norm = norm_of(gradient)
            limit = self.optimizer.clip_norm
            if self.stability is None:
                factor = min(1.0, limit / norm) if norm else 1.0
            else:
                factor = limit / (norm + self.stability)
            for name in total:
                total[name] += factor * gradient[name]
        return total


def norm_of(gradient: dict[str, Tensor]) -> float:
    return float(torch.cat([part.flatten() for part in gradient.values()]).norm())


def private_run(
    *,
    sigma: float = 1.0,
    clip: float = 1.0,
    examples: int = 40,
    batch_size: int = 8,
    model: nn.Module | None = None,
    loss_fn: Callable[..., Tensor] = losses_of,
    key: bytes | None = None,
    ledger: Any = None,
    accountant: str = "pld",
    lr: float = 0.0,
    dtype: torch.dtype = torch.float32,
    unfused: bool = False,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    **arguments: Any,
) -> Run:
    """`unfused`: noise and the optimizer's step as two passes, where the default is the fused step."""
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(examples, 4, 6, generator=generator).to(dtype)
    data = TensorDataset(features, torch.randint(0, 3, (examples,), generator=generator))
    if model is None:
        torch.manual_seed(1)
        model = Net()
    model = model.to(dtype)
    make = optimizer or (Unfused if unfused else torch.optim.SGD)
    wrapped = make([p for p in model.parameters() if p.requires_grad], lr=lr)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_key|noise_multiplier=0")
        engine = PrivacyEngine(noise_key=key, ledger=ledger, accountant=accountant)
        made = engine.make_private(
            module=model,
            optimizer=wrapped,
            data_loader=DataLoader(data, batch_size=batch_size),
            noise_multiplier=sigma,
            max_grad_norm=clip,
            **arguments,
        )
    made[1].keep_gradients = True  # what `release` reads
    stability = 0.01 if arguments.get("clipping") == "automatic" else None
    return Run(*made, engine, data, loss_fn, stability)


def train(run: Run, steps: int | None = None) -> int:
    """The loop of the README; the number of steps taken."""
    taken = 0
    for logical in run.loader:
        for batch in logical:
            run.optimizer.backward(run.loss_fn(run.model, batch))
        run.optimizer.step()
        run.optimizer.zero_grad()
        taken += 1
        if taken == steps:
            break
    return taken
