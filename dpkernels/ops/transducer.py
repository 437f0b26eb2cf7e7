"""The transducer loss (RNN-T, TDT) from the encoder's and the predictor's states, without the logits of all cells.

`transducer_loss` is composed of ops that each backend implements: `transducer_scores` keeps of each cell's V + D logits
only what paths need, `transducer_lattice` sums over all paths, `transducer_gradients` computes the logits again, and
`transducer_cells` returns the output layer's inputs and output gradients of some utterances, for its own gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpkernels.ops import _check, _library

ACTIVATIONS = ("relu", "tanh")
_JOINT = (
    "Tensor encoder, Tensor predictor, Tensor weight, Tensor? bias, "
    "Tensor targets, Tensor frame_lengths, Tensor target_lengths"
)


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _fake_scores(
    encoder: Tensor, predictor: Tensor, *args: Any, durations: Sequence[int] = (), **options: Any
) -> tuple[Tensor, Tensor]:
    cells, dtype = (*encoder.shape[:2], predictor.shape[1]), _result_dtype(encoder)
    count = len(durations)
    scores = encoder.new_empty((*cells, 2 + count), dtype=dtype)
    return scores, encoder.new_empty((*cells, 2 if count else 1), dtype=dtype)


def _fake_cells(
    encoder: Tensor, predictor: Tensor, weight: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    batch, cells = encoder.shape[0], encoder.shape[1] * predictor.shape[1]
    return encoder.new_empty(batch, cells, weight.shape[1]), encoder.new_empty(batch, cells, weight.shape[0])


def _check_values(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    *args: Any,
    blank: int,
    durations: Sequence[int] = (),
    **options: Any,
) -> None:
    """Check lengths and labels, on the CPU only: kernels clamp them."""
    if encoder.device.type != "cpu":
        return
    _within("frame_lengths", frame_lengths, "T", encoder.shape[1])
    _within("target_lengths", target_lengths, "U", targets.shape[1])
    classes = weight.shape[0] - len(durations)
    for i, count in enumerate(target_lengths.tolist()):
        own = targets[i, :count]
        wrong = own[(own < 0) | (own >= classes) | (own == blank)]
        if len(wrong):
            raise ValueError(
                f"targets: given {int(wrong[0])} for utterance {i}; pass labels from 0 to {classes - 1} other than "
                f"the blank, {blank}"
            )


def _within(name: str, lengths: Tensor, letter: str, most: int) -> None:
    for i, given in enumerate(lengths.tolist()):
        if not 0 <= given <= most:
            raise ValueError(
                f"{name}: given {given} for utterance {i}, but {letter} is {most}; pass 0 ≤ {name} ≤ {letter}"
            )


_scores = _library.define(
    "transducer_scores",
    f"({_JOINT}, *, int blank, int[] durations=[], str activation='relu', float sigma=0.0) -> (Tensor, Tensor)",
    fake=_fake_scores,
    check=_check_values,
)


def _check_lattice(
    scores: Tensor, frame_lengths: Tensor, target_lengths: Tensor, *, durations: Sequence[int] = ()
) -> None:
    if scores.device.type == "cpu":
        _within("frame_lengths", frame_lengths, "T", scores.shape[1])
        _within("target_lengths", target_lengths, "U", scores.shape[2] - 1)


_lattice = _library.define(
    "transducer_lattice",
    "(Tensor scores, Tensor frame_lengths, Tensor target_lengths, *, int[] durations=[]) -> (Tensor, Tensor)",
    fake=lambda scores, *args, **options: (scores.new_empty(scores.shape[0]), torch.empty_like(scores)),
    check=_check_lattice,
)
_BACKWARD = (
    "Tensor normalizers, Tensor flows, Tensor grad_losses, "
    "*, int blank, int[] durations=[], str activation='relu'"
)
_cells = _library.define(
    "transducer_cells",
    f"({_JOINT}, {_BACKWARD}) -> (Tensor, Tensor)",
    fake=_fake_cells,
    check=_check_values,
)
_gradients = _library.define(
    "transducer_gradients",
    f"({_JOINT}, {_BACKWARD}) -> (Tensor, Tensor)",
    fake=lambda encoder, predictor, *args, **options: (
        encoder.new_empty(encoder.shape),
        predictor.new_empty(predictor.shape),
    ),
    check=_check_values,
)


def check_joint(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int,
    durations: Sequence[int],
    activation: str,
) -> None:
    """Check shapes, dtypes and devices of the joint network's arguments; see `transducer_loss`."""
    states = {"encoder": encoder, "predictor": predictor, "weight": weight}
    _check.floats(**states, **({} if bias is None else {"bias": bias}))
    _check.shape("encoder", encoder, (None, None, None), "[B, T, H]")
    batch, _, hidden = encoder.shape
    _check.shape("predictor", predictor, (batch, None, hidden), "[B, U+1, H]")
    _check.shape("weight", weight, (None, hidden), "[V+D, H]")
    if bias is not None:
        _check.shape("bias", bias, (weight.shape[0],), "[V+D]")
    if predictor.shape[1] == 0:
        raise ValueError(
            "predictor: expected [B, U+1, H] with U ≥ 0; given no state; begin with the start token's"
        )
    _check.shape("targets", targets, (batch, predictor.shape[1] - 1), "[B, U]")
    _check.shape("frame_lengths", frame_lengths, (batch,), "[B]")
    _check.shape("target_lengths", target_lengths, (batch,), "[B]")
    indices = {"targets": targets, "frame_lengths": frame_lengths, "target_lengths": target_lengths}
    for name, tensor in indices.items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64; given {tensor.dtype}; convert it: {name}.long()")
    _check.same_device(encoder=encoder, **indices)
    classes = weight.shape[0] - len(durations)
    if not 0 <= blank < classes:
        raise ValueError(
            f"blank: given {blank}, but there are {classes} token classes; pass the class of the blank"
        )
    if durations and (min(durations) < 0 or max(durations) < 1 or len(set(durations)) < len(durations)):
        raise ValueError(
            f"durations: given {list(durations)}; pass different numbers of frames ≥ 0, at least one of them > 0"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: given {activation!r}; pass one of {', '.join(ACTIVATIONS)}")


def _check_backward(
    encoder: Tensor,
    predictor: Tensor,
    normalizers: Tensor,
    flows: Tensor,
    grad_losses: Tensor,
    *,
    durations: Sequence[int],
) -> None:
    cells, count = (*encoder.shape[:2], predictor.shape[1]), len(durations)
    parts = 2 if count else 1
    _check.shape("normalizers", normalizers, (*cells, parts), f"[B, T, U+1, {parts}]")
    _check.shape("flows", flows, (*cells, 2 + count), f"[B, T, U+1, {2 + count}]")
    _check.shape("grad_losses", grad_losses, (cells[0],), "[B]")
    _check.floats(flows=flows, normalizers=normalizers, grad_losses=grad_losses)
    _check.same_device(encoder=encoder, normalizers=normalizers, flows=flows, grad_losses=grad_losses)


def transducer_scores(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int,
    durations: Sequence[int] = (),
    activation: str = "relu",
    sigma: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of what a path can emit in each cell (t, u); arguments as `transducer_loss`'s.

    Returns:
        scores: [B, T, U+1, 2+D] float32 (float64 for float64): ln p(blank) − σ, ln p(label u+1) − σ (−∞ at the last u
            of an utterance), and ln p of each duration. −∞ in cells outside of the utterance's lengths.
        normalizers: [B, T, U+1, 1] float32, in a TDT [B, T, U+1, 2]: the log-sum-exp of the cell's token logits, and
            of its duration logits; 0 in those other cells.

    Raises:
        TypeError, ValueError: as `transducer_loss`.
    """
    joint = (encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
    check_joint(*joint, blank=blank, durations=durations, activation=activation)
    result: tuple[Tensor, Tensor] = _scores(
        *joint, blank=blank, durations=list(durations), activation=activation, sigma=sigma
    )
    return result


def transducer_lattice(
    scores: Tensor, frame_lengths: Tensor, target_lengths: Tensor, *, durations: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Sum over all paths of each utterance.

    Args:
        scores: [B, T, U+1, 2+D] from `transducer_scores`, float32 or float64.
        frame_lengths, target_lengths: [B] int64.
        durations: the D durations of a TDT; empty for an RNN-T.

    Returns:
        The losses [B] of scores' dtype: −ln Σ over paths of the probability, in nats; +∞ where there is no path. And
        the flows, of scores' shape: the probability that a path emits the blank, a label and (with either) each
        duration in the cell, −∂ loss / ∂ scores; 0 outside of an utterance's lengths, and everywhere where its loss
        is infinite.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.

    Source: Graves 2012, arXiv:1211.3711, section 2.4; Xu et al. 2023, arXiv:2304.06795 (TDT).
    """
    if scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scores: expected float32 or float64; given {scores.dtype}; pass transducer_scores'")
    _check.shape("scores", scores, (None, None, None, 2 + len(durations)), "[B, T, U+1, 2+D]")
    _check.shape("frame_lengths", frame_lengths, (scores.shape[0],), "[B]")
    _check.shape("target_lengths", target_lengths, (scores.shape[0],), "[B]")
    _check.same_device(scores=scores, frame_lengths=frame_lengths, target_lengths=target_lengths)
    result: tuple[Tensor, Tensor] = _lattice(scores, frame_lengths, target_lengths, durations=list(durations))
    return result


def transducer_gradients(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    normalizers: Tensor,
    flows: Tensor,
    grad_losses: Tensor,
    *,
    blank: int,
    durations: Sequence[int] = (),
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """∂ Σ_i grad_losses_i · loss_i / ∂ (encoder, predictor).

    Args:
        encoder, predictor, weight, bias, targets, frame_lengths, target_lengths, blank, durations, activation: as
            `transducer_loss`.
        normalizers: [B, T, U+1, 1 or 2] from `transducer_scores`.
        flows: [B, T, U+1, 2+D] from `transducer_lattice`.
        grad_losses: [B] of flows' dtype.

    Returns:
        [B, T, H] and [B, U+1, H] of the arguments' dtype, summed in float32 (float64 for float64); exactly 0 outside
        of an utterance's lengths, and where its loss is infinite.

    Raises:
        TypeError, ValueError: as `transducer_loss`.
    """
    joint = (encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
    check_joint(*joint, blank=blank, durations=durations, activation=activation)
    _check_backward(encoder, predictor, normalizers, flows, grad_losses, durations=durations)
    result: tuple[Tensor, Tensor] = _gradients(
        *joint,
        normalizers,
        flows,
        grad_losses,
        blank=blank,
        durations=list(durations),
        activation=activation,
    )
    return result


def transducer_cells(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    normalizers: Tensor,
    flows: Tensor,
    grad_losses: Tensor,
    *,
    blank: int,
    durations: Sequence[int] = (),
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """The output layer's inputs and output gradients in all cells, of as many utterances as memory allows.

    The arguments are those of `transducer_gradients`, of these utterances.

    Returns:
        x [B, T·(U+1), H] and g [B, T·(U+1), V+D] in the arguments' dtype. Row t·(U+1) + u has cell (t, u): in x
        z = act(encoder_t + predictor_u), in g ∂ grad_losses_i · loss_i / ∂ logits. Rows outside of an utterance's
        lengths are 0, and so is all of g where the loss is infinite. Utterance i's gradient of the weight is g_iᵀx_i,
        and of the bias Σ g_i.

    Raises:
        TypeError, ValueError: as `transducer_loss`.
    """
    joint = (encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
    check_joint(*joint, blank=blank, durations=durations, activation=activation)
    _check_backward(encoder, predictor, normalizers, flows, grad_losses, durations=durations)
    result: tuple[Tensor, Tensor] = _cells(
        *joint,
        normalizers,
        flows,
        grad_losses,
        blank=blank,
        durations=list(durations),
        activation=activation,
    )
    return result


def transducer_loss(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int,
    durations: Sequence[int] | None = None,
    activation: str = "relu",
    sigma: float = 0.0,
) -> Tensor:
    """−ln p(targets_i | encoder_i), summed over all alignments, in nats; memory O(B·T·U), not O(B·T·U·V).

    The joint network's logits of cell (t, u) are act(encoder_t + predictor_u) Wᵀ + b: V token logits, then D duration
    logits in a TDT. In an RNN-T the blank moves one frame ahead, and a label none. In a TDT a label moves by a duration
    of its own, and the blank by one above 0; both must end exactly at the utterance's last frame.

    Args:
        encoder: [B, T, H] the encoder's states, projected to the joint network's width; bfloat16, float16, float32
            or float64.
        predictor: [B, U+1, H] the prediction network's states after the start token and each label, same dtype.
        weight: [V+D, H] of the joint network's output layer, same dtype.
        bias: [V+D], or None.
        targets: [B, U] int64 labels; those beyond an utterance's own are not read.
        frame_lengths: [B] int64, 0 ≤ n ≤ T.
        target_lengths: [B] int64, 0 ≤ m ≤ U.
        blank: the blank's class.
        durations: the TDT's durations in frames, in the order of their logits; None for an RNN-T.
        activation: "relu" or "tanh".
        sigma: subtracted from each token's log-probability (the TDT's under-normalisation).

    Returns:
        [B] float32 (float64 for float64); differentiable once, by encoder, predictor, weight and bias. +∞ with a
        gradient of exactly 0 where no alignment exists (no frames; more labels than a TDT's durations allow). An
        utterance's loss and gradient do not depend, in any bit, on the others or on padding.

    Raises:
        TypeError: dtypes differ or do not fit.
        ValueError: shapes, devices, lengths, labels, blank, durations or activation do not fit; lengths and labels are
            checked on the CPU, and clamped by the kernels elsewhere.

    Source: Graves 2012, arXiv:1211.3711; Xu et al. 2023, arXiv:2304.06795 (TDT).
    """
    tensors = (encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
    options = {"blank": blank, "durations": tuple(durations or ()), "activation": activation}
    losses: Tensor = _TransducerLoss.apply(*tensors, options, sigma)
    return losses


class _TransducerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        encoder: Tensor,
        predictor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        frame_lengths: Tensor,
        target_lengths: Tensor,
        options: dict[str, Any],
        sigma: float,
    ) -> Tensor:
        joint = (encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
        scores, normalizers = transducer_scores(*joint, **options, sigma=sigma)
        losses, flows = transducer_lattice(
            scores, frame_lengths, target_lengths, durations=options["durations"]
        )
        ctx.options = options
        ctx.save_for_backward(*joint, normalizers, flows)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Any, ...] = (*ctx.saved_tensors, grad_losses)
        states: tuple[Tensor | None, ...] = (None, None)
        if any(ctx.needs_input_grad[:2]):
            states = transducer_gradients(*saved, **ctx.options)
        outer: tuple[Tensor | None, ...] = (None, None)
        if any(ctx.needs_input_grad[2:4]):
            outer = _output_layer_gradients(saved, ctx.options)
        return *states, *outer, None, None, None, None, None


def _output_layer_gradients(saved: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Σ_i of the utterances' gradients of weight and bias, with the cells of one utterance at a time in memory."""
    encoder, predictor, weight, bias, *rest = saved
    dtype = _result_dtype(weight)
    of_weight = torch.zeros_like(weight, dtype=dtype)
    of_bias = None if bias is None else torch.zeros_like(bias, dtype=dtype)
    for i in range(len(encoder)):
        one = slice(i, i + 1)
        own: tuple[Any, ...] = (
            encoder[one],
            predictor[one],
            weight,
            bias,
            *(tensor[one] for tensor in rest),
        )
        x, g = transducer_cells(*own, **options)
        of_weight += torch.mm(g[0].T, x[0])
        if of_bias is not None:
            of_bias += g[0].sum(0, dtype=dtype)
    return of_weight.to(weight.dtype), None if of_bias is None else of_bias.to(bias.dtype)
