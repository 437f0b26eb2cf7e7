"""An entry of the zoo: how a small random model of one family is built, fed and given a loss per example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """What the models of one kind are given, and the loss [B] that is taken of what they say.

    Attributes:
        name: "text encoder", "image classifier", ….
        batch: B -> the keyword inputs of B examples, of different lengths where the kind has masks.
        loss: (model, batch) -> [B].
        size: a batch size that is another dimension of that batch too: its length, or its patches.
    """

    name: str
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    size: int


@dataclass(frozen=True)
class Entry:
    """One model of the table.

    Attributes:
        name: as people know the family.
        library: "transformers", "torchvision" or "timm".
        kind: its inputs and its loss.
        build: a new model, small; its weights are drawn anew by `made`.
        targets: PEFT's target_modules; names where "all-linear" would leave out what the model is made of.
    """

    name: str
    library: str
    kind: Kind
    build: Callable[[], nn.Module]
    targets: str | tuple[str, ...] = "all-linear"


CONVOLUTIONS = "convolutions"
"""As targets: every linear layer, and every convolution that is not grouped, in which PEFT's adapters differ."""


def targets_of(entry: Entry, model: nn.Module) -> str | list[str]:
    """PEFT's target_modules."""
    if entry.targets != CONVOLUTIONS:
        return entry.targets if isinstance(entry.targets, str) else list(entry.targets)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1)
    ]


def of_transformers(
    tiny: dict[str, Any],
    kind: Kind,
    name: str,
    class_name: str,
    targets: str | tuple[str, ...] = "all-linear",
    **overrides: Any,
) -> Entry:
    """The entry of one of transformers' classes, its configuration by `tiny_config`."""

    def build() -> nn.Module:
        model_class = getattr(transformers, class_name)
        return model_class(tiny_config(model_class.config_class, tiny, overrides))

    return Entry(name, "transformers", kind, build, targets)


def randomise(model: nn.Module) -> None:
    """Add noise to every weight and statistic, in place, so that every part of the model matters.

    A new model has weights near zero or at one, zero biases and zero gates; a gradient that is zero shows nothing.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 and len(parameter) > 0 else 100
            parameter.add_(torch.randn_like(parameter), alpha=max(fan_in, 1) ** -0.5)
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.normal_(std=0.3)
            if "running_var" in name:
                buffer.uniform_(0.5, 2)


def without_dropout(model: nn.Module) -> None:
    """Set every dropout of `model` to 0, in place: layers, and the numbers that modules keep for functions."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            # nn.Dropout's own p, `self.dropout`, `self.attn_drop`, `self.layerdrop`, timm's `drop_prob`
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)


def tiny_config(config_class: Any, tiny: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """A configuration of transformers with the sizes of `tiny`, where it has that name, and `overrides`.

    Configurations within it are made by the same rule; an override of one is a dict of overrides. Dropout,
    caches and augmentation are off.
    """
    default = config_class()
    values = {
        name: value
        for name, value in tiny.items()
        if not _is_derived(config_class, name)
        and isinstance(getattr(default, name, ""), int | float | None)
        and config_class.attribute_map.get(name) not in overrides
    }
    rest = dict(overrides)
    for name in config_class.sub_configs:
        if (inner := getattr(default, name, None)) is not None:
            values[name] = tiny_config(type(inner), tiny, rest.pop(name, {}))
    config = config_class(**{**values, **rest})
    return _quiet(config)


def _is_derived(config_class: Any, name: str) -> bool:
    return isinstance(getattr(config_class, name, None), property)


def _quiet(config: Any) -> Any:
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and ("drop" in name or name in ("mask_time_prob", "mask_feature_prob")):
            setattr(config, name, 0.0)
    for name in ("use_cache", "apply_spec_augment"):
        if getattr(config, name, False):
            setattr(config, name, False)
    config._experts_implementation = "eager"  # grouped matrix products have no float64
    return config
