"""Mixed precision: matrix products and frozen weights in a half type, what is trained and summed in float32.

`model.dtype` names the half type. Products are taken in it by autocast, which also keeps softmaxes, losses and trained
norms in float32. What a run does not train is held in it once a method has said what that is (`hold_frozen`); what it
trains is float32, so that an update smaller than a step of the half type is not lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HALF = (torch.bfloat16, torch.float16)


def arithmetic(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Where a forward runs: autocast to a half `dtype`, or the weights' own type for float32."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def no_tf32() -> None:
    """For the process: a GPU's float32 products keep 24 bits, not TF32's 11, which torch's default for convolutions is.

    What docs/privacy.md says of rounding in float32, and the self-check's tolerance, are of float32.
    """
    backends: Any = torch.backends
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False
    if not hasattr(backends, "fp32_precision"):  # before torch 2.9
        return
    # What says "none" follows this one. Only where it has been set elsewhere: torch refuses to read the older switches,
    # as transformers does, once these have been set one by one.
    backends.fp32_precision = "ieee"
    cpu, cuda = backends.mkldnn, backends.cudnn
    for place in (cuda.conv, cuda.rnn, backends.cuda.matmul, cpu.conv, cpu.rnn, cpu.matmul):
        if place.fp32_precision != "ieee":
            place.fp32_precision = "ieee"


def hold_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold frozen parameters in `dtype` and trained ones in float32, in place; frozen layer norms read and write it.

    Adapters are float32 too: their frozen factor is saved. Other norms stay as they are, of the type of their
    statistics, and so do buffers.
    """
    whole: set[int] = set()
    for module in model.modules():
        frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if type(module) in (nn.LayerNorm, HalfLayerNorm):
            module.__class__ = HalfLayerNorm if frozen else nn.LayerNorm
        if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm) and type(module) is not HalfLayerNorm:
            whole.update(map(id, module.parameters(recurse=False)))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_floating_point():
            continue
        if parameter.requires_grad or ".lora_" in name:
            parameter.data = parameter.data.float()
        elif id(parameter) not in whole:
            parameter.data = parameter.data.to(dtype)


class HalfLayerNorm(nn.LayerNorm):
    """A frozen nn.LayerNorm that writes its weight's type; mean and variance are float32 either way.

    Autocast writes float32, which the next product rounds to the half type: the same values, at three times the memory
    traffic, and the rounded copies of queries', keys' and values' input are three.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As nn.LayerNorm's: of the input as it is, then in the weight's type."""
        weight, bias = self.weight, self.bias
        with torch.autocast(input.device.type, enabled=False):
            if weight is None or weight.dtype == input.dtype:
                return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
            wide = None if bias is None else bias.to(input.dtype)
            y = F.layer_norm(input, self.normalized_shape, weight.to(input.dtype), wide, self.eps)
            return y.to(weight.dtype)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Within it, parameters of half types are float32; afterwards they are what they were."""
    held = {p: p.data for p in model.parameters() if p.dtype in _HALF}
    try:
        for parameter, data in held.items():
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in held.items():
            parameter.data = data


def widened_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict whose half tensors are float32; tensors that shared memory still share it."""
    done: dict[tuple[object, ...], Tensor] = {}
    wide = {}
    for name, tensor in state.items():
        if tensor.dtype in _HALF:
            tensor = done.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), tensor.float())
        wide[name] = tensor
    return wide
