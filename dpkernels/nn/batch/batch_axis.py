"""Which axis of a tensor carries the batch: found from calls at different batch sizes, never from one size alone.

In a forward over n examples a tensor that carries the batch has an axis of size n. A tensor that all examples share
(positions [T], a mask [T,T], prototypes [K,d]) may have one, too, if n happens to equal T or K. One call cannot
distinguish the two cases. Calls at two batch sizes can, since no fixed size equals both. Code that needs the axis calls
`BatchAxes.of` with a *site*: the module, the number of its call in the forward, and the argument. `BatchAxes` remembers
the axes that fit all calls at a site, and raises an error for a call that contradicts them.

`run_at_other_sizes` makes such calls before the first private forward, with a few rows of the batch. If the model does
not run at other sizes, the axis that fits the first call is an assumption (`BatchAxes.assumed`). The row check
(`dpkernels.nn.recording.row_check`) then confirms or refuses it from the gradients, before anything is summed.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    """axes: those with the batch's size in every call so far. sizes: the batch sizes of up to two different calls."""

    axes: frozenset[int]
    sizes: set[int]

    @property
    def certain(self) -> bool:
        """Whether the tensor is certainly shared, or has been seen at two batch sizes."""
        return not self.axes or len(self.sizes) > 1


class BatchAxes:
    """The evidence from the calls of one model so far."""

    def __init__(self) -> None:
        # By site and number of dimensions: an optional call shifts the numbers of later calls.
        self._evidence: dict[tuple[Site, int], _Evidence] = {}
        self._calls: Counter[str] = Counter()
        self._usual_calls: dict[str, int] = {}
        # The different axes that were found in the calls of a layer.
        self._axes_of_layer: dict[str, set[int | None]] = {}
        self._assumed: set[tuple[Site, frozenset[int]]] = set()
        self._confirmed: set[tuple[Site, frozenset[int]]] = set()
        self._compared: Counter[Site] = Counter()
        # Whether the current forward only gathers evidence. It may then run on copies of one example, which mixing
        # does not change.
        self.asking = False

    def begin_forward(self) -> None:
        """Begin to count the calls of each layer from 0."""
        self._usual_calls = dict(self._calls) | self._usual_calls
        self._calls.clear()
        self._assumed.clear()

    def next_call(self, layer: str) -> int:
        """The number of this call of a layer in the current forward."""
        call = self._calls[layer]
        self._calls[layer] += 1
        return call

    def to_compare(self, site: Site, size: int) -> bool:
        """Whether this call compares a site's values: the 1st, 2nd, 4th, ... call with two examples or more does."""
        return size > 1 and not (self._compared[site] + 1) & self._compared[site]

    def note_compared(self, site: Site) -> None:
        """Count a call with two examples or more whose values were right, or were not due for comparison."""
        if not self.asking:
            self._compared[site] += 1

    @property
    def assumed(self) -> bool:
        """Whether an axis in the current forward is an assumption.

        It is one if it rests on calls at one batch size only, on an earlier choice among several axes of that size, or
        on the number of a call while the layer is called more or less often than usual.
        """
        unusual = (
            calls != self._usual_calls.get(layer, calls)
            for layer, calls in self._calls.items()
            if len(self._axes_of_layer.get(layer, ())) > 1
        )
        return bool(self._assumed) or any(unusual)

    def confirm(self) -> None:
        """Mark the current assumptions as confirmed, after a check of the gradients."""
        self._confirmed |= self._assumed

    def is_shared(self, layer: str, dims: int) -> bool:
        """Whether examples shared one of a layer's tensors of so many dimensions in an earlier call."""
        return any(
            site.layer == layer and of == dims and not evidence.axes
            for (site, of), evidence in self._evidence.items()
        )

    def of(self, site: Site, shape: tuple[int, ...], size: int) -> int | None:
        """The axis of a tensor of this shape that carries a batch of `size` examples; None if examples share it.

        Raises:
            ValueError: an axis that carried the batch in earlier calls has another size in this call.
        """
        axes = frozenset(axis for axis, length in enumerate(shape) if length == size)
        evidence = self._evidence.setdefault((site, len(shape)), _Evidence(axes, {size}))
        common = evidence.axes & axes
        if evidence.axes and evidence.certain and not common:
            raise ValueError(
                f"{site.layer!r}: wrong layout of {site.argument} in a forward of {size} examples: the shape is "
                f"{tuple(shape)}, but in earlier calls dimension {min(evidence.axes)} was the batch, so it is unknown "
                "which rows belong to which example. Give every call the same layout, or freeze the layer "
                "(requires_grad_(False))"
            )
        evidence.axes = common
        if len(evidence.sizes) < 2:
            evidence.sizes.add(size)
        batch_axis = min(common) if common else None
        self._axes_of_layer.setdefault(site.layer, set()).add(batch_axis)
        coincides = bool(common) and len(axes) > 1 and (site, axes) not in self._confirmed
        if coincides or not evidence.certain:
            self._assumed.add((site, axes))
        return batch_axis


