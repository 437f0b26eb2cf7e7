"""Differentially private training at the cost of ordinary training.

The import of this package compiles nothing, probes no GPU and does not even import torch: every public name is
resolved on its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that defines it
_LAYER_NAMES = (
    "swap",
    "GhostLinear",
    "GhostLoRALinear",
    "GhostConv1d",
    "GhostConv2d",
    "GhostEmbedding",
    "GhostLayerNorm",
    "GhostRMSNorm",
    "GhostLSTM",
    "GhostGRU",
    "GhostRNN",
    "FrozenBatchNorm",
)
_HOMES: dict[str, str] = dict.fromkeys(_LAYER_NAMES, "dpkernels.nn") | {
    "PrivacyEngine": "dpkernels.privacy",
    "coverage": "dpkernels.nn.convert.coverage",
    "fix": "dpkernels.nn.convert.fix",
}
_SUBMODULES = (
    *("nn", "ops", "privacy", "auditing", "interop", "backends", "opacus"),
    *("memory", "blocks", "precision", "plain", "errors", "files", "checkpoint", "rounding"),
)

__all__ = [  # noqa: RUF022 - in the order in which a reader meets them
    "swap",
    "GhostLinear",
    "GhostLoRALinear",
    "GhostConv1d",
    "GhostConv2d",
    "GhostEmbedding",
    "GhostLayerNorm",
    "GhostRMSNorm",
    "GhostLSTM",
    "GhostGRU",
    "GhostRNN",
    "FrozenBatchNorm",
    "PrivacyEngine",
    "coverage",
    "fix",
    "ops",
    "nn",
    "privacy",
    "__version__",
]

if TYPE_CHECKING:
    from dpkernels import nn, ops, privacy
    from dpkernels.nn import (
        FrozenBatchNorm,
        GhostConv1d,
        GhostConv2d,
        GhostEmbedding,
        GhostGRU,
        GhostLayerNorm,
        GhostLinear,
        GhostLoRALinear,
        GhostLSTM,
        GhostRMSNorm,
        GhostRNN,
        swap,
    )
    from dpkernels.nn.convert.coverage import coverage
    from dpkernels.nn.convert.fix import fix
    from dpkernels.privacy import PrivacyEngine


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"dpkernels.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dpkernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_SUBMODULES})
