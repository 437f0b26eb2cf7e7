"""The tape: what the layers of one private model saw in one backward.

A layer never clips anything. Its backward puts a record on the tape, and whoever opened the tape (the engine)
takes the records, asks them for norms and then for weighted sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from dpkernels.nn.batch.batch_axis import BatchAxes, ask_at_other_sizes
from dpkernels.nn.recording.records import Record

_MATERIALISED_BYTES = 4  # of an entry of a materialised gradient: float32


class Inspector(Protocol):
    """Sees what a backward's layers hand to the tape, before anything is done with it."""

    def begin(self) -> None:
        """A backward begins."""
        ...

    def see(self, record: Record) -> bool:
        """Whether the tape shall take this record."""
        ...

    def see_axes(self, call: tuple[tuple[nn.Parameter, ...], int], g: Tensor) -> int:
        """Which of the first two axes of an output gradient, both of the batch's size, is the batch."""
        ...


class Tape:
    """Collects the records of one backward.

    `open` before the backward, `close` after it. One tape serves one model; `dpkernels.nn.attach` makes it.

    Streaming: with `open(batch_size, sink=f)`, a record whose parameters were used once in the forward is
    handed to `f` the moment its layer's backward makes it, and is not kept (two-pass and per-layer clipping
    need this to hold little memory). Records of tied or reused parameters are kept and merged by `close` as
    ever. A second backward over the same forward needs `close(again=True)` after the first.

    Forming: a record of parameters that were used once in the forward is replaced by the per-sample gradients
    themselves where these are at most half as large (`Record.materialised`), which then frees the layer's input and
    output gradient at once: records of every kind with `mixed`, else those that form by default.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]] = (), *, mixed: bool = False) -> None:
        self.mixed = mixed
        self._names: dict[nn.Parameter, str] = {p: name for name, p in parameters}
        self._records: list[Record] = []
        # the first record of each rule and parameters: what it can absorb is not kept beside it
        self._first: dict[tuple[type[Record], tuple[nn.Parameter, ...]], Record] = {}
        self._batch_size: int | None = None
        self._sink: Callable[[Record], None] | None = None
        self._sunk: set[nn.Parameter] = set()
        self._uses: Counter[nn.Parameter] = Counter()
        self._recording = True
        # Batch size of the forward under way, as the root module's first tensor argument says. Only what examples share
        # (position tables, raw parameters) needs it; what it leads to is checked in `add`.
        self.forward_batch_size: int | None = None
        self._outer_sizes: list[int | None] = []
        # What was learnt of the arguments of layers that have to know which axis is the batch.
        self.axes = BatchAxes()
        # Of output gradients, by the layer's parameters and which of their backwards it is: see `batch_axis`.
        self._gradient_axes: dict[tuple[tuple[nn.Parameter, ...], int], int] = {}
        self._proposed_axes: dict[tuple[tuple[nn.Parameter, ...], int], int] = {}
        self._asked: Counter[tuple[nn.Parameter, ...]] = Counter()
        # Whether `axes` are to be asked at other batch sizes still; whether they are now.
        self.needs_to_ask = False
        self.asking = False
        # Told of every record as its layer's backward makes it: the row check.
        self.inspector: Inspector | None = None
        # Called around every forward of the root module; the engine watches its parameters.
        self.before_forward: Callable[[], None] | None = None
        self.after_forward: Callable[[], None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model is an ordinary model: its layers hold no tape until it is attached itself."""
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_no_tape, ())

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
        """Batch size of the forward under way, also where a backward computes it again; None outside of both."""
        return self._batch_size if self.forward_batch_size is None else self.forward_batch_size

    @property
    def batch_size(self) -> int | None:
        """Examples of the backward under way, None outside of one."""
        return self._batch_size

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the layers are torch's: plain autograd, `.grad` is filled, nothing is recorded."""
        before, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = before

    def enter_forward(self, batch_size: int | None) -> None:
        """As begin_forward, of a root whose forward may call itself: `leave_forward` goes back to the one around it."""
        self._outer_sizes.append(self.forward_batch_size)
        if len(self._outer_sizes) > 1:
            self.forward_batch_size = batch_size
        else:
            self.begin_forward(batch_size)

    def leave_forward(self) -> None:
        """A forward of the root ends: what is called past it has a batch of its own."""
        self.forward_batch_size = self._outer_sizes.pop() if self._outer_sizes else None

    def begin_forward(self, batch_size: int | None) -> None:
        """A forward of the root module over `batch_size` examples begins."""
        self.forward_batch_size = batch_size
        self.axes.begin_forward()

    def ask(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int) -> None:
        """Have `axes` see the model's tensors at other batch sizes than this forward's, once."""
        self.needs_to_ask = False
        self.asking = self.axes.asking = True
        try:
            for rows in ask_at_other_sizes(model, self.axes, args, kwargs, size, self.paused):
                self.begin_forward(rows)
        finally:
            self.asking = self.axes.asking = False
            self.begin_forward(size)

    def used(self) -> Iterable[nn.Parameter]:
        """The trained parameters that the forwards since the last backward used."""
        return self._uses.keys()

    def batch_axis(self, parameters: tuple[nn.Parameter, ...], g: Tensor, features: int = 1) -> int:
        """The axis of a layer's output gradient that is the batch: 0, or 1 for layers called with [T,B,*].

        features: how many of the last axes are the layer's own, and never the batch.

        A layer's input says nothing: T may be as large as B. The axis is 1 where only that has the batch's size, and
        where the row check found that an example's loss has its gradient in one index of axis 1; it is remembered for
        this backward of the layer when the row check has confirmed it.
        """
        call = (parameters, self._asked[parameters])
        self._asked[parameters] += 1
        known = self._gradient_axes.get(call)
        if known is not None:
            return known
        fits = [axis for axis in (0, 1) if g.dim() > axis + features and g.shape[axis] == self._batch_size]
        axis = fits[0] if len(fits) == 1 else 0
        if self.inspector is not None:
            if len(fits) == 2 and g.shape[0] > 1:
                axis = self.inspector.see_axes(call, g)
            self._proposed_axes[call] = axis
        elif len(fits) == 2 and g.shape[0] > 1:
            others = {axis for (known, _), axis in self._gradient_axes.items() if known == parameters}
            axis = others.pop() if len(others) == 1 else 0
        return axis

    def confirm_axes(self, without: Container[tuple[tuple[nn.Parameter, ...], int]] = ()) -> None:
        """What `batch_axis` has said under an inspector is right, and is remembered, except of the calls `without`."""
        self._gradient_axes |= {
            call: axis for call, axis in self._proposed_axes.items() if call not in without
        }
        self._proposed_axes = {}

    def note_use(self, parameters: Iterable[Tensor]) -> None:
        """Count a use of each parameter in a forward (one recomputed within the backward does not count)."""
        if self._batch_size is None and not self.asking:
            for p in parameters:
                if isinstance(p, nn.Parameter):
                    self._uses[p] += 1

    def open(self, batch_size: int, sink: Callable[[Record], None] | None = None) -> None:
        """Start taking the records of a backward over `batch_size` samples. Raises RuntimeError if open."""
        if self.is_open:
            raise RuntimeError("Tape.open: the tape is already open; close() or discard() it first")
        if batch_size < 0:
            raise ValueError(f"Tape.open: batch_size must be >= 0, got {batch_size}")
        self._batch_size = batch_size
        self._sink = sink
        self._records, self._first = [], {}
        self._sunk = set()
        self._asked.clear()
        self._outer_sizes.clear()
        self.axes.begin_forward()  # of what checkpoints compute again
        if self.inspector is not None:
            self.inspector.begin()

    def add(self, record: Record) -> None:
        """Take one record.

        Raises RuntimeError when the tape is not open or the record's parameter is not the model's, and
        ValueError when the record's batch is not the backward's.
        """
        if self._batch_size is None:
            raise RuntimeError(outside_message(record.layer))
        if record.batch_size != self._batch_size:
            raise ValueError(
                f"{record.layer!r}: its input has batch {record.batch_size}, the losses have "
                f"{self._batch_size}: the input is broadcast over the batch, or batch and time were folded "
                "together, so that its gradient cannot be told apart by sample. Give it an input whose "
                f"first dimension is the batch ({self._batch_size}), or freeze it (requires_grad_(False))"
            )
        if self._names:
            for parameter in record.parameters:
                if parameter not in self._names:
                    raise RuntimeError(
                        f"{record.layer!r}: it used a tensor of shape {tuple(parameter.shape)} which is not "
                        "one of the parameters that were attached: replaced, parametrised or substituted "
                        "since. Detach and attach again"
                    )
        for parameter in record.parameters:
            if parameter in self._sunk:
                raise RuntimeError(
                    f"{record.layer!r}: a second record of a parameter whose first record was already "
                    "consumed: several forwards share this backward. Use strategy='bookkeeping', or one "
                    "forward a backward"
                )
        if self.inspector is not None and not self.inspector.see(record):
            return
        taken = record.materialised() if self._is_smaller_materialised(record) else (record,)
        if self._sink is None or any(self._uses[p] != 1 for p in record.parameters):
            for part in taken:
                first = self._first.setdefault((type(part), part.parameters), part)
                if first is part or not first.absorb(part):
                    self._records.append(part)
            return
        self._sunk.update(record.parameters)
        for part in taken:
            self._sink(part)

    def _is_smaller_materialised(self, record: Record) -> bool:
        if not (self.mixed or record.materialises_by_default):
            return False
        entries = record.entries()
        if entries is None:
            return False
        if any(self._uses[p] != 1 for p in record.parameters):
            return False  # they are merged: with few uses that is cheaper in the form they have
        return 2 * _MATERIALISED_BYTES * entries * record.batch_size <= record.held_bytes()

    def close(self, *, again: bool = False) -> list[Record]:
        """End the backward; the records, merged so that each parameter is in exactly one of them.

        again: another backward over the same forward follows, so the forward's uses stay counted.

        Raises RuntimeError when not open, TypeError naming both layers where two uses cannot be merged
        exactly.
        """
        if not self.is_open:
            raise RuntimeError("Tape.close: the tape is not open")
        records, uses = self._records, self._uses.copy()
        self.discard()
        if again:
            self._uses = uses
        records.reverse()  # handed over one by one, so that what is stacked does not stay beside the stack
        return merge_records(records.pop() for _ in range(len(records)))

    def discard(self) -> None:
        """Drop everything; the tape is closed afterwards. Never raises: it is what an error handler calls."""
        self._records, self._first = [], {}
        self._batch_size = None
        self._sink = None
        self._sunk = set()
        self._uses.clear()
        self._asked.clear()
        self.axes.begin_forward()


