"""Measurement of one private step on this machine: the time of each micro-batch, and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MeasuredStep:
    """One logical step. Seconds and bytes.

    Attributes:
        micro_batches: seconds of each forward and private backward, in order; the first ones warm up.
        step: seconds of noise and optimizer.
        optimizer: bytes of the optimizer's state.
        peak: highest memory: of the process (CPU, since it began), or allocated on the GPU during the step.
    """

    micro_batches: list[float]
    step: float
    optimizer: int
    peak: int


def measure_step(
    optimizer: Any, logical_batch: Iterable[Any], losses_of: Callable[[Any], Tensor], device: torch.device
) -> MeasuredStep:
    """Take one private step, and measure it.

    Args:
        optimizer: the private one, from `PrivacyEngine.make_private`.
        logical_batch: from its loader.
        losses_of: micro-batch -> losses [B] on `device`.
        device: where the model is.
    """
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for batch in logical_batch:
        began = _clock(device)
        optimizer.backward(losses_of(batch))
        times.append(_clock(device) - began)
    began = _clock(device)
    optimizer.step()
    step = _clock(device) - began
    optimizer.zero_grad()
    return MeasuredStep(times, step, _state_bytes(optimizer.state), _peak_bytes(device))


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _state_bytes(state: Any) -> int:
    tensors = (
        value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: KiB on Linux
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
