"""Dtypes and shapes of what layers are given: autocast's dtype, the dtype of sums, and [B,T,n] of any shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import overload

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast would cast x for a matrix product, or None when it would not."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


_AS_IT_IS = nullcontext()


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off: inside, every dtype is already chosen."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _AS_IT_IS


@overload
def maybe_cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor: ...
@overload
def maybe_cast(tensor: None, dtype: torch.dtype | None) -> None: ...
@overload
def maybe_cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None: ...
def maybe_cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """`tensor` in `dtype`; None stays None, and a None dtype means: as it is.

    Explicitly rather than through autocast's own cache: a cast made without gradients would be handed by that
    cache to a later ordinary use of the same weight, which would then get no gradient and say nothing.
    """
    # `to` would hand back the tensor itself, at five times the cost of asking: a step asks a thousand times.
    return tensor if tensor is None or dtype is None or tensor.dtype is dtype else tensor.to(dtype)


def not_a_view(y: Tensor) -> Tensor:
    """`y` without the mark of a view: autograd refuses `y *= mask` on a custom function's view."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def as_tokens(t: Tensor) -> Tensor:
    """[B,*,n] -> [B,T,n]; [B,n] is T = 1; a lone [n] is one sample of one token."""
    if t.dim() == 3:
        return t
    if t.dim() == 1:
        return t.view(1, 1, -1)
    return t.unsqueeze(1) if t.dim() == 2 else t.flatten(1, -2)


def batch_first(axis: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with the batch, at `axis`, in front: `Tape.batch_axis` has found where it is."""
    return tensors if axis == 0 else tuple(t.transpose(0, axis) for t in tensors)


def as_rows(t: Tensor) -> Tensor:
    """[*, n] -> [N, n], with sizes of 0 allowed anywhere."""
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """float32 for the narrow types, float64 stays float64."""
    return torch.float64 if t.dtype is torch.float64 else torch.float32


def sum_over_time(g: Tensor) -> Tensor:
    """[B,*,n] -> [B,n], accumulated in float32 (float64 for float64)."""
    tokens = as_tokens(g)
    return tokens.sum(1, dtype=accumulation_dtype(tokens))


def per_sample_product(g: Tensor, x: Tensor) -> Tensor:
    """g_iᵀ x_i of g [B,T,p] and x [B,T,d]: [B,p,d], accumulated in float32 (float64 for float64)."""
    x, g = common_dtype(x, g)
    dtype = accumulation_dtype(x)
    with no_autocast(x.device.type):
        return torch.bmm(g.transpose(1, 2).to(dtype), x.to(dtype))


def common_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the narrowest dtype that holds all of them exactly (the ops want one dtype a call)."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def sum_up(parts: Sequence[Tensor]) -> Tensor:
    """Σ of [B] float32 upper bounds, itself an upper bound: in float64, then rounded up to float32."""
    total = torch.stack([part.double() for part in parts]).sum(0) * (1 + len(parts) * 2.0**-52)
    rounded = total.float()
    above = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    return torch.where(rounded.double() < total, above, rounded)


def cat_time(*tensors: Tensor) -> Tensor:
    """[B,T1,n], [B,T2,n], ... -> [B,ΣT,n] in their common dtype."""
    return torch.cat(common_dtype(*tensors), 1)
