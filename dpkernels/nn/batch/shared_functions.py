"""torch's functions on SharedTensors: row by row, or row i with example i. See `dpkernels.nn.batch.shared`."""

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
    """Base of SharedTensor with the parts that torch's functions use: see `dpkernels.nn.batch.shared`."""

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
        """The plain tensor, detached."""
        return self.rows[0].detach()

    def aligned(self, ndim: int, axis: int) -> Tensor:
        """An ordinary tensor of `ndim` dimensions, broadcastable as self is, with the batch at `axis`.

        If self has a dimension there, its size is 1 or the batch's: example i takes index i of row i.
        """
        n, dim = len(self.rows), axis - (ndim - self.ndim)
        if dim < 0:
            return self.rows.reshape(*[1] * axis, n, *[1] * (ndim - self.ndim - axis - 1), *self.shape)
        if self.shape[dim] == 1:
            rows = self.rows.squeeze(dim + 1)
        elif self.shape[dim] == n:
            rows = self.rows.diagonal(dim1=0, dim2=dim + 1).movedim(-1, 0)
        else:
            raise self.refuse(f"broadcasting {tuple(self.shape)} against a batch of {n}")
        rows = rows.movedim(0, dim)
        return rows.reshape(*[1] * (ndim - self.ndim), *rows.shape)

    def with_rows(self, rows: Tensor) -> Shared:
        """A shared tensor with these rows, and with the name and axes of this one."""
        return type(self)(rows, self.name, self.axes)

    def refuse(self, use: str) -> NotImplementedError:
        """The error for a use in which the gradient cannot be assigned to single examples."""
        return NotImplementedError(
            f"{self.name!r}: {use} of a parameter that examples share is not supported, since the parts of its "
            "gradient cannot be assigned to the examples. View it as [1, ...] and broadcast it, or freeze it "
            "(requires_grad_(False))"
        )


@torch.compiler.disable(reason="what examples share is told apart outside of the compiled graph")
def apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs), where some of the tensors are shared."""
    leaves, spec = tree_flatten((args, kwargs))
    shared = [leaf for leaf in leaves if isinstance(leaf, Shared)]
    if not shared:
        raise NotImplementedError(
            f"{func}: an argument contains a shared tensor in a container that cannot be searched; pass it directly"
        )
    first = shared[0]
    n = len(first.rows)
    name = getattr(func, "__name__", str(func))
    if any(len(other.rows) != n for other in shared):
        raise first.refuse(f"{name} with a tensor of another batch size")
    if func in _METADATA:
        return func(*tree_unflatten([x.rows[0] if isinstance(x, Shared) else x for x in leaves], spec)[0])
    if func in _CASTS and isinstance(args[0], Shared) and len(args) > 1 and isinstance(args[1], Tensor):
        return first.with_rows(first.rows.to(args[1]))
    _check_grad_mode(first)
    writes = (name.endswith("_") and not name.endswith("__")) or name in _WRITING
    if writes and (isinstance(args[0], Shared) or name not in _WRITING_BROADCAST):
        raise first.refuse(f"{name}, which writes in place,")
    carried, site = _batch_axes(first, name, leaves, n)
    if not carried:
        return _row_by_row(func, leaves, spec, first)
    if name == "__setitem__":
        return _write_by_mask(args, carried, first)
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

    `Function.apply` treats only tensors as differentiable. With a SharedTensor it computes without a graph, and no
    gradient flows through its output, an ordinary tensor (SEW-D's softmax).
    """
    if torch.is_grad_enabled() or not first.rows.requires_grad:
        return
    frame = sys._getframe()
    while frame is not None:
        if any(isinstance(value, torch._C._FunctionBase) for value in frame.f_locals.values()):
            raise first.refuse("a custom autograd.Function, through which its gradient would be lost,")
        frame = frame.f_back  # type: ignore[assignment]


def _batch_axes(first: Shared, name: str, leaves: Sequence[Any], n: int) -> tuple[dict[int, int], Site]:
    """The places of the ordinary tensors that carry the batch, each with its axis, and the site of the call."""
    axes = first.axes
    carried: dict[int, int] = {}
    tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    call = axes.next_call(first.name) if tensors else 0
    for place in tensors:
        leaf = leaves[place]
        if not isinstance(leaf, nn.Parameter):  # a parameter never carries the batch
            axis = axes.of(Site(first.name, f"a tensor in {name} (argument {place})", call), leaf.shape, n)
            carried |= {} if axis is None else {place: axis}
    return carried, Site(first.name, name, call)


