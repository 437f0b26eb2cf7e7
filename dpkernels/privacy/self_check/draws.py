"""A batch's random draws given to its examples alone: what a model drew for row i is drawn again for example i.

Under one seed a batch and an example alone draw different numbers, as their shapes differ, and a model that is random
in what it computes (a VAE, a diffusion model) gives the example another gradient. Here the draws of the batch are kept
in order, and each example alone is handed its own row of each, cut to its own size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpkernels.privacy.self_check.findings import SelfCheckError, SelfCheckReport

# Of shapes and numbers only. What is drawn by the values of a tensor (multinomial, native_dropout) is not handed on: it
# would hide that those values depend on the rest of the batch.
_BY_SHAPE = frozenset(
    {"rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "normal_", "uniform_"}
    | {"random_", "exponential_", "cauchy_", "log_normal_", "geometric_", "bernoulli_"}
)


class DrawsUnlike(RuntimeError):
    """Draws that cannot be told apart by example; the message says which."""


class KeptDraws(TorchDispatchMode):
    """Keeps what torch's random operations give within it, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[tuple[str, list[int], Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.draws.append((_checked(func, args), _bounds(func, args), found.detach().clone()))
        return found


class DrawsOfRow(TorchDispatchMode):
    """Within it torch's random operations give row `sample` of what they gave a batch of `size` examples.

    That a draw's first dimension is the batch is known from two runs: it is `size` in the batch and 1 alone. One that
    has the batch's shape alone, too, is shared by all examples. Raises DrawsUnlike, at the end also where the batch
    drew more often (once an example, say, in a loop), and SelfCheckError where places among the examples are drawn.
    """

    def __init__(self, kept: KeptDraws, sample: int, size: int) -> None:
        super().__init__()
        self._left = iter(kept.draws)
        self._sample = sample
        self._size = size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return found
        name, bounds, drawn = next(self._left, ("nothing", [], found))
        if name != _checked(func, args):
            raise DrawsUnlike(f"it draws {_name(func)} for an example alone where it drew {name} for a batch")
        self._compare(name, bounds, _bounds(func, args))
        return found.copy_(self._row(drawn, found.shape))

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        left = sum(1 for _ in self._left)
        if exc_type is None and left:
            raise DrawsUnlike(
                f"it draws {left} times more for a batch of {self._size} than for an example alone"
            )

    def _compare(self, name: str, in_batch: list[int], alone: list[int]) -> None:
        """Whole numbers below the number of examples are places among them: of mates."""
        if in_batch == alone:
            return
        if any(there == self._size and here == 1 for there, here in zip(in_batch, alone, strict=True)):
            raise SelfCheckError(
                f"self-check: the model draws whole numbers below the number of examples (torch.{name}, "
                f"{self._size} in this batch, 1 for an example alone): places in the batch, as mixup and shuffled "
                "negatives do. An example's loss would depend on its batch too, and its gradient would not be its "
                "own. Mix within an example, or take it out",
                SelfCheckReport(),
            )
        raise DrawsUnlike(
            f"it draws whole numbers within {in_batch} for a batch and {alone} for an example alone"
        )

    def _row(self, drawn: Tensor, shape: torch.Size) -> Tensor:
        if drawn.shape == shape:
            return drawn
        by_row = drawn.dim() == len(shape) and drawn.shape[:1] == (self._size,) and shape[:1] == (1,)
        if not by_row or any(alone > there for alone, there in zip(shape[1:], drawn.shape[1:], strict=True)):
            raise DrawsUnlike(
                f"it draws {tuple(drawn.shape)} for a batch of {self._size} and {tuple(shape)} for an example alone"
            )
        rest = tuple(slice(0, length) for length in shape[1:])
        return drawn[(slice(self._sample, self._sample + 1), *rest)]


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _bounds(func: Any, args: tuple[Any, ...]) -> list[int]:
    """Between which whole numbers are drawn, and randperm's number; empty for other draws."""
    whole = _name(func) in ("randint", "randint_like", "randperm", "random_")
    return [value for value in args if isinstance(value, int)] if whole else []


def _checked(func: Any, args: tuple[Any, ...]) -> str:
    name = _name(func)
    in_place = name.endswith("_") and any(isinstance(value, Tensor) for value in args[1:])
    if name not in _BY_SHAPE or in_place:  # bernoulli_(p) of a tensor p
        raise DrawsUnlike(f"it draws by the values of a tensor ({name})")
    return name
