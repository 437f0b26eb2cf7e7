"""The transducer ops by the native library, on CPU tensors. csrc/transducer_kernels.h defines the functions.

The library computes in float32 (float64 for float64) and writes an utterance's own cells only. Outputs of half types
are rounded here, for one utterance at a time where they are as large as the logits.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpkernels.backends.native_ops import native
from dpkernels.backends.native_ops.calls import CTensor, view

_ACTIVATIONS = {"relu": 0, "tanh": 1}


class _Joint(ctypes.Structure):
    """dpk_transducer."""

    _fields_ = (
        *((name, CTensor) for name in ("encoder", "predictor", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("targets", "frame_lengths", "target_lengths")),
        ("blank", ctypes.c_int64),
        ("durations", ctypes.c_int64),
        ("activation", ctypes.c_int32),
    )


_J, _P, _I64, _I32, _F64 = (
    ctypes.POINTER(_Joint),
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_double,
)
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "scores": (_J, _F64, _I32, _P, _P),
    "lattice": (_P, _I32, _I64, _I64, _I64, ctypes.POINTER(_I64), _I64, _P, _P, _I32, _P, _P),
    "gradients": (_J, _P, _P, _P, _I32, _P, _P),
    "cells": (_J, _P, _P, _P, _I32, _P, _P),
}


@functools.cache
def _function(name: str) -> Callable[..., None]:
    return native.library("cpu").function(f"dpk_cpu_transducer_{name}", _ARGUMENTS[name])


@dataclass(frozen=True)
class _Batch:
    """The joint network's arguments; integers are dense, which the library's pointers need."""

    encoder: Tensor
    predictor: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    frame_lengths: Tensor
    target_lengths: Tensor
    blank: int
    durations: int
    activation: str

    @classmethod
    def of(cls, joint: tuple[Any, ...], *, blank: int, durations: Sequence[int], activation: str) -> "_Batch":
        encoder, predictor, weight, bias, *integers = joint
        targets, frames, labels = (tensor.contiguous() for tensor in integers)
        states = (encoder, predictor, weight, bias)
        return cls(*states, targets, frames, labels, blank, len(durations), activation)

    @property
    def dtype(self) -> torch.dtype:
        """Of the library's arithmetic and outputs."""
        return torch.promote_types(self.encoder.dtype, torch.float32)

    @property
    def cells(self) -> tuple[int, int, int]:
        return (*self.encoder.shape[:2], self.predictor.shape[1])

    def utterance(self, i: int) -> "_Batch":
        one = slice(i, i + 1)
        states = (self.encoder[one], self.predictor[one], self.weight, self.bias)
        integers = (self.targets[one], self.frame_lengths[one], self.target_lengths[one])
        return _Batch(*states, *integers, self.blank, self.durations, self.activation)

    def joint(self) -> _Joint:
        """As dpk_transducer; this batch must outlive the call."""
        bias = CTensor() if self.bias is None else view(self.bias[None, None])
        integers = (self.targets, self.frame_lengths, self.target_lengths)
        return _Joint(
            view(self.encoder),
            view(self.predictor),
            view(self.weight[None]),
            bias,
            *(tensor.data_ptr() for tensor in integers),
            self.blank,
            self.durations,
            _ACTIVATIONS[self.activation],
        )

    def backward(
        self, name: str, normalizers: Tensor, flows: Tensor, grad_losses: Tensor, *outs: Tensor
    ) -> None:
        dense = [tensor.to(self.dtype).contiguous() for tensor in (normalizers, flows, grad_losses)]
        _function(name)(
            self.joint(),
            *(tensor.data_ptr() for tensor in dense),
            native.threads(),
            *(out.data_ptr() for out in outs),
        )


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
    """See `dpkernels.ops.transducer_scores`."""
    joint = (encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
    batch = _Batch.of(joint, blank=blank, durations=durations, activation=activation)
    scores = torch.full((*batch.cells, 2 + len(durations)), -torch.inf, dtype=batch.dtype)
    normalizers = torch.zeros((*batch.cells, 2 if durations else 1), dtype=batch.dtype)
    _function("scores")(batch.joint(), sigma, native.threads(), scores.data_ptr(), normalizers.data_ptr())
    return scores, normalizers


def transducer_lattice(
    scores: Tensor, frame_lengths: Tensor, target_lengths: Tensor, *, durations: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """See `dpkernels.ops.transducer_lattice`."""
    dense, frames, labels = scores.contiguous(), frame_lengths.contiguous(), target_lengths.contiguous()
    losses, flows = (
        torch.empty(len(scores), dtype=scores.dtype),
        torch.zeros(scores.shape, dtype=scores.dtype),
    )
    _function("lattice")(
        dense.data_ptr(),
        native.element_type(scores.dtype),
        *scores.shape[:3],
        (_I64 * len(durations))(*durations),
        len(durations),
        frames.data_ptr(),
        labels.data_ptr(),
        native.threads(),
        losses.data_ptr(),
        flows.data_ptr(),
    )
    return losses, flows


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
    """See `dpkernels.ops.transducer_gradients`."""
    joint = (encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
    batch = _Batch.of(joint, blank=blank, durations=durations, activation=activation)
    of_encoder = torch.zeros(encoder.shape, dtype=batch.dtype)
    of_predictor = torch.zeros(predictor.shape, dtype=batch.dtype)
    batch.backward("gradients", normalizers, flows, grad_losses, of_encoder, of_predictor)
    return of_encoder.to(encoder.dtype), of_predictor.to(predictor.dtype)


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
    """See `dpkernels.ops.transducer_cells`."""
    joint = (encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
    batch = _Batch.of(joint, blank=blank, durations=durations, activation=activation)
    utterances, cells = batch.cells[0], batch.cells[1] * batch.cells[2]
    x = torch.zeros(utterances, cells, weight.shape[1], dtype=encoder.dtype)
    g = torch.zeros(utterances, cells, weight.shape[0], dtype=encoder.dtype)
    if encoder.dtype == batch.dtype:
        batch.backward("cells", normalizers, flows, grad_losses, x, g)
        return x, g
    for i in range(utterances):
        one = slice(i, i + 1)
        wide = [torch.zeros(t[one].shape, dtype=batch.dtype) for t in (x, g)]
        batch.utterance(i).backward("cells", normalizers[one], flows[one], grad_losses[one], *wide)
        x[one], g[one] = wide
    return x, g
