"""How much memory a private step takes, and which strategy and micro-batch a given amount allows.

The peak of a run's micro-batches is

    weights and buffers + float64 sums of the trained parameters + the optimizer's state
    + what one micro-batch holds at its highest: activations, gradients, what the strategy keeps for the norms
    + workspace that CUDA's libraries keep

The fourth is found by rehearsing a forward and a private backward of the very model with fake tensors (`live_memory`),
through `PrivacyEngine` as a run does it, so that a strategy, a dtype or checkpointing needs no rule here. The others
are counted. Nothing needs a GPU, or the weights.

Left to the margin (`MARGIN`): what kernels take and give back within one operation, and what the allocator loses to
fragmentation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from asr_finetune.config.schema import Config, PrivacyConfig
from asr_finetune.models.checkpointing import checkpoint_blocks
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.planning.live_memory import LiveMemory, Target, Valueless, cuda_size, hollow, rehearsal
from asr_finetune.planning.workload import typical_speech
from dpkernels import PrivacyEngine

if TYPE_CHECKING:
    from asr_finetune.data.corpus import Corpus

MARGIN = 0.9
"""Share of a GPU's memory that a predicted peak may take."""

ENOUGH = 8
"""Utterances of 15 s that keep a GPU busy: our choice; larger micro-batches gain little."""
SHORTER = (0.75, 0.5, 0.25)
"""Shares of the longest utterance that a plan also looks at."""

# cuBLAS takes 32 MiB on Hopper from torch's allocator and keeps it, once for the forward's thread, once for autograd's.
CUDA_WORKSPACE = 64 * 2**20
# Adam's two moments, float32 whatever the weights are (`DPOptimizer`); plain SGD has no state.
_STATE_BYTES = {"adam": 8, "adamw": 8, "sgd": 0}
_SUM_BYTES = 8
# Fastest first: what keeps less does more work. per_layer is no choice of speed: it trains on other gradients.
_BY_SPEED = ("bookkeeping", "mixed", "two_pass")
_FIRST_GUESS = 8

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


class Rehearsal:
    """Private micro-batches of a hollow copy of a model. Within the `with`, every tensor of the thread is fake.

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
            stack.enter_context(rehearsal(self._target))
            self._copy = hollow(self._model).train()
            if self._checkpointing:
                checkpoint_blocks(
                    self._copy,
                    preserve_rng_state=False,  # it would be read from real tensors, and matters to no shape
                    context_fn=lambda: (nullcontext(), Valueless(self._target)),
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
            losses: (model, B) -> losses [B]. It makes its batch of B utterances itself, of `torch.empty`.
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
        """The largest micro-batch of at most `most` utterances whose peak is within `limit` bytes; None: not even one.

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


def held_bytes(tensors: Iterable[Tensor], size_of: Callable[[int], int] = int) -> int:
    """Bytes of the tensors' storages, each counted once, by `size_of` as in `LiveMemory`."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(size_of(storage.nbytes()) for storage in storages.values())


def strategies() -> list[str]:
    """The strategies that a run may have and that train on the same gradients, the fastest first."""
    known = get_args(get_type_hints(PrivacyConfig)["strategy"])
    return [strategy for strategy in _BY_SPEED if strategy in known]


def losses_of(recognizer: Recognizer, item: dict[str, Tensor]) -> Losses:
    """The losses of B utterances shaped like `item`, an item for `Recognizer.collate`, for `Rehearsal.peak`."""
    batch = recognizer.collate([item])

    def losses(model: nn.Module, size: int) -> Tensor:
        shaped = {name: torch.empty((size, *t.shape[1:]), dtype=t.dtype) for name, t in batch.items()}
        return recognizer.loss_per_example(model, shaped)

    return losses


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch of one strategy.

    Attributes:
        strategy: of `PrivacyEngine.make_private`.
        checkpointing: whether activations are recomputed.
        seconds: length of its utterances.
        peak: None where not even one utterance fits.
    """

    strategy: str
    checkpointing: bool
    seconds: float
    peak: Peak | None

    @property
    def size(self) -> int:
        """Utterances; 0 where not even one fits."""
        return 0 if self.peak is None else self.peak.size


@dataclass(frozen=True)
class MemoryPlan:
    """What a GPU of `memory` bytes allows.

    Attributes:
        memory: of the GPU, in bytes.
        margin: share of it that a predicted peak may take.
        fits: of every strategy with the longest utterance, the fastest first.
        chosen: the one to use; None where nothing fits.
        shorter: what the chosen strategy takes of shorter utterances, longest first; empty where a whole logical
            batch fits.
    """

    memory: int
    margin: float
    fits: list[Fit]
    chosen: Fit | None
    shorter: list[Fit]


def plan_memory(
    config: Config,
    recognizer: Recognizer,
    memory: int,
    *,
    corpus: Corpus | None = None,
    seconds: float | None = None,
    target: Target = "cuda",
    checkpointing: Sequence[bool] = (False,),
) -> MemoryPlan:
    """The largest micro-batch of each strategy for a GPU, and which to use: rehearsed, without the GPU.

    Chosen is the fastest strategy whose micro-batch holds `ENOUGH` of the longest utterances (or the logical batch); if
    none does, the one that holds most.

    Args:
        config: batch size and optimizer.
        recognizer: with the method applied (`methods.apply_method`); its weights are not read.
        memory: of the GPU, in bytes.
        corpus: where lengths are taken from; None: `seconds`, as in `probe.probe`.
        seconds: of an utterance, without a corpus.
        target: as in `Rehearsal`.
        checkpointing: without, with, or both, in the order in which they are tried.

    Raises:
        ConfigError: `seconds` above the model's window.
        ValueError: a model that cannot be made private or checkpointed.
    """
    speech = typical_speech(recognizer, corpus, seconds)
    lengths = [speech.longest * share for share in SHORTER]

    def find(strategy: str, recompute: bool, lengths: Sequence[float]) -> list[Fit]:
        kind = {"strategy": strategy, "checkpointing": recompute}
        losses = [losses_of(recognizer, speech.item(recognizer, length)) for length in lengths]
        with Rehearsal(recognizer.model, optimizer=config.train.optimizer, target=target, **kind) as stage:  # type: ignore[arg-type]
            peaks = [stage.largest(loss, MARGIN * memory, config.train.batch_size) for loss in losses]
        return [Fit(strategy, recompute, length, peak) for length, peak in zip(lengths, peaks, strict=True)]

    found = [
        find(strategy, recompute, [speech.longest])[0]
        for recompute in checkpointing
        for strategy in strategies()
    ]
    enough = min(ENOUGH, config.train.batch_size)
    chosen = next((fit for fit in found if fit.size >= enough), max(found, key=lambda fit: fit.size))
    if not chosen.size:
        return MemoryPlan(memory, MARGIN, found, None, [])
    return MemoryPlan(memory, MARGIN, found, chosen, find(chosen.strategy, chosen.checkpointing, lengths))


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
