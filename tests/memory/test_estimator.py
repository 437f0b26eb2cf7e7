"""What a private step is predicted to take, against what the same step takes with real tensors."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpkernels import PrivacyEngine
from dpkernels.memory import LiveMemory, MemoryEstimator

WIDTH, LENGTH = 32, 20


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, 4)
    )


def losses(model: nn.Module, size: int) -> Tensor:
    return model(torch.empty(size, LENGTH, WIDTH)).square().flatten(1).sum(1)


def measured(size: int, strategy: str) -> int:
    """Live bytes at the peak of the second of two micro-batches: the sums and Adam's state are there."""
    model = network()
    with LiveMemory() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tensor in (*model.parameters(), *model.buffers()):
            memory.count(tensor)
        _, optimizer, _ = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.AdamW(model.parameters()),
            data_loader=DataLoader(range(size), batch_size=size),  # type: ignore[arg-type]
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            strategy=strategy,
        )
        optimizer.backward(losses(model, size))
        optimizer.step()
        memory.restart()
        optimizer.backward(losses(model, size))
        return memory.peak


@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
def test_live_bytes_are_predicted(strategy: str) -> None:
    with MemoryEstimator(network(), strategy=strategy, target="cpu") as estimator:
        predicted = estimator.peak(losses, 16)
    assert predicted.total == pytest.approx(measured(16, strategy), rel=0.1)


def test_the_largest_micro_batch_is_the_largest() -> None:
    with MemoryEstimator(network(), target="cpu") as estimator:
        limit = (
            estimator.peak(losses, 11).total + 1000
        )  # one example alone takes a little less than its share
        found = estimator.largest(losses, limit, 100)
        assert found is not None
        assert (found.size, found.total) == (11, limit - 1000)
        assert estimator.peak(losses, 12).total > limit
        assert estimator.largest(losses, estimator.peak(losses, 1).total - 1, 100) is None
        assert estimator.largest(losses, 10**12, 7).size == 7  # type: ignore[union-attr]


def test_a_model_that_cannot_recompute_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no activation checkpointing"):
        MemoryEstimator(network(), checkpointing=True).__enter__()


def test_auto_is_estimated_for_its_target() -> None:
    """Fake tensors are on the CPU, which has costs; a GPU has none, and "auto" keeps there what book-keeping does."""
    chosen = {}
    for target in ("cpu", "cuda"):
        with MemoryEstimator(network(), strategy="auto", memory_share=9.0, target=target) as estimator:
            chosen[target] = estimator._private.tape.choice
    assert {target: choice.target for target, choice in chosen.items()} == {"cpu": "cpu", "cuda": "cuda"}
    assert {choice.memory_share for choice in chosen.values()} == {9.0}
