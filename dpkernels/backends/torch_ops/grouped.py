"""Norms and weighted sums of many layers, computed one layer after another by its family's backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpkernels.backends import registry
from dpkernels.backends.bounds import round_up
from dpkernels.backends.layer import GroupedLayer


def norms_of(layer: GroupedLayer) -> tuple[Tensor, ...]:
    """Return a layer's squared norms [B], one a parameter, from the backend of its family."""
    norms = registry.implementation(layer.norm_op, layer.device_type)(*layer.tensors, **layer.options)
    return norms if isinstance(norms, tuple) else (norms,)


@registry.composition
def total_norm_sq(layers: Sequence[GroupedLayer]) -> Tensor:
    """Σ over layers of ‖g_iᵀx_i‖² and its like, rounded up; see `dpkernels.ops.total_norm_sq`."""
    first = layers[0].tensors[0]
    total = torch.zeros(len(first), dtype=torch.float64, device=first.device)
    parts = 0
    for layer in layers:
        for part in norms_of(layer):
            total += part.double()
            parts += 1
    # the error of each addition is at most 2⁻⁵³ of the sum
    return round_up(total * (1 + (parts + 1) * 2.0**-52))


def add_layer(layer: GroupedLayer, factors: Tensor) -> None:
    """Add a layer's weighted sum by the backend of its family, because a norm bounds the sum of its own backend."""
    function = registry.implementation(layer.sum_op, factors.device.type)
    function(*layer.tensors, factors, *layer.outs, **layer.options)


@registry.composition
def weighted_sums(layers: Sequence[GroupedLayer], factors: Tensor) -> None:
    """out += Σ_i c_i g_iᵀx_i for every layer; see `dpkernels.ops.weighted_sums`."""
    for layer in layers:
        add_layer(layer, factors)
