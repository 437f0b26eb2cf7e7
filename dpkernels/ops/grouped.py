"""Many layers in one call: the sum of their squared norms, and their weighted sums."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dpkernels.backends.layer import GroupedLayer
from dpkernels.ops import _check, _library
from dpkernels.ops.layers import (
    KINDS,
    SCHEMA,
    check_norm_values,
    check_norms,
    check_sum_values,
    check_sums,
    from_columns,
    pack,
    unpack,
)

__all__ = ["KINDS", "GroupedLayer", "total_norm_sq", "weighted_sums"]


def _layers_and_factors(
    tensors: list[Tensor],
    kinds: list[str],
    floats: list[float],
    ints: list[int],
    factors: Tensor,
    outs: list[Tensor],
) -> tuple[list[GroupedLayer], Tensor]:
    return unpack(tensors, kinds, floats, ints, outs), factors


_total_norm_sq = _library.define(
    "total_norm_sq",
    f"({SCHEMA}) -> Tensor",
    fake=lambda tensors, *rest: _library.norms(tensors[0]),
    check=check_norm_values,
    arguments=lambda *packed: (unpack(*packed),),
)
_weighted_sums = _library.define(
    "weighted_sums",
    f"({SCHEMA}, Tensor factors, Tensor(a!)[] outs) -> ()",
    fake=lambda *args: None,
    check=check_sum_values,
    arguments=_layers_and_factors,
)


def total_norm_sq(
    xs: Sequence[Tensor] | Sequence[GroupedLayer],
    gs: Sequence[Tensor] | None = None,
    kinds: Sequence[str] | None = None,
    **columns: Sequence[Any],
) -> Tensor:
    """Squared norm of each sample's gradient over many layers, rounded up: Σ_l ‖G_li‖².

    G_li is the gradient of layer l, such as g_liᵀx_li. The op adds `k_norm_sq` of each layer of kind k; for a LoRA
    layer it adds both factors' norms. On a GPU, one launch serves all LoRA layers, linear layers with a narrow side,
    and materialised gradients (biases of one frame).

    Args:
        xs: at least one `GroupedLayer`, all with the same B; or, with gs and kinds, one tensor a layer: the layer's
            input, ids for an embedding, x̂ for a layer_norm; a bias's entry is not read (pass its g).
        gs: the gradients of the layers' outputs, one a layer.
        kinds: keys of `dpkernels.ops.layers.KINDS`, one a layer.
        **columns: with gs and kinds, lists of the arguments of some kinds only, with one entry for each layer of the
            kind: hs, dhs, scalings for LoRA layers, as in `lora_norm_sq`; padding_idxs for embeddings, -1 for none;
            kernel_sizes, strides, paddings, dilations for depthwise_conv1d.

    Returns:
        [B] float32, in squared units of the gradients; not below the exact sum, nor below the square of the
        gradients that `weighted_sums` adds for the sample, divided by its factor.

    Raises:
        TypeError: dtypes do not fit, or no kind takes a list of that name.
        ValueError: there is no layer, a list's length does not fit, or a kind is unknown; also the errors of the
            layers' norms.

    Source: Abadi et al. 2016, arXiv:1607.00133 (flat clipping); Goodfellow 2015, arXiv:1510.01799 (norms by layer).
    """
    if gs is None or kinds is None:
        layers, name = cast("Sequence[GroupedLayer]", xs), "layers"
    else:
        layers, name = from_columns(cast("Sequence[Tensor]", xs), gs, kinds, columns), "gs"
    check_norms(layers, name)
    total: Tensor = _total_norm_sq(*pack(layers, norms=True))
    return total


def weighted_sums(layers: Sequence[GroupedLayer], factors: Tensor) -> None:
    """Add every layer's clipped gradients to its sums, in place: out_l += Σ_i c_i G_li.

    G_li is the gradient of layer l, such as g_liᵀx_li. The op computes `k_weighted_sum` of each layer of kind k. On a
    CPU one loop distributes the layers over the threads, with the same bits; on a GPU one launch serves all
    LoRA layers and vectors, and adds in float64 in another order.

    Args:
        layers: layers of any kinds in `dpkernels.ops.layers.KINDS`, all with the same B. Their outs have the
            parameters' shapes (a LoRA layer has two, A's and B's) and are contiguous, of one dtype (float64 or
            float32) and disjoint.
        factors: [B] float32, c_i from `clip_factors`; a sample with factor 0 is not read.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: a kind is unknown, or an out is given twice; also the errors of the layers' weighted sums.

    Source: Bu et al. 2022, arXiv:2210.00038 (book-keeping).
    """
    check_sums(layers, factors, "layers")
    outs = [out for layer in layers for out in layer.outs]
    _check.sums("outs", outs, noised=False)
    add(layers, factors, outs)


def add(layers: Sequence[GroupedLayer], factors: Tensor, outs: list[Tensor]) -> None:
    """Compute `weighted_sums` of checked arguments; outs: those of all layers, in order."""
    if layers:
        _weighted_sums(*pack(layers, norms=False), factors, outs)
        torch.autograd.graph.increment_version(outs)
