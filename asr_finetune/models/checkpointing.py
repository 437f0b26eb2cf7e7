"""Activation checkpointing: a block's activations are computed anew in the backward, not kept from the forward.

Non-reentrant: torch's reentrant kind gives a block whose input needs no gradient, as the first one above frozen layers,
none at all, and refuses the `torch.autograd.grad` that the self-check uses.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from asr_finetune.config.values import ConfigError
from asr_finetune.models.recognizer import base_model


def has_checkpointing(model: nn.Module) -> bool:
    """Whether the transformers model, under any PEFT wrapper, can recompute its blocks."""
    return bool(getattr(base_model(model), "supports_gradient_checkpointing", False))


def checkpoint_blocks(model: nn.Module, **options: Any) -> None:
    """Have every block of the model recomputed in the backward, in place; in training mode only.

    Dropout masks are those of the forward: torch's `preserve_rng_state` stays True, unless `options` say otherwise.

    Args:
        model: a transformers model, or a PEFT model around one.
        options: further arguments of `torch.utils.checkpoint.checkpoint`.

    Raises:
        ConfigError: a model that has no such blocks.
    """
    base = base_model(model)
    if not has_checkpointing(model):
        raise ConfigError(
            f"train.checkpointing=true: {type(base).__name__} has no activation checkpointing: set it to false, and "
            "lower train.physical_batch_size where memory is short"
        )
    # The second name is of transformers before 5.24, which calls it deprecated.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False, **options})
