"""The tape: the records of one private model's layers from one backward.

A layer never clips anything. Its backward adds a record to the tape. The engine, which opened the tape, takes the
records and computes their norms first and their weighted sums then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from dpkernels.nn.batch.batch_axis import BatchAxes, run_at_other_sizes
from dpkernels.nn.recording.choice import MATERIALISED_BYTES, Choice, Chosen, decide
from dpkernels.nn.recording.compiled_calls import CompiledCalls
from dpkernels.nn.recording.records import Record
from dpkernels.nn.recording.split import SplitRecord


class Inspector(Protocol):
    """Receives each record of a backward before the tape processes it."""

    def begin(self) -> None:
        """A backward begins."""
        ...

    def see(self, record: Record) -> bool:
        """Whether the tape takes this record."""
        ...

    def see_axes(self, call: tuple[tuple[nn.Parameter, ...], int], g: Tensor) -> int:
        """Return which of the first two axes of an output gradient is the batch, if both have its size."""
        ...


class Tape:
    """Collects the records of one backward.

    `open` before the backward, `close` after it. One tape serves one model; `dpkernels.nn.attach` creates it.

    Streaming: with `open(batch_size, sink=f)`, the tape passes a record whose parameters were used once in the
    forward to `f` as soon as the layer's backward adds it, and does not keep it (two-pass and per-layer clipping
    save memory this way). Records of tied or reused parameters are still kept, and `close` merges them. The first of
    two backwards over the same forward ends with `close(again=True)`.

    Materialising: a record whose parameters were used once in the forward is replaced by the per-sample gradients
    themselves (`Record.materialised`) for those examples for which `choice` says so, which frees the layer's input and
    output gradient at once: see `dpkernels.nn.recording.choice`. With fake tensors, all frames of the batch count for
    each. `mixed` is `Choice(mixed=True)`.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]] = (),
        *,
        mixed: bool = False,
        choice: Choice | None = None,
    ) -> None:
        self.choice = Choice(mixed=mixed) if choice is None else choice
        # What was chosen for the records of the last backward, in its order. NOT PRIVATE.
        self.chosen: list[Chosen] = []
        self._names: dict[nn.Parameter, str] = {p: name for name, p in parameters}
        self._records: list[Record] = []
        # the first record of each rule and its parameters: a later use that it absorbs is not kept
        self._first: dict[tuple[type[Record], tuple[nn.Parameter, ...]], Record] = {}
        self._batch_size: int | None = None
        self._sink: Callable[[Record], None] | None = None
        self._unit = 1
        self._sunk: set[nn.Parameter] = set()
        self._uses: Counter[nn.Parameter] = Counter()
        self._recording = True
        # Batch size of the current forward: that of the root module's first tensor argument. Only shared tensors
        # (position tables, raw parameters) need it; `add` checks the batch size of their records.
        self.forward_batch_size: int | None = None
        self._outer_sizes: list[int | None] = []
        # Evidence of the batch axis, for arguments of layers that need to know it.
        self.axes = BatchAxes()
        # Batch axes of output gradients, by the layer's parameters and the number of the backward: see `batch_axis`.
        self._gradient_axes: dict[tuple[tuple[nn.Parameter, ...], int], int] = {}
        self._proposed_axes: dict[tuple[tuple[nn.Parameter, ...], int], int] = {}
        self._axis_calls: Counter[tuple[nn.Parameter, ...]] = Counter()
        # Whether forwards at other batch sizes are still to be run (`ask`); whether they are running.
        self.needs_to_ask = False
        self.asking = False
        # Receives every record as the layer's backward adds it: the row check.
        self.inspector: Inspector | None = None
        # The layers' calls in compiled graphs.
        self.compiled = CompiledCalls()
        # Called before and after every forward of the root module: the engine checks its parameters.
        self.before_forward: Callable[[], None] | None = None
        self.after_forward: Callable[[], None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: a copied model is an ordinary model, whose layers hold no tape until it is attached."""
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_no_tape, ())

    @property
    def mixed(self) -> bool:
        """Whether gradients of every layer are materialised where that takes less memory (`Choice.mixed`)."""
        return self.choice.mixed

    @property
    def recording(self) -> bool:
        """False inside `paused()`: the layers then run as their torch classes do."""
        return self._recording

    @property
    def is_open(self) -> bool:
        """Whether a backward may add records now."""
        return self._batch_size is not None

    @property
    def examples(self) -> int | None:
        """Batch size of the current forward, also of one that a backward recomputes; None outside of both."""
        return self._batch_size if self.forward_batch_size is None else self.forward_batch_size

    @property
    def batch_size(self) -> int | None:
        """Number of examples in the current backward; None outside of one."""
        return self._batch_size

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the layers as torch's within this context: autograd fills `.grad`, and nothing is recorded."""
        before, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = before

    def enter_forward(self, batch_size: int | None) -> None:
        """As begin_forward, for a root module whose forward may call itself: `leave_forward` restores the outer one."""
        self._outer_sizes.append(self.forward_batch_size)
        if len(self._outer_sizes) > 1:
            self.forward_batch_size = batch_size
        else:
            self.begin_forward(batch_size)

    def leave_forward(self) -> None:
        """End a forward of the root module: restore the batch size of the forward around it, or None."""
        self.forward_batch_size = self._outer_sizes.pop() if self._outer_sizes else None

    def begin_forward(self, batch_size: int | None) -> None:
        """Begin a forward of the root module over `batch_size` examples."""
        self.forward_batch_size = batch_size
        self.axes.begin_forward()
        self.compiled.begin_forward()

    def ask(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int) -> None:
        """Run the model's forward at other batch sizes than this one's, once, as evidence for `axes`."""
        self.needs_to_ask = False
        self.asking = self.axes.asking = True
        try:
            for rows in run_at_other_sizes(model, self.axes, args, kwargs, size, self.paused):
                self.begin_forward(rows)
        finally:
            self.asking = self.axes.asking = False
            self.compiled.discard()
            self.begin_forward(size)

    def used(self) -> Iterable[nn.Parameter]:
        """The trained parameters that were used in the forwards since the last backward."""
        return self._uses.keys()

    def batch_axis(self, parameters: tuple[nn.Parameter, ...], g: Tensor, features: int = 1) -> int:
        """The axis of a layer's output gradient that is the batch: 0, or 1 for layers called with [T,B,*].

        features: number of last axes that belong to the layer, and are never the batch.

        The layer's input does not decide it: T may equal B. The axis is 1 if only axis 1 has the batch's size, or if
        the row check finds the gradient of each example's loss at one index of axis 1. Once the row check has
        confirmed an axis, the tape remembers it for this backward of the layer.
        """
        number = self._axis_calls.get(parameters, 0)
        self._axis_calls[parameters] = number + 1
        call = (parameters, number)
        if self._gradient_axes and (known := self._gradient_axes.get(call)) is not None:
            return known
        shape, size = g.shape, self._batch_size
        axes = len(shape) - features
        first, second = axes > 0 and shape[0] == size, axes > 1 and shape[1] == size
        axis = int(second and not first)
        unclear = first and second and shape[0] > 1
        if self.inspector is not None:
            if unclear:
                axis = self.inspector.see_axes(call, g)
            self._proposed_axes[call] = axis
        elif unclear:
            others = {axis for (known, _), axis in self._gradient_axes.items() if known == parameters}
            axis = others.pop() if len(others) == 1 else 0
        return axis

    def confirm_axes(self, without: Container[tuple[tuple[nn.Parameter, ...], int]] = ()) -> None:
        """Remember the axes that `batch_axis` proposed under an inspector, except those of the calls `without`."""
        self._gradient_axes |= {
            call: axis for call, axis in self._proposed_axes.items() if call not in without
        }
        self._proposed_axes = {}

    def note_use(self, parameters: Iterable[Tensor]) -> None:
        """Count a use of each parameter in a forward (one recomputed within the backward does not count)."""
        if self._batch_size is None and not self.asking:
            uses = self._uses
            for p in parameters:
                if isinstance(p, nn.Parameter):
                    uses[p] = uses.get(p, 0) + 1  # `+=` calls Counter's __missing__

    def used_once(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether each of these parameters was used once in the forwards since the last backward."""
        return all(self._uses.get(p) == 1 for p in parameters)

    def open(self, batch_size: int, sink: Callable[[Record], None] | None = None, *, unit: int = 1) -> None:
        """Start to take the records of a backward over `batch_size` samples. Raises RuntimeError if already open.

        unit: so many consecutive samples are clipped together, and are materialised or kept together.
        """
        if self.is_open:
            raise RuntimeError("Tape.open: the tape is already open; close() or discard() it first")
        if batch_size < 0:
            raise ValueError(f"Tape.open: batch_size must be >= 0, got {batch_size}")
        self._batch_size = batch_size
        self._sink, self._unit = sink, unit
        self.chosen = []
        self._records, self._first = [], {}
        self._sunk = set()
        self.compiled.begin()
        self._axis_calls.clear()
        self._outer_sizes.clear()
        self.axes.begin_forward()  # for the forwards that checkpoints recompute
        if self.inspector is not None:
            self.inspector.begin()

    def add(self, record: Record) -> None:
        """Take one record.

        Raises RuntimeError if the tape is not open or a parameter of the record is not the model's, and
        ValueError if the record has another batch size than the backward.
        """
        if self._batch_size is None:
            raise RuntimeError(outside_message(record.layer))
        if record.batch_size != self._batch_size:
            raise ValueError(
                f"{record.layer!r}: its input has batch {record.batch_size}, but there are {self._batch_size} losses: "
                "the input is broadcast over the batch, or batch and time were folded together, so its gradient "
                "cannot be split by example. Give it an input whose first dimension is the batch "
                f"({self._batch_size}), or freeze it (requires_grad_(False))"
            )
        parameters = record.parameters
        if self._names:
            for parameter in parameters:
                if parameter not in self._names:
                    raise RuntimeError(
                        f"{record.layer!r}: it used a tensor of shape {tuple(parameter.shape)} which is not "
                        "one of the attached parameters: a parameter was replaced, parametrised or substituted "
                        "after attach. Detach and attach again"
                    )
        if self._sunk and not self._sunk.isdisjoint(parameters):
            raise RuntimeError(
                f"{record.layer!r}: a second record of a parameter whose first record was already "
                "consumed: several forwards share this backward. Use strategy='bookkeeping', or one "
                "forward per backward"
            )
        if self.inspector is not None and not self.inspector.see(record):
            return
        parts = self._parts(record)
        if self._sink is None or not self.used_once(record.parameters):
            for part in parts:
                first = self._first.setdefault((type(part), part.parameters), part)
                if first is part or not first.absorb(part):
                    self._records.append(part)
            return
        self._sunk.update(parameters)
        for part in parts:
            self._sink(part)

    def _parts(self, record: Record) -> tuple[Record, ...]:
        """The record, its per-sample gradients, or a record that has some examples of each."""
        if not self.used_once(record.parameters):
            return (record,)  # the uses are merged: for a few of them that is cheaper without materialising
        materialise = self._materialises(record)
        if isinstance(materialise, Tensor):
            return (SplitRecord.of(record, materialise),)
        return record.materialised() if materialise else (record,)

    def _materialises(self, record: Record) -> bool | Tensor:
        """Whether all examples' gradients are materialised or none, or else which examples' ([B] bool)."""
        given = record.chosen_by()
        if given:
            found, row = decide(self.choice, record.layer, given, self._unit)
            record.may_share_input = row.least is None
            self.chosen.append(row)
            return found
        entries = record.entries()
        if entries is None or not (self.choice.mixed or record.materialises_by_default):
            return False
        limit = record.held_bytes() // 2 if self.choice.mixed else record.worth_materialising_bytes()
        return MATERIALISED_BYTES * entries * record.batch_size <= limit

    def close(self, *, again: bool = False) -> list[Record]:
        """End the backward and return its records, merged so that each parameter is in exactly one of them.

        again: another backward over the same forward follows, so the forward's uses stay counted.

        Raises RuntimeError if the tape is not open or a compiled graph lost a record, and TypeError naming both layers
        if two uses cannot be merged exactly.
        """
        if not self.is_open:
            raise RuntimeError("Tape.close: the tape is not open")
        records, uses = self._records, self._uses.copy()
        try:
            self.compiled.check(again=again)
        except RuntimeError:
            self.discard()
            raise
        self._end()
        if again:
            self._uses = uses
        records.reverse()  # popped one at a time, so that each record is freed as soon as it is stacked
        return merge_records(records.pop() for _ in range(len(records)))

    def discard(self) -> None:
        """Drop all records and close the tape. Never raises, since error handlers call it."""
        self._end()
        self.compiled.discard()

    def _end(self) -> None:
        self._records, self._first = [], {}
        self._batch_size = None
        self._sink = None
        self._sunk = set()
        self._uses.clear()
        self._axis_calls.clear()
        self.axes.begin_forward()
        self.compiled.end()


def outside_message(layer: str) -> str:
    """The error message for a backward that reaches a layer while no tape is open, with the fix."""
    return (
        f"{layer!r}: a backward reached this private layer outside of optimizer.backward(losses). Call that with the "
        "per-example losses, in place of loss.backward(). To train another model through this one (a generator), "
        "freeze this one meanwhile: model.requires_grad_(False), and True again before its own forward"
    )


def _no_tape() -> None:
    return None


def merge_records(records: Iterable[Record]) -> list[Record]:
    """Merge the records that share parameters, in the order of first use; takes time linear in their number."""
    groups: list[list[Record]] = []  # the uses of the same parameters
    place: dict[nn.Parameter, int] = {}
    for record in records:
        places = {place.get(p) for p in record.parameters}
        if places == {None}:
            place.update(dict.fromkeys(record.parameters, len(groups)))
            groups.append([record])
            continue
        if len(places) == 1:
            (index,) = places
            assert index is not None
            if set(groups[index][0].parameters) == set(record.parameters):
                groups[index].append(record)
                continue
        first = groups[min(i for i in places if i is not None)][0]
        raise TypeError(
            f"{first.layer!r} and {record.layer!r} share some of their trained parameters but not all, so their "
            "per-sample gradients cannot be combined exactly. Untie them, or freeze the shared parameter"
        )
    merged = []
    for group in groups:
        merged.append(_merged(group))
        group.clear()
    return merged


def _merged(uses: list[Record]) -> Record:
    """Merge the uses of each rule first, then the resulting records."""
    rules: dict[type[Record], list[Record]] = {}
    for use in uses:
        rules.setdefault(type(use), []).append(use)
    stacked = [first.merge(*rest) if rest else first for first, *rest in rules.values()]
    return stacked[0].merge(*stacked[1:]) if len(stacked) > 1 else stacked[0]