def outside_message(layer: str) -> str:
    """What is wrong where a backward reaches a layer while no tape is open, and the fix."""
    return (
        f"{layer!r}: a backward reached this private layer outside of optimizer.backward(losses). Call that, with the "
        "per-sample losses, not loss.backward(). To train another model through this one (a generator), freeze this "
        "one meanwhile: model.requires_grad_(False), and True again before its own forward"
    )


def _no_tape() -> None:
    return None


def merge_records(records: Iterable[Record]) -> list[Record]:
    """Merge the records that share parameters, in the order of first use; at a cost linear in their number."""
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
            f"{first.layer!r} and {record.layer!r} share some of their trained parameters but not all; their "
            "per-sample gradients cannot be combined exactly. Untie them, or freeze the shared parameter"
        )
    merged = []
    for group in groups:
        merged.append(_merged(group))
        group.clear()
    return merged


def _merged(uses: list[Record]) -> Record:
    """Those of one rule at once, then what the rules made of them."""
    rules: dict[type[Record], list[Record]] = {}
    for use in uses:
        rules.setdefault(type(use), []).append(use)
    stacked = [first.merge(*rest) if rest else first for first, *rest in rules.values()]
    return stacked[0].merge(*stacked[1:]) if len(stacked) > 1 else stacked[0]
