"""torch's functions on SharedTensors: row by row, or example with example. See `dpkernels.nn.batch.shared`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpkernels.nn.batch.batch_axis import BatchAxes, Site, has_values


class Shared:
    """What torch's functions need of a SharedTensor: see `dpkernels.nn.batch.shared`."""

    def __init__(self, rows: Tensor, name: str, axes: BatchAxes) -> None:
        self.rows, self.name, self.axes = rows, name, axes

    @property
    def shape(self) -> torch.Size:
        """The shared tensor's own shape."""
        return self.rows.shape[1:]

    @property
    def ndim(self) -> int:
        """Number of dimensions of the shared tensor."""
        return self.rows.dim() - 1

    @property
    def dtype(self) -> torch.dtype:
        """The shared tensor's dtype."""
        return self.rows.dtype

    def value(self) -> Tensor:
        """The plain tensor, cut off from gradients."""
        return self.rows[0].detach()

    def aligned(self, ndim: int, axis: int) -> Tensor:
        """An ordinary tensor of `ndim` dimensions, broadcastable as self is, with the batch at `axis`.

        self's own dimension there, if it has one, is 1, or the batch: example i takes index i of row i.
        """
        n, own = len(self.rows), axis - (ndim - self.ndim)
        if own < 0:
            return self.rows.reshape(*[1] * axis, n, *[1] * (ndim - self.ndim - axis - 1), *self.shape)
        if self.shape[own] == 1:
            rows = self.rows.squeeze(own + 1)
        elif self.shape[own] == n:
            rows = self.rows.diagonal(dim1=0, dim2=own + 1).movedim(-1, 0)
        else:
            raise self.refuse(f"broadcasting {tuple(self.shape)} against a batch of {n}")
        rows = rows.movedim(0, own)
        return rows.reshape(*[1] * (ndim - self.ndim), *rows.shape)

    def again(self, rows: Tensor) -> Shared:
        """Another shared tensor of the same origin."""
        return type(self)(rows, self.name, self.axes)

    def refuse(self, use: str) -> NotImplementedError:
        """The error for a use that does not say which example's gradient is which."""
        return NotImplementedError(
            f"{self.name!r}: {use} of a parameter that examples share is not supported, since it does not say which "
            "part of its gradient is which example's. View it as [1, ...] and broadcast it, or freeze it "
            "(requires_grad_(False))"
        )


def apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs), some of whose tensors are shared."""
    leaves, spec = tree_flatten((args, kwargs))
    shared = [leaf for leaf in leaves if isinstance(leaf, Shared)]
    if not shared:
        raise NotImplementedError(f"{func}: a tensor that examples share is hidden within an argument")
    first = shared[0]
    n = len(first.rows)
    name = getattr(func, "__name__", str(func))
    if any(len(other.rows) != n for other in shared):
        raise first.refuse(f"{name} with a tensor of another batch size")
    if func in _METADATA:
        return func(*tree_unflatten([x.rows[0] if isinstance(x, Shared) else x for x in leaves], spec)[0])
    if func in _CASTS and isinstance(args[0], Shared) and len(args) > 1 and isinstance(args[1], Tensor):
        return first.again(first.rows.to(args[1]))
    _check_grad_mode(first)
    writes = (name.endswith("_") and not name.endswith("__")) or name in _WRITING
    if writes and (isinstance(args[0], Shared) or name not in _WRITING_BROADCAST):
        raise first.refuse(f"{name}, which writes in place,")
    carried, site = _carried(first, name, leaves, n)
    if not carried:
        return _row_by_row(func, leaves, spec, first)
    if name == "__setitem__":
        return _written(args, carried, first)
    if func in _BROADCASTING or writes:
        return _with_batch(func, leaves, spec, carried)
    if func is F.scaled_dot_product_attention and not any(isinstance(leaf, Shared) for leaf in leaves[:3]):
        return _with_batch(func, leaves, spec, carried)  # a mask or bias over [B, H, T, S]
    if func in _JOINING:
        return _joined(func, args, kwargs, carried, first)
    expanded = _expanded_to_batch(leaves, carried, site, n)
    if first.axes.to_compare(site, n):
        _compare_values(func, leaves, spec, carried, expanded, first)
    if n > 1:
        first.axes.note_compared(site)
    return _example_by_example(func, leaves, spec, carried, expanded, first)


def _check_grad_mode(first: Shared) -> None:
    """Raise within the forward of a custom autograd.Function.

    `Function.apply` takes tensors alone for differentiable: given a SharedTensor it computes without a graph, and its
    output is an ordinary tensor through which no gradient comes (SEW-D's softmax).
    """
    if torch.is_grad_enabled() or not first.rows.requires_grad:
        return
    frame = sys._getframe()
    while frame is not None:
        if any(isinstance(value, torch._C._FunctionBase) for value in frame.f_locals.values()):
            raise first.refuse("a custom autograd.Function, through which its gradient would be lost,")
        frame = frame.f_back  # type: ignore[assignment]


def _carried(first: Shared, name: str, leaves: Sequence[Any], n: int) -> tuple[dict[int, int], Site]:
    """Places of the ordinary tensors that carry the batch, each with its axis; the call's own site."""
    axes = first.axes
    carried: dict[int, int] = {}
    tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    call = axes.next_call(first.name) if tensors else 0
    for place in tensors:
        leaf = leaves[place]
        if not isinstance(leaf, nn.Parameter):  # never an example's
            axis = axes.of(Site(first.name, f"a tensor in {name} (argument {place})", call), leaf.shape, n)
            carried |= {} if axis is None else {place: axis}
    return carried, Site(first.name, name, call)


def _expanded_to_batch(leaves: Sequence[Any], carried: dict[int, int], site: Site, n: int) -> dict[int, int]:
    """Places of shared tensors that were expanded to the batch before, as p.expand(B, -1, -1), each with its axis.

    That a parameter [K, d] has as many rows as there are examples says nothing: K may be B.
    """
    batch = next(iter(carried.values()))
    ndim = leaves[next(iter(carried))].dim()
    found: dict[int, int] = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Shared) and leaf.ndim == ndim:
            what = f"the shared tensor in {site.argument} (argument {place})"
            axis = leaf.axes.of(Site(site.layer, what, site.call), leaf.shape, n)
            found |= {place: axis} if axis == batch else {}
    return found


