"""What tensors take while code runs: bytes that are alive, and their peak, without a GPU or the memory itself.

`LiveMemory` watches every operation, also those in a backward and in autograd functions of one's own, and counts a
storage from the operation that returned it until nothing holds it. In `rehearsal()` tensors are fake: they have shapes,
dtypes and lifetimes but no data, so that a step of a 608.8 M-parameter model is rehearsed in seconds on a laptop.

What is not seen: memory that a kernel takes and gives back within one operation.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Target = Literal["cpu", "cuda"]

# torch's CUDA allocator, in bytes: every tensor is rounded up to a multiple of the first; from the second on, memory
# comes from CUDA in multiples of the third, and what is left over is not cut off where it is at most the fourth.
_BLOCK, _LARGE, _SEGMENT, _NOT_CUT = 512, 10 * 2**20, 2 * 2**20, 2**20
# What autocast computes in float32 on CUDA and not on a CPU, of what the models here do to large tensors.
_CUDA_FLOAT32 = {F.layer_norm, torch.softmax, Tensor.softmax, torch.log_softmax, Tensor.log_softmax}
_ATTENTION_ALIGNMENT = 8  # entries: the fused attention of CUDA pads the last axis of its mask to a multiple


def cuda_size(nbytes: int) -> int:
    """What torch's CUDA allocator counts as allocated for a tensor of so many bytes, in a block that CUDA just gave."""
    block = -(-nbytes // _BLOCK) * _BLOCK
    segment = -(-block // _SEGMENT) * _SEGMENT
    return segment if block >= _LARGE and segment - block <= _NOT_CUT else block


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors made within it that are still alive, and their highest sum.

    A storage counts once, however many views share it. What existed before does not count, until `count` is told of it.

    Args:
        size_of: bytes of a storage -> bytes that count for it, as `cuda_size`; None: as they are.

    Attributes:
        live: bytes alive now.
        peak: their maximum since the beginning, or since `restart`.
    """

    def __init__(self, size_of: Callable[[int], int] | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._size_of = size_of or int
        self._counted: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and count what it returned."""
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and not self._knows(t)]
        if made:
            given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for tensor in made:
                if id(tensor.untyped_storage()) not in given:
                    self.count(tensor)
        return result

    def _knows(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        known = self._counted.get(id(storage))
        return known is not None and known() is storage

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is not counted yet, until it is freed."""
        if self._knows(tensor):
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        size = self._size_of(storage.nbytes())

        def freed(_: Any) -> None:
            self.live -= size
            del self._counted[key]

        self._counted[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def restart(self) -> None:
        """Begin the peak anew, from what is alive now."""
        self.peak = self.live


@contextmanager
def rehearsal(target: Target) -> Iterator[FakeTensorMode]:
    """Within it every tensor is fake. All of them say that they are on the CPU, whatever the target.

    Args:
        target: "cuda": attention as CUDA's fused kernels hold memory; "cpu": as on a CPU.
    """
    with ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(Valueless(target))
        yield mode


def hollow(model: nn.Module) -> nn.Module:
    """A copy of the model with fake parameters and buffers; call it within `rehearsal()`. The model stays as it is.

    Parameters on the meta device will do: neither their values nor their memory is needed.
    """
    made: dict[int, Any] = {}
    plain = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    for tensor in [*model.parameters(), *model.buffers(), *plain]:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        made[id(tensor)] = fake
    return copy.deepcopy(model, made)


class Valueless(TorchFunctionMode):
    """Gives code that asks fake tensors for values something to go on with, without changing what it allocates.

    A number read from a tensor is 0, a truth value is False; addresses are made up, and tell tensors apart as real
    ones do. CTC is stood in for by `_CTC`, and for CUDA, attention by the kernel that it uses there for masks and
    float32 (the one for half precision without a mask holds as much), and dropout by one that keeps a byte an entry.

    Tensors say that they are on the CPU, so autocast is the CPU's; what CUDA's computes in float32 is so here too.

    `rehearsal` enters it. torch takes it off for the time of a backward: forwards that run within one (checkpointing)
    need it anew.
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
    """torch's CTC, as far as memory goes: log α, [B, T, 2L + 1], is saved, and log β as large made in the backward."""

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
