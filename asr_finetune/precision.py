"""Mixed precision: matrix products and frozen weights in a half type, what is trained and summed in float32.

`model.dtype` names the half type. Products are taken in it by autocast, which also keeps softmaxes, losses and trained
norms in float32. What a run does not train is held in it once a method has said what that is (`hold_frozen`); what it
trains is float32, so that an update smaller than a step of the half type is not lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HALF = (torch.bfloat16, torch.float16)


def arithmetic(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Where a forward runs: autocast to a half `dtype`, or the weights' own type for float32."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def no_tf32() -> None:
    """For the process: a GPU's float32 products keep 24 bits, not TF32's 11, which torch's default for convolutions is.

    What docs/privacy.md says of rounding in float32, and the self-check's tolerance, are of float32.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def hold_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold frozen parameters in `dtype`, in place, and let frozen layer norms read and write it.

    Not of batch norms, whose statistics stay float32 and whose parameters must have their type. Trained parameters and
    buffers stay as they are.
    """
    kept = {id(parameter) for norm in _batch_norms(model) for parameter in norm.parameters(recurse=False)}
    for parameter in model.parameters():
        if not parameter.requires_grad and id(parameter) not in kept and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if type(module) is nn.LayerNorm and not any(p.requires_grad for p in module.parameters()):
            module.__class__ = HalfLayerNorm


class HalfLayerNorm(nn.LayerNorm):
    """A frozen nn.LayerNorm that reads and writes its weight's type; mean and variance are float32 either way.

    Autocast writes float32, which the next product rounds to the half type: the same values, at three times the memory
    traffic, and the rounded copies of queries', keys' and values' input are three.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As nn.LayerNorm's, in the weight's type."""
        dtype = input.dtype if self.weight is None else self.weight.dtype
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input.to(dtype), self.normalized_shape, self.weight, self.bias, self.eps)


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
    done: dict[tuple[int, torch.Size], Tensor] = {}
    wide = {}
    for name, tensor in state.items():
        if tensor.dtype in _HALF:
            tensor = done.setdefault((tensor.data_ptr(), tensor.shape), tensor.float())
        wide[name] = tensor
    return wide


def _batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, _BatchNorm))
