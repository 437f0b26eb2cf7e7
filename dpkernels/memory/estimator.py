"""What one private micro-batch takes, found without a GPU and without the weights.

The peak of a run's micro-batches is

    weights and buffers + float64 sums of the trained parameters + the optimizer's state
    + what one micro-batch holds at its highest: activations, gradients, what the strategy keeps for the norms
    + workspace that CUDA's libraries keep

The fourth is found by running a forward and a private backward of the very model on fake tensors (`fake_tensors`),
through `PrivacyEngine` as a run does it, so that a strategy, a dtype or checkpointing needs no rule here. The others
are counted. Not seen: what kernels take and give back within one operation, and what the allocator loses to
fragmentation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
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
        micro_batch: what else is alive at the highest point of forward and private backward, the batch included.
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
        """All of it."""
        return self.weights + self.sums + self.optimizer + self.micro_batch + self.workspace


class MemoryEstimator:
    """What private micro-batches of a model take, found on a fake-tensor copy of it.

    Within the `with`, every tensor of the thread is fake.

    Args:
        model: any that `PrivacyEngine` takes; it stays as it is, and may be on the meta device.
        strategy: of `PrivacyEngine.make_private`.
        optimizer: whose state is counted.
        target: where the run will be: decides how attention holds memory, how sizes are rounded, and the workspace.
        checkpointing: recompute each block's activations in the backward (transformers' models; non-reentrant).

    Raises:
        ValueError: on entering: an unknown strategy, or a model that cannot be made private or checkpointed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strategy: str = "bookkeeping",
        optimizer: Literal["adam", "adamw", "sgd"] = "adamw",
        target: Target = "cuda",
        checkpointing: bool = False,
    ) -> None:
        self._model, self._strategy, self._optimizer = model, strategy, optimizer
        self._target, self._checkpointing = target, checkpointing
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
            self._private = _private(engine, self._copy, self._trained, self._strategy)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

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
        """The largest micro-batch of at most `most` examples whose peak is within `limit` bytes; None: not even one.

        A peak is a maximum of sums of tensors that grow in proportion to B, so it is convex in B but for the
        allocator's rounding: what the next utterance costs is at least what the last ones cost.
        """
        good, bad = self.peak(losses, 1), most + 1
        if good.total > limit:
            return None
        cost, guess = 0.0, min(_FIRST_GUESS, most)
        while good.size < guess < bad:
            found = self.peak(losses, guess)
            cost = max(cost, (found.total - good.total) / (guess - good.size), 1.0)
            if found.total <= limit:
                good = found
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


def _private(engine: PrivacyEngine, model: nn.Module, trained: list[nn.Parameter], strategy: str) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_multiplier=0")
        return engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(trained, lr=0.0),
            data_loader=DataLoader(range(1), batch_size=1),  # type: ignore[arg-type]
            noise_multiplier=0.0,  # without noise nothing is claimed, so any batch may follow any other
            max_grad_norm=1.0,
            strategy=strategy,
        )[1]