def has_values(t: Tensor) -> bool:
    """Whether a tensor has values: a FakeTensor, which estimates memory, and a tensor on the meta device have none."""
    return not isinstance(t, FakeTensor) and not t.is_meta


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors within an argument, including mappings, sequences and dataclasses, each with its path."""
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
    """Size of the first dimension of the first tensor within the arguments; None if there is none."""
    return next((len(t) for _, t in tensors_in((args, dict(kwargs))) if t.dim() > 0), None)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change(tensor)` in place of each tensor; containers are copied, everything else is kept."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):  # includes transformers' outputs, which are also dataclasses
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


def run_at_other_sizes(
    model: nn.Module,
    axes: BatchAxes,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    size: int,
    plainly: Callable[[], AbstractContextManager[None]],
) -> Iterator[int]:
    """Run the model over 2 and 3 (or 4) rows of its arguments, as evidence for `axes` at these sizes.

    Yields each size before the forward over that many rows. The rows are taken from every tensor among the arguments
    whose first dimension is `size`. If the model raises for them, one of these tensors after another is treated as
    shared. torch's generators are restored. A model that raises for all of them (it was built for one batch size, for
    example) gives no evidence, which is logged. Its axes are then assumptions until a call with another batch size, and
    the row check has to confirm them.

    `plainly`: a context in which the model is the plain one; private and plain outputs are compared in evaluation mode.

    Raises:
        RuntimeError: the plain model computes another function than the private one, and repeats its own outputs.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    candidates = [path for path, t in tensors_in((args, dict(kwargs))) if t.dim() > 0 and t.shape[0] == size]

    draws = False

    def outputs(rows: int, shared: str) -> list[Any] | Exception:
        some_args, some_kwargs = _with_rows((args, dict(kwargs)), size, rows, shared)
        nonlocal draws
        raised: Exception | None = None
        # A forward that takes gradients itself, by torch.autograd or torch.func, needs what the first context drops.
        for context in (_without_saved_tensors, nullcontext):
            try:
                with torch.random.fork_rng(devices=devices), context():
                    state = torch.get_rng_state()
                    leaves = tree_flatten(model(*some_args, **some_kwargs))[0]
                    draws = not torch.equal(state, torch.get_rng_state())
                # detached, so that no graph outlives its forward
                return [leaf.detach() if type(leaf) is Tensor else leaf for leaf in leaves]
            except Exception as error:  # noqa: BLE001 (a user's model may raise anything; it is only evidence)
                raised = raised or error
        assert raised is not None
        return raised

    for rows in [n for n in (2, 3, 4) if n != size][:2]:
        reason: Exception | None = None
        for shared in ("", *candidates[1:]):
            evidence = copy.deepcopy(axes._evidence)
            yield rows
            private = outputs(rows, shared)
            if isinstance(private, Exception):
                axes._evidence, reason = evidence, reason or private
                continue
            # In evaluation mode, since a layer may draw its masks in another order than the plain layer.
            with _evaluating(model), _in_full_precision(devices):
                with plainly():
                    before = outputs(rows, shared)
                private = outputs(rows, shared)
                with plainly():
                    after = outputs(rows, shared)
            # A model that keeps state between forwards, or draws random numbers in evaluation, cannot be compared.
            if not draws and _alike(before, after) and not _alike(after, private):
                raise RuntimeError(
                    "the private model computes another function than the plain one: their outputs for the same "
                    f"{rows} examples differ. A module's forward may test the type of its parameter (torch.is_tensor, "
                    "isinstance, is_leaf), but it reads a SharedTensor in place of a trained raw parameter. Remove "
                    "the test, or freeze the parameter (requires_grad_(False)). Nothing was spent"
                )
            break
        else:
            logger.info("batch axes: the model's forward over %d of %d rows raised %r", rows, size, reason)


def _without_saved_tensors() -> AbstractContextManager[Any]:
    """A forward within it is recorded by autograd, and keeps no tensor for a backward.

    The rows asked for may be more than the batch has: their activations would be the largest memory of a whole run.
    """

    def dropped(_: None) -> Tensor:
        raise RuntimeError("no backward can follow a forward that only asks for the batch axes")

    return torch.autograd.graph.saved_tensors_hooks(lambda _: None, dropped)


@contextmanager
def _in_full_precision(devices: Sequence[int]) -> Iterator[None]:
    """Disable autocast within the context: its rounding would look like another function."""
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
    """Whether the floating-point tensors of two outputs agree up to rounding; SharedTensors count by their values."""
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
        )  # half precision is too coarse to compare
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
