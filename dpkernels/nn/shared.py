"""SharedTensor: a tensor that all examples share, held once per example so that each keeps its own gradient.

A raw parameter, or an embedding looked up at ids without a batch, is one tensor for the whole batch. Autograd would add
up what the examples contribute to its gradient. Here it is [n, *shape], an expanded view of n equal rows, and
operations act row by row: under `torch.vmap` where only shared tensors and constants meet (the result is shared again),
and example with example where it meets a tensor that carries the batch (the result is an ordinary tensor). As the rows
are equal, the values are those of the plain model.

    p.sigmoid(), p @ p.T, p[ids], p.repeat(B, 1, 1)         shared
    x + p, F.linear(x, p), torch.cat((p.expand(B, -1, -1), x), 1)   ordinary, row i of p with example i

Which tensors carry the batch is `BatchAxes`' to say, not a size's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dpkernels.nn.batch_axis import BatchAxes, Site


class SharedTensor:
    """Stands for a tensor of `shape` that examples share.

    Args:
        rows: [n, *shape], row i for example i; all rows have the same values.
        name: for messages: the parameter, or the layer that made it.
        axes: what is known of the model's tensors.

    Whatever torch does with tensors works, or raises NotImplementedError naming `name`: writing in place, what mixes
    the batch, and what gives another shape than with the plain tensor.
    """

    def __init__(self, rows: Tensor, name: str, axes: BatchAxes) -> None:
        self.rows, self.name, self._axes = rows, name, axes

    @property
    def shape(self) -> torch.Size:
        """The shared tensor's own shape."""
        return self.rows.shape[1:]

    @property
    def ndim(self) -> int:
        """Number of dimensions of the shared tensor."""
        return self.rows.dim() - 1

    def dim(self) -> int:
        """As Tensor.dim."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """As Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """As Tensor.numel."""
        return self.shape.numel()

    def value(self) -> Tensor:
        """The plain tensor, cut off from gradients."""
        return self.rows[0].detach()

    def detach(self) -> Tensor:
        """As Tensor.detach: an ordinary tensor, since no example's gradient comes through it."""
        return self.value()

    data = property(value)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return iter(_apply(torch.unbind, (self,), {}))

    def __bool__(self) -> bool:
        return bool(self.value())

    def __float__(self) -> float:
        return float(self.value())

    def __int__(self) -> int:
        return int(self.value())

    def __repr__(self) -> str:
        return f"SharedTensor({self.name}, shape={tuple(self.shape)}, dtype={self.rows.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedTensor:
        raise self._refuse("a copy")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(
                f"{type(self).__name__} (of {self.__dict__.get('name')}) has no attribute {name!r}"
            )
        if name in _OF_THE_VALUE:
            return getattr(self.value(), name)
        member = getattr(Tensor, name)
        if not callable(member):
            if name in _VIEWS:
                return _apply(_VIEWS[name], (self,), {})
            return getattr(self.rows, name)
        return lambda *args, **kwargs: _apply(member, (self, *args), kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called when a torch function, or a tensor's operator or method, meets a SharedTensor."""
        return _apply(func, args, kwargs or {})

    def through(self, layer: Callable[[Tensor], Any], label: str) -> Any:
        """`layer(self)` for a layer that takes its input's first dimension for the batch and keeps it."""
        site = Site(label, "its input, which examples share,", self._axes.next_call(label))
        axis = self._axes.of(site, self.shape, len(self.rows))
        if axis is not None:
            return layer(self.aligned(self.ndim, axis))
        if self.shape[:1] == (1,):
            return tree_map(lambda y: self._again(y.unsqueeze(1)), layer(self.rows.squeeze(1)))
        return tree_map(self._again, layer(self.rows))

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
            raise self._refuse(f"broadcasting {tuple(self.shape)} against a batch of {n}")
        rows = rows.movedim(0, own)
        return rows.reshape(*[1] * (ndim - self.ndim), *rows.shape)

    def _again(self, rows: Tensor) -> SharedTensor:
        return SharedTensor(rows, self.name, self._axes)

    def _refuse(self, use: str) -> NotImplementedError:
        return NotImplementedError(
            f"{self.name}: {use} of a parameter that examples share is not supported, since it does not say which part "
            "of its gradient is which example's. View it as [1, ...] and broadcast it, or freeze it "
            "(requires_grad_(False))"
        )


# Attributes that depend on values only: of the plain tensor.
_OF_THE_VALUE = frozenset(
    {"item", "tolist", "numpy", "cpu_value", "is_floating_point", "is_complex", "element_size"}
)
_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "T": lambda t: t.t() if t.dim() == 2 else t.permute(*range(t.dim())[::-1]),
    "mT": lambda t: t.transpose(-2, -1),
    "H": lambda t: t.mH,
    "mH": lambda t: t.transpose(-2, -1).conj(),
}


