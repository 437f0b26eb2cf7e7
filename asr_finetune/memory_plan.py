"""How much memory a private step takes, found by rehearsing one: no GPU, no weights, no formulas for activations.

The peak of a run's micro-batches is

    weights and buffers + float64 sums of the trained parameters + the optimizer's state
    + what one micro-batch holds at its highest: activations, gradients, what the strategy keeps for the norms
    + workspace that CUDA's libraries keep

The fourth is measured on a forward and a private backward of the very model with fake tensors (`live_memory`),
through `PrivacyEngine` as a run does it, so that a strategy, a dtype or checkpointing needs no rule here. The others
are counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from asr_finetune.live_memory import LiveMemory, Target, cuda_size, hollow, rehearsal
from dpkernels import PrivacyEngine

# cuBLAS takes 32 MiB on Hopper from torch's allocator and keeps it, once for the forward's thread, once for autograd's.
CUDA_WORKSPACE = 64 * 2**20
# Adam's two moments, float32 whatever the weights are (`DPOptimizer`); plain SGD has no state.
_STATE_BYTES = {"adam": 8, "adamw": 8, "sgd": 0}
_SUM_BYTES = 8

Losses = Callable[[nn.Module, int], Tensor]


@dataclass(frozen=True)
class Peak:
    """The highest memory of a run's micro-batches, in bytes.

    Attributes:
        size: utterances in the micro-batch.
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


def rehearse(
    model: nn.Module,
    losses: Losses,
    sizes: Sequence[int],
    *,
    strategy: str = "bookkeeping",
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw",
    target: Target = "cuda",
) -> list[Peak]:
    """The peak of a micro-batch of each size; each takes seconds for a model of 24 blocks.

    Args:
        model: any that `PrivacyEngine` takes; it stays as it is, and may be on the meta device.
        losses: (model, B) -> losses [B]; makes its batch of B utterances itself, of `torch.empty`. It is called with a
            hollow copy of the model, and never sees a value.
        sizes: micro-batches, B >= 1.
        strategy: of `PrivacyEngine.make_private`.
        optimizer: whose state is counted.
        target: where the run will be: decides how attention holds memory, how sizes are rounded, and the workspace.

    Raises:
        ValueError: an unknown strategy, or a model that cannot be made private.
    """
    size_of = cuda_size if target == "cuda" else int
    with rehearsal(target):
        copy = hollow(model)
        trained = [parameter for parameter in copy.parameters() if parameter.requires_grad]
        with LiveMemory(size_of) as memory, closing(_engine()) as engine:
            for tensor in (*copy.parameters(), *copy.buffers()):
                memory.count(tensor)
            weights = memory.live
            private = _private(engine, copy, trained, strategy, max(sizes))
            private.backward(
                losses(copy, 1)
            )  # makes the sums, and whatever a model keeps after its first forward
            sums = sum(size_of(_SUM_BYTES * parameter.numel()) for parameter in trained)
            found = []
            for size in sizes:
                memory.restart()
                private.backward(losses(copy, size))
                found.append(
                    Peak(
                        size=size,
                        weights=weights,
                        sums=sums,
                        optimizer=_STATE_BYTES[optimizer] * sum(parameter.numel() for parameter in trained),
                        micro_batch=memory.peak - weights - sums,
                        workspace=CUDA_WORKSPACE if target == "cuda" else 0,
                    )
                )
            return found


def held_bytes(tensors: Iterable[Tensor], size_of: Callable[[int], int] = int) -> int:
    """Bytes of the tensors' storages, each counted once, by `size_of` as in `LiveMemory`."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(size_of(storage.nbytes()) for storage in storages.values())


def _engine() -> PrivacyEngine:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a fixed key: nothing is trained, and the global generators stay as they are
        return PrivacyEngine(noise_key=bytes(32))


def _private(
    engine: PrivacyEngine, model: nn.Module, trained: list[nn.Parameter], strategy: str, most: int
) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_multiplier=0")
        return engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(trained, lr=0.0),
            data_loader=DataLoader(range(most), batch_size=most),  # type: ignore[arg-type]
            noise_multiplier=0.0,  # no noise, and so no sampling either: any micro-batch may follow any other
            max_grad_norm=1.0,
            strategy=strategy,
        )[1]
