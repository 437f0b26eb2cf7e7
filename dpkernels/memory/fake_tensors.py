"""Tensors with shapes, dtypes and lifetimes but no data: a step of a large model takes seconds on a laptop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

Target = Literal["cpu", "cuda"]

# What autocast computes in float32 on CUDA and not on a CPU, of what the models here do to large tensors.
_CUDA_FLOAT32 = {F.layer_norm, torch.softmax, Tensor.softmax, torch.log_softmax, Tensor.log_softmax}
_ATTENTION_ALIGNMENT = 8  # entries: the fused attention of CUDA pads the last axis of its mask to a multiple


@contextmanager
def fake_tensors(target: Target) -> Iterator[FakeTensorMode]:
    """Within it every tensor is fake. The device of each is the CPU, whatever the target.

    Args:
        target: "cuda": attention as CUDA's fused kernels hold memory; "cpu": as on a CPU.
    """
    with ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(FakeOps(target))
        yield mode


def fake_model(model: nn.Module) -> nn.Module:
    """A copy of the model with fake parameters and buffers; call it within `fake_tensors()`. The model is not changed.

    Parameters may be on the meta device, since neither their values nor their memory is needed.
    """
    fakes: dict[int, Any] = {}
    plain = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    for tensor in [*model.parameters(), *model.buffers(), *plain]:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        fakes[id(tensor)] = fake
    return copy.deepcopy(model, fakes)


class FakeOps(TorchFunctionMode):
    """Returns placeholder values to code that reads values of fake tensors, without a change of its allocations.

    A number read from a tensor is 0, and a truth value is False; addresses are artificial, and differ between tensors
    like real ones. `_CTC` replaces CTC. For CUDA, attention is the kernel for masks and float32 (the one for half
    precision without a mask needs as much memory), and dropout one that keeps a byte for each entry.

    Fake tensors are on the CPU, so autocast is that of the CPU; operations that CUDA's autocast computes in float32 are
    computed in float32 here too.

    `fake_tensors` enters this mode. torch leaves it during a backward: forwards within one (checkpointing) must enter
    it again.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self._target = target

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.__int__, Tensor.__index__):
            return 0
        if func is Tensor.__bool__:
            return False
        if func is Tensor.data_ptr:
            return _address(args[0])
        if func is F.ctc_loss:
            return _CTC.apply(args[0], args[1])
        if self._target == "cuda":
            if func is F.scaled_dot_product_attention:
                return _cuda_attention(*args, **kwargs)
            if func is F.dropout:
                return _cuda_dropout(*args, **kwargs)
            if func in _CUDA_FLOAT32 and torch.is_autocast_enabled("cpu"):
                args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


def _address(tensor: Tensor) -> int:
    within = int(tensor.storage_offset()) * tensor.element_size()
    return (id(tensor.untyped_storage()) << 40) + within  # no storage is as large as 2⁴⁰ bytes


class _CTC(torch.autograd.Function):
    """The memory of torch's CTC: the forward saves log α, [B, T, 2L + 1], and the backward makes an equal log β."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, labels: Tensor) -> Tensor:
        frames, batch, _ = log_probs.shape
        log_alpha = log_probs.new_empty(batch, frames, 2 * labels.shape[-1] + 1)
        ctx.save_for_backward(log_probs, log_alpha)
        return log_probs.new_empty(batch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_probs, log_alpha = ctx.saved_tensors
        log_beta = torch.empty_like(log_alpha)
        result = torch.empty_like(log_probs)
        del log_beta
        return result, None


def _cuda_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0 or inplace:
        return F.dropout(input, p, training, inplace)
    result: Tensor = torch.ops.aten.native_dropout(input, p, True)[0]
    return result


def _cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    batch, heads, queries, _width = query.shape
    keys = key.shape[2]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        lacking = -keys % _ATTENTION_ALIGNMENT
        if lacking:
            attn_mask = F.pad(attn_mask, (0, lacking))[..., :keys]
        attn_mask = attn_mask.expand(batch, heads, queries, keys)
    needs_gradient = any(t.requires_grad for t in (query, key, value))
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    result: Tensor = attention(
        query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]
    return result
