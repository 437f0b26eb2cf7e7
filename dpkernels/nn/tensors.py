"""Dtypes and shapes of layers' inputs: autocast's dtype, the dtype of sums, and any shape as [B,T,n]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import overload

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast would cast x for a matrix product, or None if it would not cast x."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


_NO_CHANGE = nullcontext()


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Disable autocast within the context, where the code chooses every dtype itself."""
    return (
        torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _NO_CHANGE
    )


@overload
def maybe_cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor: ...
@overload
def maybe_cast(tensor: None, dtype: torch.dtype | None) -> None: ...
@overload
def maybe_cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None: ...
def maybe_cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """`tensor` in `dtype`; a None tensor stays None, and a None dtype means no cast.

    The cast bypasses autocast's cache. That cache would return a cast without gradients to a later ordinary use of the
    same weight, which would then silently get no gradient.
    """
    # `to` also returns the tensor itself, at five times the cost of this check, which a step makes a thousand times.
    return tensor if tensor is None or dtype is None or tensor.dtype is dtype else tensor.to(dtype)


_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default  # looked up once: that takes as long as the call


def not_a_view(y: Tensor) -> Tensor:
    """`y` without autograd's view flag: autograd refuses `y *= mask` on a view that a custom function returns."""
    return _UNSAFE_VIEW(y, y.shape) if y._is_view() else y


def as_tokens(t: Tensor) -> Tensor:
    """[B,*,n] -> [B,T,n]; [B,n] has T = 1; [n] is one sample of one token."""
    if t.dim() == 3:
        return t
    if t.dim() == 1:
        return t.view(1, 1, -1)
    return t.unsqueeze(1) if t.dim() == 2 else t.flatten(1, -2)


def batch_first(axis: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with the batch moved from `axis` (0 or 1, from `Tape.batch_axis`) to the front."""
    return tensors if axis == 0 else tuple(t.transpose(0, axis) for t in tensors)


def as_rows(t: Tensor) -> Tensor:
    """[*, n] -> [N, n], with sizes of 0 allowed anywhere."""
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """float64 for float64, float32 for all narrower dtypes."""
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
    """The tensors in the narrowest dtype that holds all of them exactly (the ops take one dtype per call)."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def sum_up(parts: Sequence[Tensor]) -> Tensor:
    """Σ of [B] float32 upper bounds, as an upper bound: added in float64, then rounded up to float32."""
    total = torch.stack([part.double() for part in parts]).sum(0) * (1 + len(parts) * 2.0**-52)
    rounded = total.float()
    above = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    return torch.where(rounded.double() < total, above, rounded)


def cat_time(*tensors: Tensor) -> Tensor:
    """[B,T1,n], [B,T2,n], ... -> [B,ΣT,n] in their common dtype."""
    return torch.cat(common_dtype(*tensors), 1)


def factors_within(factors: Tensor, before: Tensor, again: Tensor) -> Tensor:
    """Factors f with f·√again <= factors·√before, and f <= factors; exactly `factors` where again <= before.

    factors: [B] float32. before, again: [B] float64, squared norms. [B] float32. 0 where `again` is not finite.
    """
    # Division, root and product together lose less than 2⁻⁵⁰. The result is rounded down to float32, also subnormals.
    reduced = factors.double() * (before / again).sqrt() * (1 - 2.0**-50)
    exact = torch.where(again.isfinite(), reduced, 0.0)
    nearest = exact.float()
    capped = torch.where(nearest > exact, nearest.nextafter(torch.zeros_like(nearest)), nearest)
    return torch.where(again <= before, factors, torch.minimum(capped, factors))
