"""Definition of the ops on many layers: the sum of their norms, and their weighted sums."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpkernels.reference._definitions import DEFINITIONS, definition
from dpkernels.reference._samples import round_up

Layer = tuple[str, tuple[Tensor, ...], Mapping[str, Any], tuple[Tensor, ...]]
"""(kind, tensors, options, outs): the arguments of the kind's own ops."""


@definition
def total_norm_sq(layers: Sequence[Layer]) -> Tensor:
    """Σ over layers of their squared norms, in float64, rounded up to float32."""
    first = layers[0][1][0]
    total = torch.zeros(len(first), dtype=torch.float64, device=first.device)
    for kind, tensors, options, _ in layers:
        norms = DEFINITIONS[f"{kind}_norm_sq"](*tensors, **options)
        for norm in norms if isinstance(norms, tuple) else (norms,):
            total += norm
    return round_up(list(total), first)


@definition
def weighted_sums(layers: Sequence[Layer], factors: Tensor) -> None:
    """Add Σ_i c_i G_i to every layer's outs, with the gradient G_i of sample i, such as g_iᵀx_i."""
    for kind, tensors, options, outs in layers:
        DEFINITIONS[f"{kind}_weighted_sum"](*tensors, factors, *outs, **options)
