"""Losses of shape [B] for private training, with a check of every index from the data, example by example.

torch's CTC does not check labels and lengths: a label outside the classes reads the memory of the next example in the
batch, and changes that example's gradient. A private step must never compute with such a read. So the functions here
check each example's indices first. An example with an impossible target (an index outside the classes, a blank as a
label, more labels than its frames can align) has probability 0. Its loss is +inf, which marks it, and its gradient is
exactly 0, by selection. Its indices are replaced before the kernel reads them, on every device, so no device
asserts, and no other example's loss or gradient changes by a bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpkernels.nn.layers.joint import check_head, joint_loss

__all__ = ["IGNORED", "cross_entropy_per_example", "ctc_loss_per_example", "transducer_loss_per_example"]

IGNORED = -100  # a target that is padding: the default of torch's cross_entropy, and transformers' convention


def ctc_loss_per_example(logits: Tensor, input_lengths: Tensor, labels: Tensor, blank: int) -> Tensor:
    """−ln p(yᵢ | xᵢ), summed over all alignments; in nats, not divided by any length.

    Args:
        logits: [B, T, V], any float type; log-probabilities are taken in float32 (float64 for float64).
        input_lengths: [B] int, frames of each example; frames beyond them are not read.
        labels: [B, L] int, 0 ≤ label < V and not the blank, padded with −100 on the right.
        blank: the blank's class.

    Returns:
        [B]. +inf with a gradient of exactly 0 if the target is impossible: a label outside the classes, or equal to
        the blank; −100 before a label; a length outside 0 … T; fewer frames than labels, counting one blank between
        equal neighbours. The losses and gradients of the other examples do not depend on that example. The number of
        impossible targets, `losses.isinf().sum()`, is NOT PRIVATE.

    Raises:
        TypeError: `logits` is not a floating-point tensor; labels, lengths or blank are not integers.
        ValueError: the shapes do not fit, or `blank` is outside the classes.

    Source: Graves et al. 2006, "Connectionist temporal classification".
    """
    _floating("ctc_loss_per_example", logits)
    labels = _integers("ctc_loss_per_example", "labels", labels)
    input_lengths = _integers("ctc_loss_per_example", "input_lengths", input_lengths)
    _blank("ctc_loss_per_example", blank)
    if logits.dim() != 3 or labels.dim() != 2 or len(logits) != len(labels):
        raise ValueError(
            f"ctc_loss_per_example: logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: "
            "expected [B, T, V] and [B, L]"
        )
    batch, frames, classes = logits.shape
    if input_lengths.shape != (batch,):
        raise ValueError(
            f"ctc_loss_per_example: input_lengths {tuple(input_lengths.shape)}: expected [{batch}], one per example"
        )
    if not 0 <= blank < classes:
        raise ValueError(
            f"ctc_loss_per_example: blank={blank} with {classes} classes: pass the blank's class, 0 ≤ blank < V"
        )
    if batch == 0:
        return logits.sum(dim=(1, 2))
    counts, possible = _sequences(labels, classes, blank)
    used = labels != IGNORED
    repeats = (used[:, 1:] & (labels[:, 1:] == labels[:, :-1])).sum(dim=1)
    possible &= (counts + repeats <= input_lengths) & (input_lengths <= frames)
    if frames == 0:
        logits = F.pad(
            logits, (0, 0, 0, 1)
        )  # torch's kernel rejects an empty tensor; no length includes this frame
    # An impossible row is replaced by one that is valid for any logits: no labels, all frames.
    accumulate = logits.dtype if logits.dtype == torch.float64 else torch.float32
    logits = _Select.apply(logits, possible)
    losses = F.ctc_loss(
        logits.log_softmax(dim=-1, dtype=accumulate).transpose(0, 1),
        labels.masked_fill(~used | ~possible[:, None], 0),
        input_lengths.masked_fill(~possible, frames),
        counts.masked_fill(~possible, 0),
        blank=blank,
        reduction="none",
        zero_infinity=False,
    )
    return _marked(losses, possible)


def transducer_loss_per_example(
    joint_head: nn.Linear,
    encoder: Tensor,
    predictor: Tensor,
    frame_lengths: Tensor,
    labels: Tensor,
    *,
    blank: int,
    durations: Sequence[int] | None = None,
    activation: str = "relu",
    sigma: float = 0.0,
) -> Tensor:
    """−ln p(yᵢ | xᵢ) of a transducer (RNN-T, TDT), summed over all alignments; in nats, not divided by any length.

    No logits of cells are held: memory is O(B·T·U), see `dpkernels.ops.transducer_loss`. In a private model a trained
    `joint_head` records its per-sample gradients (`dpkernels.nn.JointRecord`); elsewhere autograd differentiates it.
    Its forward is not called, so hooks on it do not run, and a weight in parts (`shard_frozen`) is not gathered.

    Args:
        joint_head: the joint network's output layer, nn.Linear of H inputs and V + D outputs: V token logits, then D
            duration logits. Its weight and bias may be trained or frozen.
        encoder: [B, T, H], the encoder's states, projected to the joint network's width.
        predictor: [B, U+1, H], the prediction network's states after the start token and each label. Any float type;
            under autocast states, weight and bias are cast to its type. The joint network's sum and activation, the
            accumulation of the logits and all log-probabilities are in float32 (float64 for float64).
        frame_lengths: [B] int, frames of each example; frames beyond them are not read.
        labels: [B, U] int, 0 ≤ label < V and not the blank, padded with −100 on the right.
        blank: the blank's class.
        durations: a TDT's D durations in frames, in the order of their logits; None for an RNN-T.
        activation: "relu" or "tanh".
        sigma: subtracted from each token's log-probability (a TDT's under-normalisation).

    Returns:
        [B]. +inf with a gradient of exactly 0 if the target is impossible: a label outside the classes, or equal to
        the blank; −100 before a label; a length outside 0 … T; no frames, or frames that no sequence of durations
        fills. The losses and gradients of the other examples do not depend on that example. The number of impossible
        targets, `losses.isinf().sum()`, is NOT PRIVATE.

    Raises:
        TypeError: states that are not floating-point, or not of one type with the layer; labels, lengths or blank that
            are not integers; an output layer that is not a plain nn.Linear.
        ValueError: the shapes do not fit; blank, durations or activation do not fit.

    Source: Graves 2012, arXiv:1211.3711; Xu et al. 2023, arXiv:2304.06795 (TDT).
    """
    function = "transducer_loss_per_example"
    check_head(joint_head)
    _floating(function, encoder, "encoder")
    _floating(function, predictor, "predictor")
    labels = _integers(function, "labels", labels)
    frame_lengths = _integers(function, "frame_lengths", frame_lengths)
    _blank(function, blank)
    batch, classes = len(encoder), joint_head.out_features - len(durations or ())
    if encoder.dim() != 3 or labels.dim() != 2 or len(labels) != batch:
        raise ValueError(
            f"{function}: encoder {tuple(encoder.shape)} and labels {tuple(labels.shape)}: expected [B, T, H] and "
            "[B, U]"
        )
    if frame_lengths.shape != (batch,):
        raise ValueError(
            f"{function}: frame_lengths {tuple(frame_lengths.shape)}: expected [{batch}], one per example"
        )
    counts, possible = _sequences(labels, classes, blank)
    possible &= _in_range(frame_lengths, encoder.shape[1] + 1)
    # Without frames there is no path: the op gives such an example +inf and no gradient, and reads none of its labels.
    return joint_loss(
        joint_head,
        encoder,
        predictor,
        labels,
        frame_lengths.masked_fill(~possible, 0),
        counts.masked_fill(~possible, 0),
        blank=blank,
        durations=tuple(durations or ()),
        activation=activation,
        sigma=sigma,
    )


def cross_entropy_per_example(
    logits: Tensor,
    targets: Tensor,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """−ln p(target), averaged or summed over the positions of each example; in nats.

    With `label_smoothing` = s it is −(1 − s)·ln p(target) − (s/V)·Σ_v ln p(v) at each position.

    Args:
        logits: `[B, *, V]`, classes last, any float type; log-probabilities are taken in float32 (float64 for float64).
        targets: `[B, *]` int, 0 ≤ target < V, or −100 at positions that do not count.
        reduction: "mean" or "sum" over the positions that are not −100. Nothing is reduced over the batch.
        label_smoothing: s, 0 ≤ s ≤ 1.

    Returns:
        [B]; 0 for an example without targets. +inf with a gradient of exactly 0 if a target is outside the classes.

    Raises:
        TypeError: `logits` is not a floating-point tensor, or `targets` are not integers.
        ValueError: the shapes do not fit, there are no classes, another `reduction`, or `label_smoothing` out of range.
    """
    _floating("cross_entropy_per_example", logits)
    targets = _integers("cross_entropy_per_example", "targets", targets)
    if logits.dim() < 2 or logits.shape[:-1] != targets.shape or logits.shape[-1] == 0:
        raise ValueError(
            f"cross_entropy_per_example: logits {tuple(logits.shape)} and targets {tuple(targets.shape)}: "
            "expected [B, *, V] and [B, *], classes last, at least one"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"cross_entropy_per_example: reduction={reduction!r}: expected mean or sum")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"cross_entropy_per_example: label_smoothing={label_smoothing!r}: expected 0 ≤ label_smoothing ≤ 1"
        )
    batch, classes = logits.shape[0], logits.shape[-1]
    flat = targets.reshape(batch, math.prod(targets.shape[1:]))
    used = flat != IGNORED
    possible = (_in_range(flat, classes) | ~used).all(dim=1)
    accumulate = logits.dtype if logits.dtype == torch.float64 else torch.float32
    nll = F.cross_entropy(
        _Select.apply(logits, possible).to(accumulate).reshape(-1, classes),
        flat.masked_fill(~possible[:, None], IGNORED).flatten(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    losses = nll.view(flat.shape).sum(dim=1)
    if reduction == "mean":
        losses = losses / used.sum(dim=1).clamp(min=1)
    return _marked(losses, possible)


class _Select(torch.autograd.Function):
    """Return the logits unchanged; the gradient of an example that is not selected is 0, even if it would be NaN."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, selected: Tensor) -> Tensor:
        ctx.save_for_backward(selected)
        return logits.view_as(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (selected,) = ctx.saved_tensors
        return g.masked_fill(~selected.view(-1, *[1] * (g.dim() - 1)), 0), None


def _sequences(labels: Tensor, classes: int, blank: int) -> tuple[Tensor, Tensor]:
    """(number of labels, whether all are classes and none the blank, with −100 after them only), both [B]."""
    used = labels != IGNORED
    counts = used.sum(dim=1)
    possible = (_in_range(labels, classes) & (labels != blank) | ~used).all(dim=1)
    possible &= (used == (torch.arange(labels.shape[1], device=labels.device) < counts[:, None])).all(dim=1)
    return counts, possible


def _in_range(indices: Tensor, classes: int) -> Tensor:
    """Whether each index is a class, 0 ≤ index < classes."""
    return (indices >= 0) & (indices < classes)


def _marked(losses: Tensor, possible: Tensor) -> Tensor:
    return torch.where(possible, losses, torch.full_like(losses, torch.inf))


def _blank(function: str, blank: int) -> None:
    if not isinstance(blank, int) or isinstance(blank, bool):
        raise TypeError(f"{function}: blank={blank!r}: expected an int, the blank's class")


def _floating(function: str, logits: Tensor, name: str = "logits") -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"{function}: {name}: got {_described(logits)}; expected a floating-point tensor")


def _described(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _integers(function: str, name: str, tensor: Tensor) -> Tensor:
    """The tensor in int64: in a narrower dtype −100 and the number of classes would wrap around."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{function}: {name}: got {_described(tensor)}; expected a tensor of integers: torch.tensor({name})"
        )
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(
            f"{function}: {name} of {tensor.dtype}: expected integers; convert them: {name}.long()"
        )
    return tensor.long()
