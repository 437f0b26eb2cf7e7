"""Replays a batch's random draws for its examples alone: example i gets row i of each draw.

Under one seed a batch and an example alone draw different numbers, since their shapes differ, and a model whose output
is random (a VAE, a diffusion model) then gives the example another gradient. This module records the draws of the batch
in order, and gives each example alone its own row of each draw, cut to its own size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpkernels.privacy.self_check.findings import SelfCheckError, SelfCheckReport

# Operations whose draws depend on shapes and numbers only. Draws that depend on a tensor's values (multinomial,
# native_dropout) are not replayed: this would hide a dependence of the values on the rest of the batch.
_BY_SHAPE = frozenset(
    {"rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "normal_", "uniform_"}
    | {"random_", "exponential_", "cauchy_", "log_normal_", "geometric_", "bernoulli_"}
)


class DrawsUnlike(RuntimeError):
    """Draws cannot be separated by example; the message names them."""


class KeptDraws(TorchDispatchMode):
    """Records the results of torch's random operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[tuple[str, list[int], Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.draws.append((_checked(func, args), _bounds(func, args), result.detach().clone()))
        return result


class DrawsOfRow(TorchDispatchMode):
    """Makes torch's random operations return row `sample` of the draws recorded for a batch of `size` examples.

    A draw has one row for each example if its first dimension is `size` in the batch and 1 for an example alone. A draw
    of the same shape in both is shared by all examples. Raises DrawsUnlike for other draws, and at the end if the batch
    drew more often (for example in a loop over examples). Raises SelfCheckError if indices of examples are drawn.
    """

    def __init__(self, kept: KeptDraws, sample: int, size: int) -> None:
        super().__init__()
        self._remaining = iter(kept.draws)
        self._sample = sample
        self._size = size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return result
        name, bounds, drawn = next(self._remaining, ("nothing", [], result))
        if name != _checked(func, args):
            raise DrawsUnlike(f"the model draws {_name(func)} for an example alone but {name} for a batch")
        self._compare(name, bounds, _bounds(func, args))
        return result.copy_(self._row(drawn, result.shape))

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        surplus = sum(1 for _ in self._remaining)
        if exc_type is None and surplus:
            raise DrawsUnlike(
                f"the model makes {surplus} more draws for a batch of {self._size} than for an example alone"
            )

    def _compare(self, name: str, in_batch: list[int], alone: list[int]) -> None:
        """Raise SelfCheckError if whole numbers below the number of examples are drawn: indices of other examples."""
        if in_batch == alone:
            return
        if any(there == self._size and here == 1 for there, here in zip(in_batch, alone, strict=True)):
            raise SelfCheckError(
                f"self-check: the model draws whole numbers below the number of examples (torch.{name}, "
                f"{self._size} in this batch, 1 for an example alone): indices of other examples, as mixup and "
                "shuffled negatives do. An example's loss and gradient would depend on the rest of its batch. Mix "
                "within an example, or remove the mixing",
                SelfCheckReport(),
            )
        raise DrawsUnlike(
            f"the model draws whole numbers within {in_batch} for a batch and {alone} for an example alone"
        )

    def _row(self, drawn: Tensor, shape: torch.Size) -> Tensor:
        if drawn.shape == shape:
            return drawn
        by_row = drawn.dim() == len(shape) and drawn.shape[:1] == (self._size,) and shape[:1] == (1,)
        if not by_row or any(alone > there for alone, there in zip(shape[1:], drawn.shape[1:], strict=True)):
            raise DrawsUnlike(
                f"the model draws {tuple(drawn.shape)} for a batch of {self._size} and {tuple(shape)} for an example "
                "alone"
            )
        rest = tuple(slice(0, length) for length in shape[1:])
        return drawn[(slice(self._sample, self._sample + 1), *rest)]


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _bounds(func: Any, args: tuple[Any, ...]) -> list[int]:
    """The bounds of drawn whole numbers, or the length of a randperm; empty for other draws."""
    integral = _name(func) in ("randint", "randint_like", "randperm", "random_")
    return [value for value in args if isinstance(value, int)] if integral else []


def _checked(func: Any, args: tuple[Any, ...]) -> str:
    name = _name(func)
    in_place = name.endswith("_") and any(isinstance(value, Tensor) for value in args[1:])
    if name not in _BY_SHAPE or in_place:  # bernoulli_(p) of a tensor p
        raise DrawsUnlike(f"the model's draws depend on the values of a tensor ({name})")
    return name
