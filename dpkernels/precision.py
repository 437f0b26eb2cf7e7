"""Mixed precision: matrix products and frozen weights in a half type, trained parameters and sums in float32.

Autocast computes products in the half type, and softmaxes, losses and trained norms in float32. `hold_frozen` converts
frozen parameters to the half type. Trained parameters are float32, so that an update smaller than the half type's
resolution is not lost.
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
    """The context of a forward: autocast to a half `dtype`, or no autocast for float32."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def no_tf32() -> None:
    """Switch off TF32 in this process: float32 products keep 24 bits, not 11 (torch's default for convolutions).

    The rounding bounds of docs/privacy.md and the self-check's tolerance hold for float32.
    """
    backends: Any = torch.backends
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False
    if not hasattr(backends, "fp32_precision"):  # before torch 2.9
        return
    # Settings of "none" follow this one. The others are set only if they differ: once they have been set separately,
    # torch refuses to read the older switches, which transformers reads.
    backends.fp32_precision = "ieee"
    cpu, cuda = backends.mkldnn, backends.cudnn
    for place in (cuda.conv, cuda.rnn, backends.cuda.matmul, cpu.conv, cpu.rnn, cpu.matmul):
        if place.fp32_precision != "ieee":
            place.fp32_precision = "ieee"


def hold_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert frozen parameters to `dtype` and trained ones to float32, in place; frozen layer norms work in `dtype`.

    Adapters are float32 too, since their frozen factor is saved. Other norms keep the dtype of their statistics, and
    buffers keep their dtype.
    """
    unchanged: set[int] = set()
    for module in model.modules():
        frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if type(module) in (nn.LayerNorm, HalfLayerNorm):
            module.__class__ = HalfLayerNorm if frozen else nn.LayerNorm
        if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm) and type(module) is not HalfLayerNorm:
            unchanged.update(map(id, module.parameters(recurse=False)))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_floating_point():
            continue
        if parameter.requires_grad or ".lora_" in name:
            parameter.data = parameter.data.float()
        elif id(parameter) not in unchanged:
            parameter.data = parameter.data.to(dtype)


class HalfLayerNorm(nn.LayerNorm):
    """A frozen nn.LayerNorm with outputs in its weight's dtype; mean and variance are computed in float32.

    Autocast would write float32, which the next product rounds to the half type. The values are the same, but the
    memory traffic is three times as large, and the inputs of queries, keys and values are three rounded copies.
    """

    def forward(self, input: Tensor) -> Tensor:
        """nn.LayerNorm's result for the unrounded input, converted to the weight's dtype."""
        weight, bias = self.weight, self.bias
        with torch.autocast(input.device.type, enabled=False):
            if weight is None or weight.dtype == input.dtype:
                return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
            wide = None if bias is None else bias.to(input.dtype)
            y = F.layer_norm(input, self.normalized_shape, weight.to(input.dtype), wide, self.eps)
            return y.to(weight.dtype)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Within it, parameters of half types are float32; on exit the original data is restored."""
    half = {p: p.data for p in model.parameters() if p.dtype in _HALF}
    try:
        for parameter, data in half.items():
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in half.items():
            parameter.data = data


def widened_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict with half tensors converted to float32; tensors that shared memory still share it."""
    done: dict[tuple[object, ...], Tensor] = {}
    wide = {}
    for name, tensor in state.items():
        if tensor.dtype in _HALF:
            tensor = done.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), tensor.float())
        wide[name] = tensor
    return wide
