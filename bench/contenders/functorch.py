"""torch.func: vmap(grad(loss)) over the batch, the textbook way to per-sample gradients."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bench.cases.models import Batch, Case
from bench.contenders.base import CannotRun, Contender, Settings


class PerSample(Contender):
    """All per-sample gradients at once, clipped, summed and noised by hand."""

    def __init__(self, case: Case, model: nn.Module, batch: Batch, settings: Settings) -> None:
        super().__init__(case, model, batch, settings)
        self.optimizer = self.new_optimizer()
        self._tried = False
        frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
        frozen |= {n: b.detach() for n, b in model.named_buffers()}

        def loss(parameters: dict[str, Tensor], example: Batch) -> Tensor:
            micro_batch = {name: value.unsqueeze(0) for name, value in example.items()}
            inputs = {name: value for name, value in micro_batch.items() if name != "labels"}
            logits = functional_call(model, {**parameters, **frozen}, (), inputs).logits
            return case.losses(logits, micro_batch["labels"]).sum()

        self._gradients = vmap(grad(loss), in_dims=(None, 0), randomness="error")

    def _per_sample(self) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in self.parameters.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return self._gradients(parameters, self.batch)

    def prepare(self) -> None:
        if self._tried:
            return
        try:
            self._per_sample()
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CannotRun(f"vmap cannot run the model: {reason}") from error
        self._tried = True

    @torch.no_grad()
    def step(self) -> None:
        gradients = self._per_sample()
        squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
        factors = (self.settings.clip / squares.sqrt().clamp_min(1e-12)).clamp(max=1.0)
        for name, parameter in self.parameters.items():
            total = torch.tensordot(factors.to(parameter.dtype), gradients[name], dims=1)
            if self.settings.noise > 0:
                total += torch.randn_like(total) * (self.settings.noise * self.settings.clip)
            parameter.grad = total / self.size
        self.optimizer.step()
