"""Losses of shape [B] for private training, with every index that comes from data checked example by example.

torch's CTC reads with labels and lengths without looking at them: a label that is no class reads the memory of the
next example in the batch, and that example's gradient changes. A private step must never compute with such a read.
Here each example's indices are looked at first. An example whose target is impossible (an index outside the classes,
a blank as a label, more labels than its frames can align) has probability 0: its loss is +inf, which marks it, and
its gradient is exactly 0, by selection. Its indices are replaced before the kernel reads with them, on every
device, so that no device asserts and no other example's loss or gradient changes by a bit.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["IGNORED", "cross_entropy_per_example", "ctc_loss_per_example"]

IGNORED = -100  # a target that is padding: the default of torch's cross_entropy, and transformers' convention


def ctc_loss_per_example(logits: Tensor, input_lengths: Tensor, labels: Tensor, blank: int) -> Tensor:
    """−ln p(yᵢ | xᵢ), summed over all alignments; in nats, not divided by any length.

    Args:
        logits: [B, T, V], any float type; log-probabilities are taken in float32 (float64 for float64).
        input_lengths: [B] int, frames of each example; frames beyond them are not read.
        labels: [B, L] int, 0 ≤ label < V and not the blank, padded with −100 on the right.
        blank: the blank's class.

    Returns:
        [B]. +inf with a gradient of exactly 0 where the target is impossible: a label outside the classes, or equal to
        the blank; −100 before a label; a length outside 0 … T; fewer frames than labels, counting one blank between
        equal neighbours. The losses and gradients of the other examples are what they are without that example. How
        many there are, `losses.isinf().sum()`, is NOT PRIVATE.

    Raises:
        TypeError: logits that are no floating-point tensor; labels, lengths or a blank that are no integers.
        ValueError: shapes that do not fit, or a blank that is no class.

    Source: Graves et al. 2006, "Connectionist temporal classification".
    """
    _floating("ctc_loss_per_example", logits)
    labels = _integers("ctc_loss_per_example", "labels", labels)
    input_lengths = _integers("ctc_loss_per_example", "input_lengths", input_lengths)
    if not isinstance(blank, int) or isinstance(blank, bool):
        raise TypeError(f"ctc_loss_per_example: blank={blank!r}: expected an int, the blank's class")
    if logits.dim() != 3 or labels.dim() != 2 or len(logits) != len(labels):
        raise ValueError(
            f"ctc_loss_per_example: logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: "
            "expected [B, T, V] and [B, L]"
        )
    batch, frames, classes = logits.shape
    if input_lengths.shape != (batch,):
        raise ValueError(
            f"ctc_loss_per_example: input_lengths {tuple(input_lengths.shape)}: expected [{batch}], one an example"
        )
    if not 0 <= blank < classes:
        raise ValueError(
            f"ctc_loss_per_example: blank={blank} with {classes} classes: pass the blank's class, 0 ≤ blank < V"
        )
    if batch == 0:
        return logits.sum(dim=(1, 2))
    own = labels != IGNORED
    counts = own.sum(dim=1)
    repeats = (own[:, 1:] & (labels[:, 1:] == labels[:, :-1])).sum(dim=1)
    possible = (_classes(labels, classes) & (labels != blank) | ~own).all(dim=1)
    possible &= (own == (torch.arange(labels.shape[1], device=labels.device) < counts[:, None])).all(dim=1)
    possible &= (counts + repeats <= input_lengths) & (input_lengths <= frames)
    if frames == 0:
        logits = F.pad(
            logits, (0, 0, 0, 1)
        )  # torch's kernel takes no empty tensor; no length reaches this frame
    # An impossible row becomes one that is harmless for any logits: no labels, all frames.
    accumulate = logits.dtype if logits.dtype == torch.float64 else torch.float32
    logits = _Select.apply(logits, possible)
    losses = F.ctc_loss(
        logits.log_softmax(dim=-1, dtype=accumulate).transpose(0, 1),
        labels.masked_fill(~own | ~possible[:, None], 0),
        input_lengths.masked_fill(~possible, frames),
        counts.masked_fill(~possible, 0),
        blank=blank,
        reduction="none",
        zero_infinity=False,
    )
    return _marked(losses, possible)


def cross_entropy_per_example(
    logits: Tensor, targets: Tensor, *, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """−ln p(target), averaged or summed over an example's own positions; in nats.

    Args:
        logits: `[B, *, V]`, classes last, any float type; log-probabilities are taken in float32 (float64 for float64).
        targets: `[B, *]` int, 0 ≤ target < V, −100 where a position is not learnt.
        reduction: "mean" or "sum" over the positions that are not −100. Nothing is reduced over the batch.

    Returns:
        [B]; 0 for an example without targets. +inf with a gradient of exactly 0 where a target is no class.

    Raises:
        TypeError: logits that are no floating-point tensor; targets that are no integers.
        ValueError: shapes that do not fit, no classes, or another reduction.
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
    batch, classes = logits.shape[0], logits.shape[-1]
    flat = targets.reshape(batch, math.prod(targets.shape[1:]))
    own = flat != IGNORED
    possible = (_classes(flat, classes) | ~own).all(dim=1)
    accumulate = logits.dtype if logits.dtype == torch.float64 else torch.float32
    nll = F.cross_entropy(
        _Select.apply(logits, possible).to(accumulate).reshape(-1, classes),
        flat.masked_fill(~possible[:, None], IGNORED).flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    losses = nll.view(flat.shape).sum(dim=1)
    if reduction == "mean":
        losses = losses / own.sum(dim=1).clamp(min=1)
    return _marked(losses, possible)


class _Select(torch.autograd.Function):
    """logits as they are; the gradient of an example that is not chosen is 0, also where it would be NaN."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(chosen)
        return logits.view_as(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (chosen,) = ctx.saved_tensors
        return g.masked_fill(~chosen.view(-1, *[1] * (g.dim() - 1)), 0), None


def _classes(indices: Tensor, classes: int) -> Tensor:
    """Where an index is a class."""
    return (indices >= 0) & (indices < classes)


def _marked(losses: Tensor, possible: Tensor) -> Tensor:
    return torch.where(possible, losses, torch.full_like(losses, torch.inf))


def _floating(function: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"{function}: logits: got {_described(logits)}; expected a floating-point tensor")


def _described(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _integers(function: str, name: str, tensor: Tensor) -> Tensor:
    """int64: in a narrow type −100 and the number of classes would wrap around."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{function}: {name}: got {_described(tensor)}; expected a tensor of integers: torch.tensor({name})"
        )
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(
            f"{function}: {name} of {tensor.dtype}: expected integers; convert them: {name}.long()"
        )
    return tensor.long()
