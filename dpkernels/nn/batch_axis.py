"""Which axis of a tensor carries the batch: learnt from calls at different batch sizes, never from one size alone.

In a forward over n examples a tensor that carries the batch has an axis of size n. So may a tensor that all examples
share (positions [T], a mask [T,T], prototypes [K,d]), whenever n happens to equal T or K. One call cannot tell the two
apart; calls at two batch sizes can, since no fixed size equals both. Every place that has to know asks `BatchAxes.of`,
by *site*: the module, which of its calls in a forward, and which argument. What the calls at a site have in common is
remembered, and a call that contradicts it raises.

`ask_at_other_sizes` makes such calls before the first private forward, with a few of the batch's own rows. Where a
model cannot be asked so, the axis that the first call suggests is an assumption (`BatchAxes.assumed`), and the row
check (`dpkernels.nn.row_check`) has the last word before anything is summed: it asks the gradients themselves.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

logger = logging.getLogger("dpkernels")


@dataclass(frozen=True)
class Site:
    """One argument of one call of a layer: `call` counts the layer's calls in a forward."""

    layer: str
    argument: str
    call: int


@dataclass
class _Evidence:
    """axes: those whose size was the batch's in every call so far. sizes: the batch sizes of two of these calls."""

    axes: frozenset[int]
    sizes: set[int]

    @property
    def certain(self) -> bool:
        """Shared for certain, or seen at two batch sizes."""
        return not self.axes or len(self.sizes) > 1


class BatchAxes:
    """What the calls of one model have shown so far."""

    def __init__(self) -> None:
        self._evidence: dict[Site, _Evidence] = {}
        self._calls: Counter[str] = Counter()
        self._assumed: set[Site] = set()
        self._compared: Counter[Site] = Counter()

    def begin_forward(self) -> None:
        """The calls of each layer are counted from 0 again."""
        self._calls.clear()
        self._assumed.clear()

    def next_call(self, layer: str) -> int:
        """The number of this call of a layer in the forward under way."""
        call = self._calls[layer]
        self._calls[layer] += 1
        return call

    def to_compare(self, site: Site, size: int) -> bool:
        """Whether a site's values are to be compared in this call: its 1st, 2nd, 4th, ... of two examples or more."""
        if size < 2:
            return False
        self._compared[site] += 1
        return not self._compared[site] & (self._compared[site] - 1)

    @property
    def assumed(self) -> bool:
        """Whether an axis in the forward under way rests on calls at one batch size only."""
        return bool(self._assumed)

    def of(self, site: Site, shape: tuple[int, ...], size: int) -> int | None:
        """The axis of a tensor of this shape that carries a batch of `size` examples; None where examples share it.

        Raises:
            ValueError: earlier calls showed an axis that carries the batch, and here its size is another.
        """
        axes = frozenset(axis for axis, length in enumerate(shape) if length == size)
        evidence = self._evidence.setdefault(site, _Evidence(axes, {size}))
        common = evidence.axes & axes
        if evidence.axes and evidence.certain and not common:
            raise ValueError(
                f"{site.layer}: {site.argument} of shape {tuple(shape)} in a forward of {size} examples; in earlier "
                f"calls its dimension {min(evidence.axes)} was the batch. Which of its rows belong to which example is "
                "not known. Give every call the same layout, or freeze the layer (requires_grad_(False))"
            )
        evidence.axes = common
        if len(evidence.sizes) < 2:
            evidence.sizes.add(size)
        if not evidence.certain:
            self._assumed.add(site)
        return min(common) if common else None


def has_values(t: Tensor) -> bool:
    """Whether a tensor has values that can be asked: a FakeTensor, with which memory is planned, has none."""
    return not isinstance(t, FakeTensor) and not t.is_meta


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors within an argument, each with its path: those of mappings, sequences and dataclasses, too."""
    if isinstance(value, Tensor):
        yield path or "input", value
        return
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = vars(value).items()
    for key, part in parts:
        yield from tensors_in(part, f"{path}.{key}" if path else str(key))


def batch_size_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Size of the first dimension of the first tensor within the arguments; None when there is none."""
    return next((len(t) for _, t in tensors_in((args, dict(kwargs))) if t.dim() > 0), None)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change(tensor)` for each tensor within; containers are copied, everything else is kept."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):  # transformers' outputs among them, which are dataclasses, too
        changed = copy.copy(value)
        for key, part in value.items():
            changed[key] = map_tensors(part, change)
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(part, change) for part in value))
    if isinstance(value, list | tuple):
        return type(value)([map_tensors(part, change) for part in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed_copy = copy.copy(value)
        for name, part in vars(value).items():
            object.__setattr__(changed_copy, name, map_tensors(part, change))
        return changed_copy
    return value


def ask_at_other_sizes(
    model: nn.Module, axes: BatchAxes, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int
) -> Iterator[int]:
    """Forwards of the model over 2 and 3 (or 4) of the rows of its arguments, so that `axes` sees them at these sizes.

    Yields each size before the forward over so many rows. Rows are those of every tensor among the arguments whose
    first dimension is `size`; where the model does not compute with that, one of these tensors after the other is taken
    for one that examples share. torch's generators are put back. A model that computes with none (it was built for one
    batch size, say) teaches nothing, which is logged: its axes are then assumptions until calls of another batch size
    come, and the row check has to confirm them.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    candidates = [path for path, t in tensors_in((args, dict(kwargs))) if t.dim() > 0 and t.shape[0] == size]
    for rows in [n for n in (2, 3, 4) if n != size][:2]:
        reason: Exception | None = None
        for shared in ("", *candidates[1:]):
            found = copy.deepcopy(axes._evidence)
            yield rows
            try:
                with torch.random.fork_rng(devices=devices):
                    some_args, some_kwargs = _with_rows((args, dict(kwargs)), size, rows, shared)
                    model(*some_args, **some_kwargs)
                break
            except Exception as error:  # noqa: BLE001 (a user's model may raise anything; nothing rests on it)
                axes._evidence, reason = found, reason or error
        else:
            logger.info("batch axes: the model's forward over %d of %d rows raised %r", rows, size, reason)


def _with_rows(arguments: Any, size: int, rows: int, shared: str) -> Any:
    """The arguments with `rows` of the `size` rows of their tensors, except the tensor at the path `shared`."""
    paths = {id(tensor): path for path, tensor in tensors_in(arguments)}

    def some_rows(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != size or paths[id(tensor)] == shared:
            return tensor
        return tensor[torch.arange(rows, device=tensor.device) % size]

    return map_tensors(arguments, some_rows)