def _row_by_row(func: Any, leaves: Sequence[Any], spec: Any, first: Shared) -> Any:
    """No example's own tensor is among them: the result is shared, too."""
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Shared)]
    others: list[Any] = []

    def one(rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        inputs = list(leaves)
        for place, row in zip(places, rows, strict=True):
            inputs[place] = row
        args, kwargs = tree_unflatten(inputs, spec)
        results, out_spec = tree_flatten(func(*args, **kwargs))
        others[:] = [out_spec, [None if isinstance(r, Tensor) else r for r in results]]
        return tuple(r for r in results if isinstance(r, Tensor))

    try:
        # A shared tensor has one mask for all examples, as in the plain model.
        outputs = iter(torch.vmap(one, randomness="same")([leaves[place].rows for place in places]))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
        raise first.refuse(f"{getattr(func, '__name__', func)} ({error})") from error
    out_spec, kept = others
    results = [first.again(next(outputs)) if other is None else other for other in kept]
    return tree_unflatten(results, out_spec)


def _with_batch(func: Any, leaves: Sequence[Any], spec: Any, carried: dict[int, int]) -> Any:
    """A broadcasting function: shared tensors are aligned with those that carry the batch, and it is called once."""
    ndim = max(leaf.ndim for leaf in leaves if isinstance(leaf, Tensor | Shared))
    from_right = {leaves[place].dim() - axis for place, axis in carried.items()}
    shared = next(leaf for leaf in leaves if isinstance(leaf, Shared))
    if len(from_right) > 1:
        raise shared.refuse(
            f"{getattr(func, '__name__', func)} of tensors whose batch is at different dimensions"
        )
    axis = ndim - from_right.pop()
    inputs = [leaf.aligned(ndim, axis) if isinstance(leaf, Shared) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(inputs, spec)
    return func(*args, **kwargs)


def _written(args: tuple[Any, ...], carried: dict[int, int], first: Shared) -> None:
    """x[mask] = p, with a boolean mask over the first dimensions of x."""
    x, mask, p = args
    plain = (
        isinstance(x, Tensor)
        and isinstance(mask, Tensor)
        and mask.dtype is torch.bool
        and isinstance(p, Shared)
    )
    if not plain or p.ndim > x.dim() - mask.dim() or 0 not in carried:
        raise first.refuse("writing it by index")
    x.copy_(
        torch.where(mask.view(*mask.shape, *[1] * (x.dim() - mask.dim())), p.aligned(x.dim(), carried[0]), x)
    )


def _joined(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], carried: dict[int, int], first: Shared
) -> Any:
    """torch.cat and torch.stack along another dimension than the batch."""
    axis = set(carried.values())
    parts = args[0] if args else kwargs["tensors"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    ndim = max(part.ndim for part in parts)
    dim = dim + ndim + (func is torch.stack) if dim < 0 else dim
    batch = axis.pop()
    if axis or (func is not torch.stack and dim == batch):
        raise first.refuse(f"{func.__name__} along the batch")
    joined = [part.aligned(ndim, batch) if isinstance(part, Shared) else part for part in parts]
    return func(joined, dim)


def _example_by_example(
    func: Any,
    leaves: Sequence[Any],
    spec: Any,
    carried: dict[int, int],
    expanded: dict[int, int],
    first: Shared,
) -> Any:
    """Any other function, of one example at a time: [1, ...] where the plain call has the batch."""
    name, leaves = getattr(func, "__name__", str(func)), list(leaves)
    batch = next(iter(carried.values()))
    for place, axis in expanded.items():
        leaves[place] = leaves[place].aligned(leaves[place].ndim, axis)
    carried = carried | expanded
    if not any(isinstance(leaf, Shared) for leaf in leaves):
        args, kwargs = tree_unflatten(leaves, spec)
        return func(*args, **kwargs)
    places = [p for p, leaf in enumerate(leaves) if isinstance(leaf, Shared) or p in carried]
    tensors = [leaves[p].rows if isinstance(leaves[p], Shared) else leaves[p] for p in places]
    in_dims = [carried.get(p, 0) for p in places]

    def one(rows: Sequence[Tensor]) -> Any:
        inputs = list(leaves)
        for place, row in zip(places, rows, strict=True):
            inputs[place] = row.unsqueeze(carried[place]) if place in carried else row
        args, kwargs = tree_unflatten(inputs, spec)
        return func(*args, **kwargs)

    try:
        out = torch.vmap(one, in_dims=(in_dims,), randomness="different")(tensors)
        expected = _plain_shape(func, leaves, spec) if isinstance(out, Tensor) else torch.Size()
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
        raise first.refuse(f"{name} ({error})") from error
    if not isinstance(out, Tensor):
        raise first.refuse(f"{name}, which gives several tensors,")
    for axis in [batch, *range(out.dim() - 1)]:
        if out.dim() - 1 > axis and out.shape[axis + 1] == 1:
            moved = out.squeeze(axis + 1).movedim(0, axis)
            if moved.shape == expected:
                return moved
    raise first.refuse(
        f"{name}, which gives {tuple(out.shape[1:])} an example and {tuple(expected)} for the batch,"
    )


@torch.no_grad()
def _compare_values(
    func: Any,
    leaves: Sequence[Any],
    spec: Any,
    carried: dict[int, int],
    expanded: dict[int, int],
    first: Shared,
) -> None:
    """Raise where one example at a time does not give what the plain call gives: it mixes the batch.

    With other values in the shared tensors: those that start at 0 say nothing.
    """
    if not has_values(first.rows):
        return
    others = [_with_other_values(leaf) if isinstance(leaf, Shared) else leaf for leaf in leaves]
    result = _example_by_example(func, others, spec, carried, expanded, first)
    args, kwargs = tree_unflatten([x.value() if isinstance(x, Shared) else x for x in others], spec)
    plain = func(*args, **kwargs).double()
    finite = plain.isfinite()
    error = (result.double() - plain)[finite].abs().amax() if bool(finite.any()) else 0
    if not error <= 0.05 * plain[finite].abs().amax():
        raise first.refuse(
            f"{getattr(func, '__name__', func)}, in which an example's result depends on the others,"
        )


def _with_other_values(shared: Shared) -> Shared:
    value = shared.value()
    if not value.is_floating_point():
        return shared
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
    other = value + noise * (value.abs().mean() + 0.1)
    return shared.again(other.expand(len(shared.rows), *value.shape))


def _plain_shape(func: Any, leaves: Sequence[Any], spec: Any) -> torch.Size:
    """The shape that the plain model's call gives."""
    inputs = [
        torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        if isinstance(leaf, Tensor | Shared)
        else leaf
        for leaf in leaves
    ]
    args, kwargs = tree_unflatten(inputs, spec)
    shape: torch.Size = func(*args, **kwargs).shape
    return shape


_METADATA = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, torch.numel, torch.is_floating_point}
_WRITING = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
_WRITING_BROADCAST = _WRITING | {
    "add_",
    "sub_",
    "mul_",
    "div_",
    "copy_",
    "masked_fill_",
    "lerp_",
    "addcmul_",
    "pow_",
}
_CASTS = {Tensor.to, Tensor.type_as}
_JOINING = {torch.cat, torch.concat, torch.stack}
_BROADCASTING_NAMES = """
    add sub subtract mul multiply div divide true_divide pow maximum minimum fmax fmin where lerp addcmul addcdiv clamp
    clamp_min clamp_max atan2 hypot logaddexp xlogy eq ne lt le gt ge logical_and logical_or fmod remainder masked_fill
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__ rsub expand_as
"""
_BROADCASTING = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in _BROADCASTING_NAMES.strip().split()
    if hasattr(owner, name)
}
