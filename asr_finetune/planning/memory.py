"""How much memory a private step takes, and which strategy and micro-batch a given amount allows.

A private step of the very model is estimated with fake tensors (`dpkernels.memory`); nothing needs a GPU, or the
weights.

Left to the margin (`MARGIN`): what kernels take and give back within one operation, and what the allocator loses to
fragmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args, get_type_hints

import torch
from torch import Tensor, nn

from asr_finetune.config.schema import Config, PrivacyConfig
from asr_finetune.config.values import as_config_error
from asr_finetune.data.corpus import Corpus
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.planning.workload import typical_speech
from dpkernels.memory import Losses, MemoryEstimator, Peak, Target

MARGIN = 0.9
"""Share of a GPU's memory that a predicted peak may take."""

ENOUGH = 8
"""Utterances of 15 s that keep a GPU busy: our choice; larger micro-batches gain little."""
SHORTER = (0.75, 0.5, 0.25)
"""Shares of the longest utterance that a plan also looks at."""

# Fastest first: what keeps less does more work. per_layer is no choice of speed: it trains on other gradients.
_BY_SPEED = ("bookkeeping", "mixed", "two_pass")


def strategies() -> list[str]:
    """The strategies that a run may have and that train on the same gradients, the fastest first."""
    known = get_args(get_type_hints(PrivacyConfig)["strategy"])
    return [strategy for strategy in _BY_SPEED if strategy in known]


def losses_of(recognizer: Recognizer, item: dict[str, Tensor]) -> Losses:
    """The losses of B utterances shaped like `item`, an item for `Recognizer.collate`, for `MemoryEstimator.peak`."""
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


@as_config_error()
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
        target: as in `MemoryEstimator`.
        checkpointing: without, with, or both, in the order in which they are tried.

    Raises:
        ConfigError: `seconds` above the model's window.
        ValueError: a model that cannot be made private or checkpointed.
    """
    speech = typical_speech(recognizer, corpus, seconds)
    lengths = [speech.longest * share for share in SHORTER]

    def find(strategy: str, recompute: bool, lengths: Sequence[float]) -> list[Fit]:
        losses = [losses_of(recognizer, speech.item(recognizer, length)) for length in lengths]
        with MemoryEstimator(
            recognizer.model,
            strategy=strategy,
            optimizer=config.train.optimizer,
            target=target,
            checkpointing=recompute,
        ) as stage:
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
