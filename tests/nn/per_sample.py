"""What every layer test compares with: the gradient of each sample alone, by plain autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpkernels.nn import Record, RowCheck, add_weighted_sums, attach, detach, swap

LossFn = Callable[..., Tensor]  # loss_fn(model, *batch) -> [B]

# How far the layer's own arithmetic (forward, dx) may be from float64's, relative to the norm. The rounding
# of norms and sums given the recorded tensors is the ops' business and tested there.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass
class Private:
    """What the private path said: norms [B] float64 (sum over the records), and the weighted sums by name."""

    norm_sq: Tensor
    sums: dict[str, Tensor]
    records: list[Record]
    losses: Tensor


def one_by_one(model: nn.Module, loss_fn: LossFn, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """name -> [B, *shape] float64: gradient of each sample alone; zeros where autograd gives none."""
    model = copy.deepcopy(model).double()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in trained}
    size = batch[0].shape[0]
    for i in range(size):
        one = tuple(t[i : i + 1].double() if t.is_floating_point() else t[i : i + 1] for t in batch)
        grads = torch.autograd.grad(loss_fn(model, *one).sum(), list(trained.values()), allow_unused=True)
        for (name, p), grad in zip(trained.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(p) if grad is None else grad)
    return {name: torch.stack(row) for name, row in rows.items()}


def run_private(
    model: nn.Module, loss_fn: LossFn, batch: tuple[Tensor, ...], factors: Tensor | None = None
) -> Private:
    """One private forward and backward of an already swapped model, the row check's before it."""
    tape = attach(model)
    names = {p: n for n, p in model.named_parameters()}
    try:
        losses = loss_fn(model, *batch)
        size = losses.shape[0]
        with RowCheck(tape).checking(losses) if size > 1 else nullcontext():
            tape.open(size)
            losses.sum().backward()
            records = tape.close()
    finally:
        tape.discard()
        detach(model)
    assert all(p.grad is None for p in model.parameters()), "the private path filled a .grad"
    norm_sq = sum((r.norm_sq().double() for r in records), torch.zeros(size, dtype=torch.float64))
    factors = torch.ones(size) if factors is None else factors
    sums = {p: torch.zeros(p.shape, dtype=torch.float64) for p in names if p.requires_grad}
    for record in records:
        record.add_weighted_sum(factors, sums)
    together = {p: torch.zeros_like(total) for p, total in sums.items()}
    add_weighted_sums(records, factors, together)
    for p, total in sums.items():  # two uses of one parameter are added in another order
        torch.testing.assert_close(together[p], total, rtol=1e-12, atol=1e-12 * float(total.abs().max()))
    return Private(norm_sq, {names[p]: s for p, s in sums.items()}, records, losses.detach())


def check_private(
    model: nn.Module, loss_fn: LossFn, batch: tuple[Tensor, ...], *, tolerance: float | None = None
) -> Private:
    """Assert that a swapped copy of `model` gives the right norms and sums, and no .grad."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    expected = {name: g.detach() for name, g in one_by_one(model, loss_fn, batch).items()}
    size = batch[0].shape[0]
    factors = torch.rand(size) + 0.1
    private = run_private(swap(copy.deepcopy(model)), loss_fn, batch, factors)

    exact = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0)
    norm, said = exact.sqrt(), private.norm_sq.sqrt()
    scale = norm.clamp(min=1e-6)
    assert bool((said >= norm - tolerance * scale).all()), f"norm too small: {said} < {norm}"
    assert bool((said <= norm * (1 + 5e-3) + tolerance * scale).all()), f"norm too large: {said} > {norm}"

    assert set(private.sums) == set(expected)
    weights = factors.double().square()
    total = float(torch.sqrt((weights * exact).sum())) + 1e-12
    # In float64 each parameter is held to its own size, so that a fault in a small one shows.
    floor = 1e-11 if dtype is torch.float64 else 4 * tolerance
    for name, sums in private.sums.items():
        want = torch.einsum("b,b...->...", factors.double(), expected[name])
        own = float(torch.sqrt((weights * expected[name].flatten(1).square().sum(1)).sum()))
        error = float((sums - want).norm())
        assert error <= 4 * tolerance * own + floor * total, (
            f"{name}: weighted sum off by {error:.3g}, size {own:.3g}"
        )
    return private


def assert_same_module(torch_module: nn.Module, ghost: nn.Module) -> None:
    """Same state_dict keys, shapes and values, in the same order."""
    ours, theirs = ghost.state_dict(), torch_module.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
