"""Small raw parameters by per-sample expansion: any parameter that is not a ghost layer's, if it is small.

The parameter p is used as [B, *p.shape], an expanded view; its gradient then comes out per sample,
B times the parameter, which is why only small ones are taken. Two ways:

- a module without children (a norm of someone's own, a gain, a small layer) runs sample by sample under
  `torch.vmap`, its parameters expanded;
- a module with children (Parakeet's attention with `bias_u`) finds a `PerSampleParameter` where it reads
  `self.bias_u`. That stands for the expanded tensor in the few uses where it is clear where the batch goes,
  and raises by name in all others.

Attached modules are re-classed to a subclass with properties, so that `named_parameters`, `state_dict` and
optimizers never see anything but the parameter itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dpkernels.nn.module import GhostModule, not_a_view
from dpkernels.nn.records import ExpandedRecord
from dpkernels.nn.tape import Tape

EXPANSION_LIMIT = 65_536
"""Largest parameter, in elements, that is expanded: its per-sample gradients take B times its size, in
float32 256 KiB a sample at most."""


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, batch_size: int, tape: Tape, name: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.parameter, ctx.tape, ctx.name = parameter, tape, name
        # A copy, and no view of it: an in-place use must not write to the parameter itself.
        copy = parameter.detach().clone()
        return not_a_view(copy.unsqueeze(0).expand(batch_size, *parameter.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[None, None, None, None]:
        if g is not None:
            ctx.tape.add(ExpandedRecord(ctx.name, ctx.parameter, g))
        return None, None, None, None


class ExpandingModule(GhostModule):
    """Mixin of the classes of `expanding_class`; `_ghost_substitutes` is what their properties hand out."""

    ghost_original: type[nn.Module]
    _ghost_substitutes: dict[str, Any] | None = None

    @contextmanager
    def _substituted(self, values: dict[str, Any]) -> Iterator[None]:
        before = self._ghost_substitutes
        self.__dict__["_ghost_substitutes"] = values
        try:
            yield
        finally:
            self.__dict__["_ghost_substitutes"] = before

    def _expanded_forward(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        assert isinstance(self, nn.Module)
        raw = {name: p for name in self.ghost_covers if (p := self._parameters.get(name)) is not None}
        if self._ghost_substitutes is not None or not self._ghost_active(*raw.values()):
            return forward(*args, **kwargs)
        tape = self.ghost_tape
        assert tape is not None
        batch_size = batch_size_of(args, kwargs)
        if batch_size is None:
            batch_size = tape.forward_batch_size
        if batch_size is None:
            raise RuntimeError(
                f"{self.ghost_label()}: its forward got no tensor, so the batch size is not known and its "
                "trained parameters cannot be expanded per sample; pass it a tensor whose first dimension is "
                "the batch, or freeze it"
            )
        names = {name: f"{self.ghost_label()}.{name}" for name in raw}
        expanded = {
            name: _Expand.apply(p, batch_size, tape, names[name])
            for name, p in raw.items()
            if p.requires_grad
        }
        if next(self.children(), None) is None:
            return self._sample_by_sample(forward, batch_size, raw | expanded, expanded.keys(), args, kwargs)
        shims = {name: PerSampleParameter(t, names[name]) for name, t in expanded.items()}
        with self._substituted({**raw, **shims}):
            return forward(*args, **kwargs)

    def _sample_by_sample(
        self,
        forward: Callable[..., Any],
        batch_size: int,
        values: dict[str, Tensor],
        expanded: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        batched = [isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == batch_size for x in leaves]

        def one(parameters: dict[str, Tensor], tensors: list[Tensor]) -> Any:
            each = iter(tensors)
            inputs = [next(each).unsqueeze(0) if b else x for x, b in zip(leaves, batched, strict=True)]
            one_args, one_kwargs = tree_unflatten(inputs, spec)
            with self._substituted(values | parameters):
                out = forward(*one_args, **one_kwargs)
            return tree_map(lambda t: t.squeeze(0) if isinstance(t, Tensor) else t, out)

        tensors = [x for x, b in zip(leaves, batched, strict=True) if b]
        try:
            return torch.vmap(one, randomness="different")({name: values[name] for name in expanded}, tensors)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise RuntimeError(
                f"{self.ghost_label()} ({type(self).__name__}): its trained parameters were to be expanded "
                f"per sample, but its forward does not run under torch.vmap: {error}. Freeze it, or write a "
                "rule (dpkernels.nn.register_swap)"
            ) from error


def _property(name: str) -> property:
    def read(self: Any) -> Any:
        substitutes = self._ghost_substitutes
        return self._parameters[name] if substitutes is None else substitutes[name]

    return property(read)


@cache
def expanding_class(original: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of `original` that expands its own parameters `names`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._expanded_forward(original.forward.__get__(self), args, kwargs)

    forward.__wrapped__ = original.forward  # type: ignore[attr-defined] # its signature is the original's
    body: dict[str, Any] = {name: _property(name) for name in names}
    body |= {
        "forward": forward,
        "ghost_covers": names,
        "ghost_original": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (ExpandingModule, original), body)


def expansion_refusal(module: nn.Module, parameter: nn.Parameter) -> str | None:
    """Why `parameter`, a raw parameter of `module`, cannot be expanded; None when it can."""
    if isinstance(module, nn.ParameterDict | nn.ParameterList):
        return "read from outside of the module that holds it; freeze it"
    if isinstance(module, nn.RNNBase):
        return "a recurrence in one fused function; freeze it, or build it of nn.*Cell modules"
    if isinstance(module, nn.Embedding):
        # Under vmap a lookup is an index, whose backward knows none of them.
        for option in ("padding_idx", "max_norm", "sparse", "scale_grad_by_freq"):
            value = getattr(module, option)
            if value is not None and value is not False:  # padding_idx=0 is a value
                return (
                    f"a subclass of nn.Embedding with a forward of its own and {option}={value}, "
                    "which per-sample expansion would not heed; build it without, write a rule "
                    "(dpkernels.nn.ghost_subclass), or freeze it"
                )
    if parameter.numel() > EXPANSION_LIMIT:
        return (
            f"no rule for it, and its {parameter.numel():,} elements are more than the {EXPANSION_LIMIT:,} "
            "that are expanded per sample; freeze it, or write a rule (dpkernels.nn.register_swap)"
        )
    return None


def batch_size_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Size of the first dimension of the first tensor among the arguments; None when there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


class PerSampleParameter:
    """Stands for a parameter of shape s while holding [B, *s]: what a module with children reads during its
    forward.

    Uses that say where the batch goes give a real tensor: a view, index or unsqueeze that leads with 1,
    `expand` of such a leading 1, and + − * / with a tensor that leads with the batch. Casts, and views that
    do not lead with 1, give another PerSampleParameter. Everything else raises NotImplementedError naming
    the parameter. What the module then does with the tensor must not mix its first dimension;
    `engine.self_check` finds it if it does.
    """

    def __init__(self, expanded: Tensor, name: str) -> None:
        self._expanded, self._name = expanded, name

    @property
    def shape(self) -> torch.Size:
        """The parameter's own shape."""
        return self._expanded.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """The parameter's dtype."""
        return self._expanded.dtype

    @property
    def device(self) -> torch.device:
        """The parameter's device."""
        return self._expanded.device

    @property
    def ndim(self) -> int:
        """Number of dimensions of the parameter itself."""
        return len(self.shape)

    def dim(self) -> int:
        """Number of dimensions of the parameter itself."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """As Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """As Tensor.numel."""
        return self.shape.numel()

    def _again(self, expanded: Tensor) -> PerSampleParameter:
        return PerSampleParameter(expanded, self._name)

    def _refuse(self, use: str) -> NotImplementedError:
        return NotImplementedError(
            f"{self._name}: {use} of a parameter {tuple(self.shape)} that is expanded per sample is not "
            "supported, as it does not say where the batch goes; view it as [1, ...] and broadcast it, or "
            "freeze it"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refuse(f".{name}")

    def to(self, *args: Any, **kwargs: Any) -> PerSampleParameter:
        """As Tensor.to."""
        return self._again(self._expanded.to(*args, **kwargs))

    def type_as(self, other: Tensor) -> PerSampleParameter:
        """As Tensor.type_as."""
        return self._again(self._expanded.type_as(other))

    def float(self) -> PerSampleParameter:
        """As Tensor.float."""
        return self._again(self._expanded.float())

    def view(self, *shape: Any) -> Any:
        """As Tensor.view; a leading 1 becomes the batch."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        new = torch.empty(self.shape, device="meta").reshape(sizes).shape
        batch = self._expanded.shape[0]
        if len(new) > 0 and new[0] == 1:
            return self._expanded.reshape(batch, *new[1:])
        return self._again(self._expanded.reshape(batch, *new))

    reshape = view

    def unsqueeze(self, dim: int) -> Any:
        """As Tensor.unsqueeze; at 0, the new dimension is the batch."""
        dim = dim + self.dim() + 1 if dim < 0 else dim
        return self._expanded if dim == 0 else self._again(self._expanded.unsqueeze(dim + 1))

    def expand(self, *sizes: Any) -> Tensor:
        """As Tensor.expand, of a parameter [1, ...] to the batch."""
        shape = tuple(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
        if (
            len(shape) != self.dim()
            or self.shape[:1] != (1,)
            or shape[0] not in (1, -1, self._expanded.shape[0])
        ):
            raise self._refuse(f".expand{shape}")
        return self._expanded.squeeze(1).expand(-1, *shape[1:])

    def __getitem__(self, index: Any) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        if index and all(i is None or i is Ellipsis or isinstance(i, slice) for i in index):
            if index[0] is None:
                return self._expanded[(slice(None), *index[1:])]
            if self.shape[:1] == (1,) and index[0] == slice(None):
                return self._expanded.squeeze(1)[index]
        raise self._refuse("indexing")

    def _elementwise(self, function: Callable[[Any, Any], Tensor], other: Any, swapped: bool) -> Any:
        mine: Tensor = self._expanded
        if isinstance(other, int | float):
            return self._again(function(other, mine) if swapped else function(mine, other))
        batch = mine.shape[0]
        if not isinstance(other, Tensor) or other.dim() == 0 or other.shape[0] != batch:
            raise self._refuse(f"{function.__name__} with {_describe(other)}")
        if other.dim() > self.dim():
            mine = mine.reshape(batch, *(1,) * (other.dim() - 1 - self.dim()), *self.shape)
        elif other.dim() == self.dim() and self.shape[0] == 1:
            mine = mine.squeeze(1)
        else:
            raise self._refuse(f"{function.__name__} with {_describe(other)}")
        return function(other, mine) if swapped else function(mine, other)

    def __add__(self, other: Any) -> Any:
        return self._elementwise(operator.add, other, False)

    def __radd__(self, other: Any) -> Any:
        return self._elementwise(operator.add, other, True)

    def __sub__(self, other: Any) -> Any:
        return self._elementwise(operator.sub, other, False)

    def __rsub__(self, other: Any) -> Any:
        return self._elementwise(operator.sub, other, True)

    def __mul__(self, other: Any) -> Any:
        return self._elementwise(operator.mul, other, False)

    def __rmul__(self, other: Any) -> Any:
        return self._elementwise(operator.mul, other, True)

    def __truediv__(self, other: Any) -> Any:
        return self._elementwise(operator.truediv, other, False)

    def __rtruediv__(self, other: Any) -> Any:
        return self._elementwise(operator.truediv, other, True)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called when a torch function, or a tensor's operator, meets a PerSampleParameter."""
        if func in _ELEMENTWISE and len(args) == 2 and not kwargs:
            first, second = args
            if isinstance(second, cls):
                if isinstance(first, cls):
                    raise first._refuse(f"{_name(func)} with another such parameter")
                return second._elementwise(_ELEMENTWISE[func], first, True)
            return first._elementwise(_ELEMENTWISE[func], second, False)
        leaves, _ = tree_flatten((args, kwargs or {}))
        found = next(x for x in leaves if isinstance(x, cls))
        raise found._refuse(_name(func))


_ELEMENTWISE: dict[Any, Callable[[Any, Any], Any]] = {
    torch.add: operator.add,
    torch.sub: operator.sub,
    torch.mul: operator.mul,
    torch.div: operator.truediv,
    Tensor.add: operator.add,
    Tensor.sub: operator.sub,
    Tensor.mul: operator.mul,
    Tensor.div: operator.truediv,
    Tensor.__add__: operator.add,
    Tensor.__sub__: operator.sub,
    Tensor.__mul__: operator.mul,
    Tensor.__truediv__: operator.truediv,
}


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _describe(other: Any) -> str:
    return f"a tensor {tuple(other.shape)}" if isinstance(other, Tensor) else f"a {type(other).__name__}"