def _method(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def method(self: SharedTensor, *args: Any) -> Any:
        return _apply(function, (self, *args), {})

    return method


_OPERATORS = """
    add radd sub rsub mul rmul truediv rtruediv floordiv mod pow rpow matmul rmatmul neg pos abs invert getitem eq ne lt
    le gt ge and or xor
"""
for _name in _OPERATORS.strip().split():
    if hasattr(Tensor, f"__{_name}__"):
        setattr(SharedTensor, f"__{_name}__", _method(f"__{_name}__"))
SharedTensor.__hash__ = object.__hash__  # type: ignore[method-assign] # __eq__ is elementwise, as Tensor's


def _apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs), some of whose tensors are shared."""
    leaves, spec = tree_flatten((args, kwargs))
    shared = [leaf for leaf in leaves if isinstance(leaf, SharedTensor)]
    first = shared[0]
    n = len(first.rows)
    name = getattr(func, "__name__", str(func))
    if any(len(other.rows) != n for other in shared):
        raise first._refuse(f"{name} with a tensor of another batch size")
    if first.rows.requires_grad and not torch.is_grad_enabled() and _in_custom_function():
        raise first._refuse("a custom autograd.Function, through which its gradient would be lost,")
    if func in _METADATA:
        return func(
            *tree_unflatten([x.rows[0] if isinstance(x, SharedTensor) else x for x in leaves], spec)[0]
        )
    writes = (name.endswith("_") and not name.endswith("__")) or name in _WRITING
    if writes and isinstance(args[0], SharedTensor):
        raise first._refuse(f"{name}, which writes in place,")
    carried, new = _carried(first, name, leaves, n)
    if not carried:
        return _row_by_row(func, leaves, spec, first)
    if name == "__setitem__":
        return _written(args, carried, first)
    if func in _BROADCASTING or writes:
        return _with_batch(func, leaves, spec, carried)
    if func in _JOINING:
        return _joined(func, args, kwargs, carried, first)
    result = _example_by_example(func, leaves, spec, carried, first)
    if new:
        _check_value(func, leaves, spec, first, result)
    return result


def _in_custom_function() -> bool:
    """Whether the forward of a custom autograd.Function is running.

    `Function.apply` takes tensors alone for differentiable: given a SharedTensor it computes, without a graph, and its
    output is an ordinary tensor that no gradient comes through (SEW-D's softmax).
    """
    frame = sys._getframe(1)
    while frame is not None:
        if any(isinstance(value, torch._C._FunctionBase) for value in frame.f_locals.values()):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _carried(first: SharedTensor, name: str, leaves: Sequence[Any], n: int) -> tuple[dict[int, int], bool]:
    """Places of the ordinary tensors that carry the batch, each with its axis; whether this call was never seen."""
    ordinary = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not ordinary:
        return {}, False
    axes = first._axes
    call = axes.next_call(first.name)
    ordinary = [
        place for place in ordinary if not isinstance(leaves[place], nn.Parameter)
    ]  # never an example's
    sites = {place: Site(first.name, f"a tensor in {name} (argument {place})", call) for place in ordinary}
    new = not all(map(axes.knows, sites.values()))
    found = {place: axes.of(site, leaves[place].shape, n) for place, site in sites.items()}
    return {place: axis for place, axis in found.items() if axis is not None}, new


def _row_by_row(func: Any, leaves: Sequence[Any], spec: Any, first: SharedTensor) -> Any:
    """No example's own tensor is among them: the result is shared, too."""
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, SharedTensor)]
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
        raise first._refuse(f"{getattr(func, '__name__', func)} ({error})") from error
    out_spec, kept = others
    results = [first._again(next(outputs)) if other is None else other for other in kept]
    return tree_unflatten(results, out_spec)


