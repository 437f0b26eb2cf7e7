"""The memory of a private step, and the strategies and micro-batches that fit into a given amount.

The memory of a private step of the model is estimated with fake tensors (`dpkernels.memory`), without a GPU or the
weights.

The margin (`MARGIN`) covers temporary memory within one operation, and the allocator's fragmentation.
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

# Fastest first: a strategy that keeps less computes more. per_layer is left out, since its gradients differ.
_BY_SPEED = ("bookkeeping", "auto", "mixed", "two_pass")


def strategies() -> list[str]:
    """The strategies of a run that use the same gradients, the fastest first."""
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
        peak: None if not even one utterance fits.
    """

    strategy: str
    checkpointing: bool
    seconds: float
    peak: Peak | None

    @property
    def size(self) -> int:
        """Number of utterances; 0 if not even one fits."""
        return 0 if self.peak is None else self.peak.size


@dataclass(frozen=True)
class MemoryPlan:
    """The largest micro-batches for a GPU.

    Attributes:
        memory: the GPU's memory, in bytes.
        margin: share of it that a predicted peak may take.
        fits: the fit of every strategy with the longest utterance, the fastest first.
        chosen: the one to use; None if nothing fits.
        shorter: fits of the chosen strategy with shorter utterances, longest first; empty if nothing fits.
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
    """The largest micro-batch of each strategy for a GPU, and the one to use, estimated without the GPU.

    The fastest strategy whose micro-batch holds `ENOUGH` of the longest utterances (or the logical batch) is chosen; if
    there is none, the one with the largest micro-batch.

    Args:
        config: batch size and optimizer.
        recognizer: with the method applied (`methods.apply_method`); its weights are not read.
        memory: the GPU's memory, in bytes.
        corpus: the source of the lengths; None: `seconds`, as in `timing.probe`.
        seconds: length of an utterance, without a corpus.
        target: as in `MemoryEstimator`.
        checkpointing: without, with, or both, in the order in which they are tried.

    Raises:
        ConfigError: `seconds` is above the model's window.
        ValueError: the model cannot be made private or checkpointed.
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

    fits = [
        find(strategy, recompute, [speech.longest])[0]
        for recompute in checkpointing
        for strategy in strategies()
    ]
    enough = min(ENOUGH, config.train.batch_size)
    chosen = next((fit for fit in fits if fit.size >= enough), max(fits, key=lambda fit: fit.size))
    if not chosen.size:
        return MemoryPlan(memory, MARGIN, fits, None, [])
    return MemoryPlan(memory, MARGIN, fits, chosen, find(chosen.strategy, chosen.checkpointing, lengths))
