"""The memory of one private micro-batch, estimated without a GPU and without the weights.

The peak of a run's micro-batches is

    weights and buffers + float64 sums of the trained parameters + the optimizer's state
    + the peak of one micro-batch: activations, gradients, tensors that the strategy keeps until the norms are known
    + workspace that CUDA's libraries keep

The fourth term comes from a forward and a private backward of the model on fake tensors (`fake_tensors`), through
`PrivacyEngine` as in a run, so that this module needs no rule for a strategy, a dtype or checkpointing. The others are
counted. The estimate does not include temporary memory within one operation, or the allocator's fragmentation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpkernels.blocks import checkpoint_blocks
from dpkernels.memory.fake_tensors import FakeOps, Target, fake_model, fake_tensors
from dpkernels.memory.live_bytes import LiveMemory, cuda_size
from dpkernels.privacy import PrivacyEngine

# cuBLAS takes 32 MiB on Hopper from torch's allocator and keeps it, once for the forward's thread, once for autograd's.
CUDA_WORKSPACE = 64 * 2**20
# Adam's two moments, float32 whatever the weights are (`DPOptimizer`); plain SGD has no state.
_STATE_BYTES = {"adam": 8, "adamw": 8, "sgd": 0}
_SUM_BYTES = 8
_FIRST_GUESS = 8

Losses = Callable[[nn.Module, int], Tensor]
"""(model, B) -> losses [B] of a batch that it makes itself."""


@dataclass(frozen=True)
class Peak:
    """The highest memory of a run's micro-batches, in bytes.

    Attributes:
        size: examples in the micro-batch.
        weights: parameters and buffers.
        sums: float64 sums of clipped gradients.
        optimizer: the optimizer's state.
        micro_batch: all other tensors alive at the peak of forward and private backward, the batch included.
        workspace: kept by CUDA's libraries; 0 on a CPU.
    """

    size: int
    weights: int
    sums: int
    optimizer: int
    micro_batch: int
    workspace: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.sums + self.optimizer + self.micro_batch + self.workspace


class MemoryEstimator:
    """Estimates the memory of private micro-batches on a fake-tensor copy of a model.

    Within the `with` statement, every tensor of the thread is fake.

    Args:
        model: any model that `PrivacyEngine` accepts; it is not changed, and may be on the meta device.
        strategy, memory_share: as in `PrivacyEngine.make_private`. Under "auto" every example is taken to be as long as
            its batch, so that all or none of a layer's gradients are materialised.
        optimizer: the optimizer whose state is counted.
        target: the run's device type, which decides attention's memory, the rounding of sizes, and the workspace.
        checkpointing: recompute each block's activations in the backward (transformers' models; non-reentrant).

    Raises:
        ValueError: on entering: an unknown strategy, or a model that cannot be made private or checkpointed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strategy: str = "bookkeeping",
        memory_share: float | None = None,
        optimizer: Literal["adam", "adamw", "sgd"] = "adamw",
        target: Target = "cuda",
        checkpointing: bool = False,
    ) -> None:
        self._model, self._strategy, self._optimizer = model, strategy, optimizer
        self._target, self._checkpointing = target, checkpointing
        self._memory_share = memory_share
        self._size_of = cuda_size if target == "cuda" else int
        self._stack = ExitStack()
        self._warm = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(fake_tensors(self._target))
            self._copy = fake_model(self._model).train()
            if self._checkpointing:
                checkpoint_blocks(
                    self._copy,
                    preserve_rng_state=False,  # it would be read from real tensors, and matters to no shape
                    context_fn=lambda: (nullcontext(), FakeOps(self._target)),
                )
            self._trained = [parameter for parameter in self._copy.parameters() if parameter.requires_grad]
            self._memory = stack.enter_context(LiveMemory(self._size_of))
            for tensor in (*self._copy.parameters(), *self._copy.buffers()):
                self._memory.count(tensor)
            self._weights = self._memory.live
            engine = stack.enter_context(closing(_engine()))
            self._private = self._make_private(engine)
            # fake tensors are on the CPU, whatever the target
            self._private.tape.choice = replace(self._private.tape.choice, target=self._target)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _make_private(self, engine: PrivacyEngine) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="noise_multiplier=0")
            return engine.make_private(
                module=self._copy,
                optimizer=torch.optim.SGD(self._trained, lr=0.0),
                data_loader=DataLoader(range(1), batch_size=1),  # type: ignore[arg-type]
                noise_multiplier=0.0,  # without noise nothing is claimed, so any batch may follow any other
                max_grad_norm=1.0,
                strategy=self._strategy,
                memory_share=self._memory_share,
            )[1]

    def peak(self, losses: Losses, size: int) -> Peak:
        """The peak of a micro-batch; seconds for a model of 24 blocks.

        Args:
            losses: (model, B) -> losses [B]. It makes its batch of B examples itself, of `torch.empty`.
            size: B >= 1.
        """
        if not self._warm:  # makes the sums, and whatever a model keeps after its first forward
            self._private.backward(losses(self._copy, 1))
            self._warm = True
        self._private.zero_grad()  # norms of the micro-batch before
        self._memory.restart()
        self._private.backward(losses(self._copy, size))
        sums = sum(self._size_of(_SUM_BYTES * parameter.numel()) for parameter in self._trained)
        return Peak(
            size=size,
            weights=self._weights,
            sums=sums,
            optimizer=_STATE_BYTES[self._optimizer] * sum(parameter.numel() for parameter in self._trained),
            micro_batch=self._memory.peak - self._weights - sums,
            workspace=CUDA_WORKSPACE if self._target == "cuda" else 0,
        )

    def largest(self, losses: Losses, limit: float, most: int) -> Peak | None:
        """The largest micro-batch of at most `most` examples with a peak within `limit` bytes; None if none fits.

        A peak is a maximum of sums of tensors that grow in proportion to B. It is therefore convex in B, except for the
        allocator's rounding: the next example costs at least as much as the previous ones.
        """
        good, bad = self.peak(losses, 1), most + 1
        if good.total > limit:
            return None
        cost, guess = 0.0, min(_FIRST_GUESS, most)
        while good.size < guess < bad:
            peak = self.peak(losses, guess)
            cost = max(cost, (peak.total - good.total) / (guess - good.size), 1.0)
            if peak.total <= limit:
                good = peak
            else:
                bad = guess
            guess = min(good.size + int((limit - good.total) / cost), bad - 1)
        return good


def _engine() -> PrivacyEngine:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a fixed key: nothing is trained, and torch's generators stay as they are
        return PrivacyEngine(noise_key=bytes(32))