def _with_batch(func: Any, leaves: Sequence[Any], spec: Any, carried: dict[int, int]) -> Any:
    """A broadcasting function: shared tensors are aligned with those that carry the batch, and it is called once."""
    ndim = max(leaf.ndim for leaf in leaves if isinstance(leaf, Tensor | SharedTensor))
    from_right = {leaves[place].dim() - axis for place, axis in carried.items()}
    shared = next(leaf for leaf in leaves if isinstance(leaf, SharedTensor))
    if len(from_right) > 1:
        raise shared._refuse(
            f"{getattr(func, '__name__', func)} of tensors whose batch is at different dimensions"
        )
    axis = ndim - from_right.pop()
    inputs = [leaf.aligned(ndim, axis) if isinstance(leaf, SharedTensor) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(inputs, spec)
    return func(*args, **kwargs)


def _written(args: tuple[Any, ...], carried: dict[int, int], first: SharedTensor) -> None:
    """x[mask] = p, with a boolean mask over the first dimensions of x."""
    x, mask, p = args
    plain = (
        isinstance(x, Tensor)
        and isinstance(mask, Tensor)
        and mask.dtype is torch.bool
        and isinstance(p, SharedTensor)
    )
    if not plain or p.ndim > x.dim() - mask.dim() or 0 not in carried:
        raise first._refuse("writing it by index")
    x.copy_(
        torch.where(mask.view(*mask.shape, *[1] * (x.dim() - mask.dim())), p.aligned(x.dim(), carried[0]), x)
    )


def _joined(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], carried: dict[int, int], first: SharedTensor
) -> Any:
    """torch.cat and torch.stack along another dimension than the batch."""
    axis = set(carried.values())
    parts = args[0] if args else kwargs["tensors"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    ndim = max(part.ndim for part in parts)
    dim = dim + ndim + (func is torch.stack) if dim < 0 else dim
    batch = axis.pop()
    if axis or (func is not torch.stack and dim == batch):
        raise first._refuse(f"{func.__name__} along the batch")
    joined = [part.aligned(ndim, batch) if isinstance(part, SharedTensor) else part for part in parts]
    return func(joined, dim)


def _example_by_example(
    func: Any, leaves: Sequence[Any], spec: Any, carried: dict[int, int], first: SharedTensor
) -> Any:
    """Any other function, of one example at a time: [1, ...] where the plain call has the batch."""
    name, n = getattr(func, "__name__", str(func)), len(first.rows)
    leaves = list(leaves)
    batch = next(iter(carried.values()))
    example = leaves[next(iter(carried))]
    for place, leaf in enumerate(leaves):  # expanded to the batch before, as p.expand(B, -1, -1)
        if isinstance(leaf, SharedTensor) and leaf.ndim == example.dim() and leaf.shape[batch] == n > 1:
            leaves[place] = leaf.aligned(leaf.ndim, batch)
            carried = carried | {place: batch}
    if not any(isinstance(leaf, SharedTensor) for leaf in leaves):
        args, kwargs = tree_unflatten(leaves, spec)
        return func(*args, **kwargs)
    places = [p for p, leaf in enumerate(leaves) if isinstance(leaf, SharedTensor) or p in carried]
    tensors = [leaves[p].rows if isinstance(leaves[p], SharedTensor) else leaves[p] for p in places]
    in_dims = [carried.get(p, 0) for p in places]

    def one(rows: Sequence[Tensor]) -> Any:
        inputs = list(leaves)
        for place, row in zip(places, rows, strict=True):
            inputs[place] = row.unsqueeze(carried[place]) if place in carried else row
        args, kwargs = tree_unflatten(inputs, spec)
        return func(*args, **kwargs)

    try:
        out = torch.vmap(one, in_dims=(in_dims,), randomness="different")(tensors)
        expected = _plain_shape(func, leaves, spec)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
        raise first._refuse(f"{name} ({error})") from error
    if not isinstance(out, Tensor):
        raise first._refuse(f"{name}, which gives several tensors,")
    for axis in [batch, *range(out.dim() - 1)]:
        if out.dim() - 1 > axis and out.shape[axis + 1] == 1:
            moved = out.squeeze(axis + 1).movedim(0, axis)
            if moved.shape == expected:
                return moved
    raise first._refuse(
        f"{name}, which gives {tuple(out.shape[1:])} an example and {tuple(expected)} for the batch,"
    )


@torch.no_grad()
def _check_value(func: Any, leaves: Sequence[Any], spec: Any, first: SharedTensor, result: Tensor) -> None:
    """Raise where one example at a time does not give what the plain call gives: it mixes the batch."""
    args, kwargs = tree_unflatten([x.value() if isinstance(x, SharedTensor) else x for x in leaves], spec)
    plain = func(*args, **kwargs)
    error = (result.double() - plain.double()).abs().max() if plain.numel() else 0
    if not error <= 0.05 * plain.double().abs().max():
        raise first._refuse(
            f"{getattr(func, '__name__', func)}, in which an example's result depends on the others,"
        )


def _plain_shape(func: Any, leaves: Sequence[Any], spec: Any) -> torch.Size:
    """The shape that the plain model's call gives."""
    inputs = [
        torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        if isinstance(leaf, Tensor | SharedTensor)
        else leaf
        for leaf in leaves
    ]
    args, kwargs = tree_unflatten(inputs, spec)
    shape: torch.Size = func(*args, **kwargs).shape
    return shape


_METADATA = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, torch.numel, torch.is_floating_point}
_WRITING = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
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