def _expanded_to_batch(leaves: Sequence[Any], carried: dict[int, int], site: Site, n: int) -> dict[int, int]:
    """The places of shared tensors that were expanded to the batch, as p.expand(B, -1, -1), each with its axis.

    The number of rows alone does not show it: a parameter [K, d] may have K = B.
    """
    batch = next(iter(carried.values()))
    ndim = leaves[next(iter(carried))].dim()
    expanded: dict[int, int] = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Shared) and leaf.ndim == ndim:
            argument = f"the shared tensor in {site.argument} (argument {place})"
            axis = leaf.axes.of(Site(site.layer, argument, site.call), leaf.shape, n)
            expanded |= {place: axis} if axis == batch else {}
    return expanded


def _row_by_row(func: Any, leaves: Sequence[Any], spec: Any, first: Shared) -> Any:
    """Call a function of shared tensors and constants only, whose result is shared, too."""
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Shared)]
    others: list[Any] = []

    def of_row(rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        inputs = list(leaves)
        for place, row in zip(places, rows, strict=True):
            inputs[place] = row
        args, kwargs = tree_unflatten(inputs, spec)
        results, out_spec = tree_flatten(func(*args, **kwargs))
        others[:] = [out_spec, [None if isinstance(r, Tensor) else r for r in results]]
        return tuple(r for r in results if isinstance(r, Tensor))

    try:
        # A shared tensor has one mask for all examples, as in the plain model.
        outputs = iter(torch.vmap(of_row, randomness="same")([leaves[place].rows for place in places]))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
        raise first.refuse(f"{getattr(func, '__name__', func)} ({error})") from error
    out_spec, kept = others
    results = [first.with_rows(next(outputs)) if other is None else other for other in kept]
    return tree_unflatten(results, out_spec)


def _with_batch(func: Any, leaves: Sequence[Any], spec: Any, carried: dict[int, int]) -> Any:
    """Call a broadcasting function once, with the shared tensors aligned with those that carry the batch."""
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


def _write_by_mask(args: tuple[Any, ...], carried: dict[int, int], first: Shared) -> None:
    """x[mask] = p, with a boolean mask over the first dimensions of x."""
    x, mask, p = args
    plain = (
        isinstance(x, Tensor)
        and isinstance(mask, Tensor)
        and mask.dtype is torch.bool
        and isinstance(p, Shared)
    )
    if not plain or p.ndim > x.dim() - mask.dim() or 0 not in carried:
        raise first.refuse("writing by index")
    x.copy_(
        torch.where(mask.view(*mask.shape, *[1] * (x.dim() - mask.dim())), p.aligned(x.dim(), carried[0]), x)
    )


def _joined(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], carried: dict[int, int], first: Shared
) -> Any:
    """Call torch.cat or torch.stack along another dimension than the batch."""
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
    """Call any other function for each example under torch.vmap, with [1, ...] where the plain call has the batch."""
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

    def of_example(rows: Sequence[Tensor]) -> Any:
        inputs = list(leaves)
        for place, row in zip(places, rows, strict=True):
            inputs[place] = row.unsqueeze(carried[place]) if place in carried else row
        args, kwargs = tree_unflatten(inputs, spec)
        return func(*args, **kwargs)

    try:
        out = torch.vmap(of_example, in_dims=(in_dims,), randomness="different")(tensors)
        expected = _plain_shape(func, leaves, spec) if isinstance(out, Tensor) else torch.Size()
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
        raise first.refuse(f"{name} ({error})") from error
    if not isinstance(out, Tensor):
        raise first.refuse(f"{name}, which returns several tensors,")
    for axis in [batch, *range(out.dim() - 1)]:
        if out.dim() - 1 > axis and out.shape[axis + 1] == 1:
            moved = out.squeeze(axis + 1).movedim(0, axis)
            if moved.shape == expected:
                return moved
    raise first.refuse(
        f"{name}, whose result has shape {tuple(out.shape[1:])} for an example and {tuple(expected)} for the batch,"
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
    """Raise if the results for single examples differ from the plain call, which then mixes the batch.

    The comparison uses other values in the shared tensors, since values that start at 0 would hide a difference.
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
            f"{getattr(func, '__name__', func)}, in which the result of an example depends on the others,"
        )


def _with_other_values(shared: Shared) -> Shared:
    value = shared.value()
    if not value.is_floating_point():
        return shared
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
    other = value + noise * (value.abs().mean() + 0.1)
    return shared.with_rows(other.expand(len(shared.rows), *value.shape))


def _plain_shape(func: Any, leaves: Sequence[Any], spec: Any) -> torch.Size:
    """The shape of the plain model's result."""
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
