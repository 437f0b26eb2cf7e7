"""Which axis of a tensor carries the batch: learnt from calls at different batch sizes, never from one size alone.

In a forward over n examples a tensor that carries the batch has an axis of size n. So may a tensor that all examples
share (positions [T], a mask [T,T], prototypes [K,d]), whenever n happens to equal T or K. One call cannot tell the two
apart; calls at two batch sizes can, since no fixed size equals both. Every place that has to know asks `BatchAxes.of`,
by *site*: the module, which of its calls in a forward, and which argument. What the calls at a site have in common is
remembered, and a call that contradicts it raises.

`ask_at_other_sizes` makes such calls before the first private forward, with a few of the batch's own rows. Where a
model cannot be asked so, the axis that the first call suggests is an assumption (`BatchAxes.assumed`), and the row
check (`dpkernels.nn.recording.row_check`) has the last word before anything is summed: it asks the gradients.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten

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
        # By site and number of dimensions: an optional call before it moves a call's number.
        self._evidence: dict[tuple[Site, int], _Evidence] = {}
        self._calls: Counter[str] = Counter()
        self._usual: dict[str, int] = {}
        # What the calls of a layer said, where they did not all say the same.
        self._said: dict[str, set[int | None]] = {}
        self._assumed: set[tuple[Site, frozenset[int]]] = set()
        self._confirmed: set[tuple[Site, frozenset[int]]] = set()
        self._compared: Counter[Site] = Counter()
        # The forwards under way only ask: over copies of one example, maybe, which no function mixes.
        self.asking = False

    def begin_forward(self) -> None:
        """The calls of each layer are counted from 0 again."""
        self._usual = dict(self._calls) | self._usual
        self._calls.clear()
        self._assumed.clear()

    def next_call(self, layer: str) -> int:
        """The number of this call of a layer in the forward under way."""
        call = self._calls[layer]
        self._calls[layer] += 1
        return call

    def to_compare(self, site: Site, size: int) -> bool:
        """Whether a site's values are to be compared in this call: its 1st, 2nd, 4th, ... of two examples or more."""
        return size > 1 and not (self._compared[site] + 1) & self._compared[site]

    def note_compared(self, site: Site) -> None:
        """A call of two examples or more whose values were right, or were not to be compared."""
        if not self.asking:
            self._compared[site] += 1

    @property
    def assumed(self) -> bool:
        """Whether an axis in the forward under way rests on calls at one batch size only, on which of several axes of
        that size it was before, or on a call's number where a layer is called another number of times than usual.
        """
        unusual = (
            calls != self._usual.get(layer, calls)
            for layer, calls in self._calls.items()
            if len(self._said.get(layer, ())) > 1
        )
        return bool(self._assumed) or any(unusual)

    def confirm(self) -> None:
        """The gradients have shown that what was assumed is so."""
        self._confirmed |= self._assumed

    def of(self, site: Site, shape: tuple[int, ...], size: int) -> int | None:
        """The axis of a tensor of this shape that carries a batch of `size` examples; None where examples share it.

        Raises:
            ValueError: earlier calls showed an axis that carries the batch, and here its size is another.
        """
        axes = frozenset(axis for axis, length in enumerate(shape) if length == size)
        evidence = self._evidence.setdefault((site, len(shape)), _Evidence(axes, {size}))
        common = evidence.axes & axes
        if evidence.axes and evidence.certain and not common:
            raise ValueError(
                f"{site.layer!r}: {site.argument} of shape {tuple(shape)} in a forward of {size} examples; in earlier "
                f"calls its dimension {min(evidence.axes)} was the batch. Which of its rows belong to which example is "
                "not known. Give every call the same layout, or freeze the layer (requires_grad_(False))"
            )
        evidence.axes = common
        if len(evidence.sizes) < 2:
            evidence.sizes.add(size)
        found = min(common) if common else None
        self._said.setdefault(site.layer, set()).add(found)
        coincides = bool(common) and len(axes) > 1 and (site, axes) not in self._confirmed
        if coincides or not evidence.certain:
            self._assumed.add((site, axes))
        return found


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
    model: nn.Module,
    axes: BatchAxes,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    size: int,
    plainly: Callable[[], AbstractContextManager[None]],
) -> Iterator[int]:
    """Forwards of the model over 2 and 3 (or 4) of the rows of its arguments, so that `axes` sees them at these sizes.

    Yields each size before the forward over so many rows. Rows are those of every tensor among the arguments whose
    first dimension is `size`; where the model does not compute with that, one of these tensors after the other is taken
    for one that examples share. torch's generators are put back. A model that computes with none (it was built for one
    batch size, say) teaches nothing, which is logged: its axes are then assumptions until calls of another batch size
    come, and the row check has to confirm them.

    `plainly`: within it the model is the plain one, with which the private one is compared, in evaluation mode.

    Raises:
        RuntimeError: the plain model, which repeats itself, computes something else.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    candidates = [path for path, t in tensors_in((args, dict(kwargs))) if t.dim() > 0 and t.shape[0] == size]

    draws = False

    def outputs(rows: int, shared: str) -> list[Any] | Exception:
        some_args, some_kwargs = _with_rows((args, dict(kwargs)), size, rows, shared)
        nonlocal draws
        try:
            with torch.random.fork_rng(devices=devices):
                state = torch.get_rng_state()
                found = tree_flatten(model(*some_args, **some_kwargs))[0]
                draws = not torch.equal(state, torch.get_rng_state())
                return found
        except Exception as error:  # noqa: BLE001 (a user's model may raise anything; nothing rests on it)
            return error

    for rows in [n for n in (2, 3, 4) if n != size][:2]:
        reason: Exception | None = None
        for shared in ("", *candidates[1:]):
            found = copy.deepcopy(axes._evidence)
            yield rows
            private = outputs(rows, shared)
            if isinstance(private, Exception):
                axes._evidence, reason = found, reason or private
                continue
            # Its own masks a layer may draw in another order than the plain one.
            with _evaluating(model), _in_full_precision(devices):
                with plainly():
                    before = outputs(rows, shared)
                private = outputs(rows, shared)
                with plainly():
                    after = outputs(rows, shared)
            # One that keeps something from forward to forward, or draws in evaluation too, says nothing here.
            if not draws and _alike(before, after) and not _alike(after, private):
                raise RuntimeError(
                    "the private model computes another function than the plain one: their outputs for the same "
                    f"{rows} examples differ. A module's forward may ask what its parameter is (torch.is_tensor, "
                    "isinstance, is_leaf), where a trained raw parameter is read as something that stands for it. Take "
                    "the question out, or freeze the parameter (requires_grad_(False)). Nothing was spent"
                )
            break
        else:
            logger.info("batch axes: the model's forward over %d of %d rows raised %r", rows, size, reason)


@contextmanager
def _in_full_precision(devices: Sequence[int]) -> Iterator[None]:
    """Without autocast, whose rounding is no other function."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda" if devices else "cpu", enabled=False):
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _alike(first: list[Any] | Exception, second: list[Any] | Exception) -> bool:
    """Whether the floating-point tensors of two outputs agree but for rounding; those that examples share by value."""
    if isinstance(first, Exception) or isinstance(second, Exception) or len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        b = b.value() if hasattr(b, "rows") else b
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and has_values(a)):
            continue
        if a.shape != b.shape:
            return False
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-2}.get(
            a.dtype, math.inf
        )  # half types tell nothing
        finite = a.isfinite() & b.isfinite()
        a, b = a[finite].detach().double(), b[finite].detach().double()
        if a.numel() and not float((a - b).abs().max()) <= tolerance * float(a.abs().max()) + 1e-12:
            return False
    return True


def _with_rows(arguments: Any, size: int, rows: int, shared: str) -> Any:
    """The arguments with `rows` of the `size` rows of their tensors, except the tensor at the path `shared`."""
    paths = {id(tensor): path for path, tensor in tensors_in(arguments)}

    def some_rows(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != size or paths[id(tensor)] == shared:
            return tensor
        return tensor[torch.arange(rows, device=tensor.device) % size]

    return map_tensors(arguments, some_rows)
