"""The squared norms of many layers' per-sample gradients, added up, in one call."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dpkernels.ops import _library, embedding
from dpkernels.ops.grouped import check_layer, check_lists, unlike_layers


def _check_ids(xs: list[Tensor], gs: list[Tensor], kinds: list[str], *rest: object) -> None:
    """No embedding has a negative id, looked at where looking is free."""
    for x, kind in zip(xs, kinds, strict=True):
        if kind == "embedding":
            embedding._check_not_negative(x)


_total_norm_sq = _library.define(
    "total_norm_sq",
    "(Tensor[] xs, Tensor[] gs, str[] kinds, Tensor[] hs, Tensor[] dhs, float[] scalings, int[] padding_idxs, "
    "int[] kernel_sizes, int[] strides, int[] paddings, int[] dilations) -> Tensor",
    fake=lambda xs, gs, *rest: _library.norms(gs[0]),
    check=_check_ids,
)


def total_norm_sq(
    xs: Sequence[Tensor],
    gs: Sequence[Tensor],
    kinds: Sequence[str],
    *,
    hs: Sequence[Tensor] = (),
    dhs: Sequence[Tensor] = (),
    scalings: Sequence[float] = (),
    padding_idxs: Sequence[int] = (),
    kernel_sizes: Sequence[int] = (),
    strides: Sequence[int] = (),
    paddings: Sequence[int] = (),
    dilations: Sequence[int] = (),
) -> Tensor:
    """Squared norm of each sample's gradient over many layers, rounded up: Σ_l ‖g_liᵀx_li‖² and its like.

    For each layer l of kind k, `k_norm_sq` of its tensors; for a LoRA layer both factors'. On a GPU, LoRA layers,
    linear layers with a narrow side and gradients that are materialised already (a bias of one frame) are one launch
    for all.

    Args:
        xs: one a layer, at least one, all with the same B: layer inputs; ids for an embedding, x̂ for a layer_norm; a
            bias's is not read (give its g).
        gs: one a layer: gradients of the layers' outputs.
        kinds: one a layer, of `dpkernels.ops.grouped.KINDS`.
        hs, dhs, scalings: one for each LoRA layer, as `lora_norm_sq` takes them.
        padding_idxs: one for each embedding; -1 for none.
        kernel_sizes, strides, paddings, dilations: one for each depthwise_conv1d.

    Returns:
        [B] float32, in squared units of the gradients; not below the exact sum, nor below that of what
        `clip_and_noise` adds for the sample divided by its factor.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: no layer, lists of lengths that do not fit, an unknown kind; and what the layers' own norms raise.

    Source: Abadi et al. 2016, arXiv:1607.00133 (flat clipping); Goodfellow 2015, arXiv:1510.01799 (norms by layer).
    """
    options: dict[str, dict[str, Sequence[Any]]] = {
        "lora": {"hs": hs, "dhs": dhs, "scalings": scalings},
        "embedding": {"padding_idxs": padding_idxs},
        "depthwise_conv1d": {
            "kernel_sizes": kernel_sizes, "strides": strides, "paddings": paddings, "dilations": dilations
        },
    }  # fmt: skip
    check_lists(kinds, {"xs": xs, "gs": gs}, options)
    if not kinds:
        raise ValueError("kinds: given no layer; pass at least one: the batch's size is that of its tensors")
    for i, own in unlike_layers(kinds, xs, gs, options):
        check_layer(kinds[i], xs[i], gs[i], own, own.get("kernel_sizes", 1))
        if len(gs[i]) != len(gs[0]):
            raise ValueError(
                f"gs[{i}]: expected a batch of {len(gs[0])}, as gs[0] has; given {list(gs[i].shape)}; "
                "pass one micro-batch"
            )
    total: Tensor = _total_norm_sq(
        list(xs), list(gs), list(kinds), list(hs), list(dhs), [float(s) for s in scalings], list(padding_idxs),
        list(kernel_sizes), list(strides), list(paddings), list(dilations),
    )  # fmt: skip
    return total
