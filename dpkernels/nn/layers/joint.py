"""The transducer loss of a joint network whose output layer is trained privately."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpkernels import ops
from dpkernels.nn.layers.joint_records import JointRecord
from dpkernels.nn.layers.linear import GhostLinear
from dpkernels.nn.tensors import autocast_dtype, maybe_cast, no_autocast


def check_head(head: nn.Module) -> None:
    """Check that a joint network's output layer is torch's: the loss reads its weight and bias and calls no forward.

    Raises TypeError otherwise.
    """
    if type(head).forward in (nn.Linear.forward, GhostLinear.forward):
        return
    raise TypeError(
        f"joint_head: given a {type(head).__module__}.{type(head).__qualname__}, whose forward the transducer loss "
        "would bypass; pass a plain nn.Linear. An adapter (LoRA) on this layer is not supported: leave the layer out "
        "of the adapter's target_modules, and freeze it, or train all of it (PEFT: modules_to_save)"
    )


def joint_loss(
    head: nn.Linear,
    encoder: Tensor,
    predictor: Tensor,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    *,
    sigma: float = 0.0,
    **options: Any,
) -> Tensor:
    """`ops.transducer_loss` with the weight and bias of `head`; privately, a `JointRecord` on its tape.

    Under autocast the states, the weight and the bias are cast to its dtype, as for the plain layer. From there on the
    joint network's sum and activation, the accumulation of the logits, and all log-probabilities are in float32.

    Args:
        head: nn.Linear [V+D, H]; its forward is not called.
        options: blank, durations and activation.
    """
    dtype = autocast_dtype(encoder)
    encoder, predictor = maybe_cast(encoder, dtype), maybe_cast(predictor, dtype)
    indices = (targets, frame_lengths, target_lengths)
    with no_autocast(encoder.device.type):
        if isinstance(head, GhostLinear) and head._ghost_active(head.weight, head.bias):
            private: Tensor = _Joint.apply(
                encoder, predictor, head.weight, head.bias, *indices, head, options, sigma
            )
            return private
        weight, bias = maybe_cast(head.weight, dtype), maybe_cast(head.bias, dtype)
        return ops.transducer_loss(encoder, predictor, weight, bias, *indices, **options, sigma=sigma)


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        encoder: Tensor,
        predictor: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        targets: Tensor,
        frame_lengths: Tensor,
        target_lengths: Tensor,
        head: GhostLinear,
        options: dict[str, Any],
        sigma: float,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer, ctx.options = head.ghost_tape, head.ghost_label(), options
        ctx.weight, ctx.bias = weight, bias
        matrix, vector = maybe_cast(weight, encoder.dtype), maybe_cast(bias, encoder.dtype)
        indices = (targets, frame_lengths, target_lengths)
        scores, normalizers = ops.transducer_scores(
            encoder, predictor, matrix, vector, *indices, **options, sigma=sigma
        )
        losses, flows = ops.transducer_lattice(scores, *indices[1:], durations=options["durations"])
        ctx.save_for_backward(encoder, predictor, weight, bias, *indices, normalizers, flows)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 10
        encoder, predictor, weight, bias, targets, frames, labels, normalizers, flows = ctx.saved_tensors
        rest = (targets, frames, labels, normalizers, flows, g)
        states: tuple[Tensor | None, ...] = (None, None)
        with no_autocast(g.device.type):
            if any(ctx.needs_input_grad[:2]):
                matrix, vector = maybe_cast(weight, encoder.dtype), maybe_cast(bias, encoder.dtype)
                states = ops.transducer_gradients(encoder, predictor, matrix, vector, *rest, **ctx.options)
            needed = zip((ctx.weight, ctx.bias), ctx.needs_input_grad[2:4], strict=True)
            trained = tuple(parameter for parameter, needs in needed if needs)
            record = JointRecord(
                ctx.layer, ctx.weight, ctx.bias, encoder, predictor, *rest, ctx.options, trained
            )
            # A bias alone has small gradients. Where weight or bias is used again, the gradients of each combine with
            # those of its other uses, and a record of both does not.
            apart = len(trained) > 1 and not ctx.tape.used_once(trained)
            for part in record.materialised() if apart or not ctx.needs_input_grad[2] else (record,):
                ctx.tape.add(part)
        return *states, *(None,) * 8
