"""The fused optimizer step, and the normals alone, beside torch's counterparts.

Each contender owns its parameters, sums and state, starts from the same values, and is checked twice before timing:
without noise, its parameters are those of float64 AdamW; with noise, its first moments have the right deviation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.cases import native as native_bench
from dpkernels import ops, reference
from dpkernels.backends.native_ops import optim as native_optim

FUSED, UNFUSED = "dpkernels", "dpkernels, separate passes"
PHILOX = "dpkernels, Philox in place of ChaCha20 (not private)"
"""The contender compiled in bench/native, on a GPU with nvcc."""

PLAIN = "torch.normal, add, fused AdamW"
NON_PRIVATE = "fused AdamW, not private"
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
DIVISOR, SCALE, GRID = 64.0, 3.0, 2.0**-11
KEY = bytes(range(32))


@dataclass
class Update:
    """One contender on `count` parameters in `tensors` equal tensors.

    Attributes:
        name: of FUSED, PHILOX, UNFUSED, PLAIN and NON_PRIVATE.
        noise: standard deviation of the noise on the sum.
    """

    name: str
    count: int
    tensors: int
    dtype: torch.dtype
    device: str
    noise: float = SCALE
    params: list[torch.nn.Parameter] = field(init=False)
    first: Callable[[], list[Tensor]] = field(init=False)
    run: Callable[[], None] = field(init=False)
    _step: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(11)
        shape = (self.count // self.tensors,)
        draw = [torch.randn(shape, generator=generator, device=self.device) for _ in range(2 * self.tensors)]
        self.params = [torch.nn.Parameter(t.to(self.device, self.dtype)) for t in draw[: self.tensors]]
        self.sums = [t.to(self.device, torch.float64) for t in draw[self.tensors :]]
        if self.name in (FUSED, PHILOX):
            self._exp_avgs = [torch.zeros(shape, device=self.device) for _ in self.params]
            self._exp_avg_sqs = [torch.zeros(shape, device=self.device) for _ in self.params]
            self.first = lambda: self._exp_avgs
            self.run = self._fused if self.name == FUSED else self._philox
            return
        betas = (HYPER["beta1"], HYPER["beta2"])
        others = {name: HYPER[name] for name in ("lr", "eps", "weight_decay")}
        self._optimizer = torch.optim.AdamW(self.params, betas=betas, fused=True, **others)
        self.first = lambda: [self._optimizer.state[p]["exp_avg"] for p in self.params]
        self.run = {UNFUSED: self._unfused, PLAIN: self._plain, NON_PRIVATE: self._optimizer.step}[self.name]
        for parameter, total in zip(self.params, self.sums, strict=True):
            parameter.grad = (total / DIVISOR).to(self.dtype)

    def _nonces(self) -> list[bytes]:
        self._step += 1
        return [self._step.to_bytes(6, "little") + i.to_bytes(6, "little") for i in range(self.tensors)]

    @torch.no_grad()
    def _fused(self) -> None:
        nonces = self._nonces()
        ops.noise_adamw(
            self.params,
            self.sums,
            self._exp_avgs,
            self._exp_avg_sqs,
            [float(self._step)] * self.tensors,
            key=KEY,
            nonces=nonces,
            noise_scale=self.noise,
            grid=GRID if self.noise else 0.0,
            divisor=DIVISOR,
            **HYPER,
        )

    @torch.no_grad()
    def _philox(self) -> None:
        nonces = torch.tensor(list(b"".join(self._nonces())), dtype=torch.uint8)
        steps = [float(self._step)] * self.tensors
        buffers = (self.params, self.sums, self._exp_avgs, self._exp_avg_sqs)
        table = native_optim._table(*buffers, [], steps, nonces, nonces[:0])
        key = torch.tensor(list(KEY), dtype=torch.uint8)
        noise = native_optim._noise(key, self.noise, GRID if self.noise else 0.0, DIVISOR, False, nonces[:0])
        native_bench.load().philox_step(table, noise, native_optim._Adam(*HYPER.values(), 1))

    @torch.no_grad()
    def _unfused(self) -> None:
        """What the engine does for an optimizer that the fused step does not cover."""
        for parameter, total, nonce in zip(self.params, self.sums, self._nonces(), strict=True):
            if self.noise:
                z = ops.chacha20_normal(total.numel(), key=KEY, nonce=nonce, device=self.device)
                total.div_(GRID).add_(z.mul_(self.noise / GRID)).round_().mul_(GRID)
            parameter.grad = total.div_(DIVISOR).to(self.dtype)
            total.zero_()
        self._optimizer.step()

    @torch.no_grad()
    def _plain(self) -> None:
        """Clipped sums in the gradients' own dtype, which are already divided, as most libraries do it."""
        for parameter in self.params:
            if self.noise:
                noise = torch.normal(
                    0.0, self.noise / DIVISOR, parameter.shape, device=self.device, dtype=self.dtype
                )
                parameter.grad.add_(noise)  # type: ignore[union-attr]
        self._optimizer.step()


def wrong(name: str, dtype: torch.dtype, device: str) -> str:
    """Return why a contender's results are wrong; "" if they are right."""
    count, tensors = 40_000, 4
    clean = Update(name, count, tensors, dtype, device, noise=0.0)
    start = [p.detach().double().cpu() for p in clean.params]
    sums = [total.clone().cpu() for total in clean.sums]
    zeros = [[torch.zeros_like(p) for p in start] for _ in range(2)]
    secrets = (
        torch.zeros(32, dtype=torch.uint8),
        torch.zeros(48, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
    )
    hyper = tuple(HYPER.values())
    reference.noise_adamw(
        start, sums, *zeros, [], [1.0] * tensors, *secrets, 0.0, 0.0, DIVISOR, False, *hyper, True
    )
    clean.run()
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, exact in zip(clean.params, start, strict=True):
        error = float((ours.detach().double().cpu() - exact).norm() / exact.norm())
        if not error <= limit:
            return f"its parameters are off by {error:.1e} (limit {limit:.0e})"
    if name == NON_PRIVATE:
        return ""
    noisy = Update(name, count, tensors, dtype, device, noise=1000 * SCALE)
    noisy.run()
    spread = torch.cat([m.double().flatten() for m in noisy.first()]).std().item()
    expected = 1000 * SCALE / DIVISOR * (1 - HYPER["beta1"])
    if abs(spread / expected - 1) > 5 / math.sqrt(2 * count):
        return f"its noise has deviation {spread:.4g} where {expected:.4g} was asked for"
    return ""
