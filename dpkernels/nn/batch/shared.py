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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dpkernels.nn.batch.batch_axis import Site
from dpkernels.nn.batch.shared_functions import Shared, apply


class SharedTensor(Shared):
    """Stands for a tensor of `shape` that examples share.

    Args:
        rows: `[n, *shape]`, row i for example i; all rows have the same values.
        name: for messages: the parameter, or the layer that made it.
        axes: what is known of the model's tensors.

    Whatever torch does with tensors works, or raises NotImplementedError naming `name`: writing in place, what mixes
    the batch, and what gives another shape than with the plain tensor.
    """

    def dim(self) -> int:
        """As Tensor.dim."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """As Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """As Tensor.numel."""
        return self.shape.numel()

    def detach(self) -> Tensor:
        """As Tensor.detach: an ordinary tensor, since no example's gradient comes through it."""
        return self.value()

    data = property(Shared.value)

    def _written(self, result: Any) -> SharedTensor:
        """What an augmented assignment leaves: this very object, with the result's values."""
        if not isinstance(result, SharedTensor) or result.shape != self.shape:
            raise self.refuse("an augmented assignment, which writes examples' values into it,")
        self.rows = result.rows
        return self

    def __iadd__(self, other: Any) -> SharedTensor:
        return self._written(self + other)

    def __isub__(self, other: Any) -> SharedTensor:
        return self._written(self - other)

    def __imul__(self, other: Any) -> SharedTensor:
        return self._written(self * other)

    def __itruediv__(self, other: Any) -> SharedTensor:
        return self._written(self / other)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return iter(apply(torch.unbind, (self,), {}))

    def __bool__(self) -> bool:
        return bool(self.value())

    def __float__(self) -> float:
        return float(self.value())

    def __int__(self) -> int:
        return int(self.value())

    def __repr__(self) -> str:
        return f"SharedTensor({self.name!r}, shape={tuple(self.shape)}, dtype={self.rows.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedTensor:
        raise self.refuse("a copy")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(
                f"{type(self).__name__} (of {self.__dict__.get('name')!r}) has no attribute {name!r}"
            )
        if name in _OF_THE_VALUE:
            return getattr(self.value(), name)
        member = getattr(Tensor, name)
        if not callable(member):
            if name in _VIEWS:
                return apply(_VIEWS[name], (self,), {})
            return getattr(self.rows, name)
        return lambda *args, **kwargs: apply(member, (self, *args), kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called when a torch function, or a tensor's operator or method, meets a SharedTensor."""
        return apply(func, args, kwargs or {})

    def through(self, layer: Callable[[Tensor], Any], label: str, *, channels_second: bool = False) -> Any:
        """`layer(self)` for a layer that takes its input's first dimension for the batch and keeps it.

        `channels_second`: and its second for channels, so that [K, C] cannot become [n, K, C].
        """
        site = Site(label, "its input, which examples share,", self.axes.next_call(label))
        axis = self.axes.of(site, self.shape, len(self.rows))
        if axis is not None:
            return layer(self.aligned(self.ndim, axis))
        if channels_second and self.shape[:1] != (1,):
            raise self.refuse(f"an input {tuple(self.shape)} of {label!r}, without the batch,")
        if self.shape[:1] == (1,):
            return tree_map(lambda y: self.again(y.unsqueeze(1)), layer(self.rows.squeeze(1)))
        return tree_map(self.again, layer(self.rows))


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
        return apply(function, (self, *args), {})

    return method


_OPERATORS = """
    add radd sub rsub mul rmul truediv rtruediv floordiv mod pow rpow matmul rmatmul neg pos abs invert getitem eq ne lt
    le gt ge and or xor
"""
for _name in _OPERATORS.strip().split():
    if hasattr(Tensor, f"__{_name}__"):
        setattr(SharedTensor, f"__{_name}__", _method(f"__{_name}__"))
SharedTensor.__hash__ = object.__hash__  # type: ignore[method-assign] # __eq__ is elementwise, as Tensor's
