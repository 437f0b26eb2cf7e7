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
    """Squared norm of each sample's gradient over many layers, rounded up: Σ_l ‖g_liᵀx_li‖² and its like.

    For each layer l of kind k, `k_norm_sq` of its tensors; for a LoRA layer both factors'. On a GPU, LoRA layers,
    linear layers with a narrow side and materialised gradients (a bias of one frame) are one launch for all.

    Args:
        xs: the layers, at least one, all with the same B, as `GroupedLayer`; or, with gs and kinds, one tensor a layer:
            layer inputs; ids for an embedding, x̂ for a layer_norm; a bias's is not read (give its g).
        gs: one a layer: gradients of the layers' outputs.
        kinds: one a layer, of `dpkernels.ops.layers.KINDS`.
        **columns: with gs and kinds, lists of what only some kinds take, one entry for each layer of the kind: hs, dhs,
            scalings for LoRA layers, as `lora_norm_sq` takes them; padding_idxs for embeddings, -1 for none;
            kernel_sizes, strides, paddings, dilations for depthwise_conv1d.

    Returns:
        [B] float32, in squared units of the gradients; not below the exact sum, nor below that of what
        `weighted_sums` adds for the sample divided by its factor.

    Raises:
        TypeError: dtypes that do not fit; a list that no kind has.
        ValueError: no layer, lists of lengths that do not fit, an unknown kind; and what the layers' own norms raise.

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
    """Add every layer's clipped gradients to its sums, in place: out_l += Σ_i c_i g_liᵀx_li and its like.

    For each layer l of kind k, `k_weighted_sum` of its tensors and outs. On a CPU the layers are shared out among the
    threads in one loop, with the same bits; on a GPU LoRA layers and vectors are one launch for all, whose float64
    additions have another order.

    Args:
        layers: all with the same B; of any kinds in `dpkernels.ops.layers.KINDS`. Their outs are in their parameters'
            shapes (a LoRA layer has two, A's and B's), all contiguous, of one dtype, float64 or float32, and none
            overlaps another.
        factors: [B] float32, c_i from `clip_factors`; a sample with factor 0 is not read.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: an unknown kind, an out given twice; and what the layers' own weighted sums raise.

    Source: Bu et al. 2022, arXiv:2210.00038 (book-keeping).
    """
    check_sums(layers, factors, "layers")
    outs = [out for layer in layers for out in layer.outs]
    _check.sums("outs", outs, noised=False)
    add(layers, factors, outs)


def add(layers: Sequence[GroupedLayer], factors: Tensor, outs: list[Tensor]) -> None:
    """`weighted_sums` of arguments that were checked; outs: of all layers, one after the other."""
    if layers:
        _weighted_sums(*pack(layers, norms=False), factors, outs)
        torch.autograd.graph.increment_version(outs)
