"""The tape: what the layers of one private model saw in one backward.

A layer never clips anything. Its backward puts a record on the tape, and whoever opened the tape (the engine)
takes the records, asks them for norms and then for weighted sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from dpkernels.nn.records import Record

_FORMED_BYTES = 4  # of an entry of a formed gradient: float32


class Tape:
    """Collects the records of one backward.

    `open` before the backward, `close` after it. One tape serves one model; `dpkernels.nn.attach` makes it.

    Streaming: with `open(batch_size, sink=f)`, a record whose parameters were used once in the forward is
    handed to `f` the moment its layer's backward makes it, and is not kept (two-pass and per-layer clipping
    need this to hold little memory). Records of tied or reused parameters are kept and merged by `close` as
    ever. A second backward over the same forward needs `close(again=True)` after the first.

    Forming: a record of parameters that were used once in the forward is replaced by the per-sample gradients
    themselves where these are at most half as large (`Record.formed`), which then frees the layer's input and
    output gradient at once: records of every kind with `keep_small`, else those that form by default.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]] = (), *, keep_small: bool = False
    ) -> None:
        self._keep_small = keep_small
        self._names: dict[nn.Parameter, str] = {p: name for name, p in parameters}
        self._records: list[Record] = []
        self._batch_size: int | None = None
        self._sink: Callable[[Record], None] | None = None
        self._sunk: set[nn.Parameter] = set()
        self._uses: Counter[nn.Parameter] = Counter()
        self._recording = True
        # Batch size of the forward under way, as the root module's first tensor argument says. Only layers
        # whose input does not carry the batch (position tables) need it; what it leads to is checked in
        # `add`.
        self.forward_batch_size: int | None = None
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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the layers are torch's: plain autograd, `.grad` is filled, nothing is recorded."""
        before, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = before

    def note_use(self, parameters: Iterable[Tensor]) -> None:
        """Count a use of each parameter in a forward (one recomputed within the backward does not count)."""
        if self._batch_size is None:
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
        self._records = []
        self._sunk = set()

    def add(self, record: Record) -> None:
        """Take one record.

        Raises RuntimeError when the tape is not open or the record's parameter is not the model's, and
        ValueError when the record's batch is not the backward's.
        """
        if self._batch_size is None:
            raise RuntimeError(
                f"{record.layer}: a backward reached this private layer outside of "
                "optimizer.backward(losses). Call that, with the per-sample losses, not loss.backward(). To train "
                "another model through this one (a generator), freeze this one meanwhile: model.requires_grad_(False), "
                "and True again before its own forward"
            )
        if record.batch_size != self._batch_size:
            raise ValueError(
                f"{record.layer}: its input has batch {record.batch_size}, the losses have "
                f"{self._batch_size}: the input is broadcast over the batch, or batch and time were folded "
                "together, so that its gradient cannot be told apart by sample. Give it an input whose "
                f"first dimension is the batch ({self._batch_size}), or freeze it (requires_grad_(False))"
            )
        if self._names:
            for parameter in record.parameters:
                if parameter not in self._names:
                    raise RuntimeError(
                        f"{record.layer}: it used a tensor of shape {tuple(parameter.shape)} which is not "
                        "one of the parameters that were attached: replaced, parametrised or substituted "
                        "since. Detach and attach again"
                    )
        for parameter in record.parameters:
            if parameter in self._sunk:
                raise RuntimeError(
                    f"{record.layer}: a second record of a parameter whose first record was already "
                    "consumed: several forwards share this backward. Use strategy='bookkeeping', or one "
                    "forward a backward"
                )
        taken = record.formed() if self._is_smaller_formed(record) else (record,)
        if self._sink is None or any(self._uses[p] != 1 for p in record.parameters):
            self._records += taken
            return
        self._sunk.update(record.parameters)
        for part in taken:
            self._sink(part)

    def _is_smaller_formed(self, record: Record) -> bool:
        if not (self._keep_small or record.forms_by_default):
            return False
        entries = record.entries()
        if entries is None:
            return False
        if any(self._uses[p] != 1 for p in record.parameters):
            return False  # they are merged: with few uses that is cheaper in the form they have
        return 2 * _FORMED_BYTES * entries * record.batch_size <= record.held_bytes()

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
        return merge_records(records)

    def discard(self) -> None:
        """Drop everything; the tape is closed afterwards. Never raises: it is what an error handler calls."""
        self._records = []
        self._batch_size = None
        self._sink = None
        self._sunk = set()
        self._uses.clear()


def _no_tape() -> None:
    return None


def merge_records(records: Iterable[Record]) -> list[Record]:
    """Merge the records that share parameters, in the order of first use."""
    merged: list[Record] = []
    place: dict[nn.Parameter, int] = {}
    for record in records:
        places = {place.get(p) for p in record.parameters}
        if places == {None}:
            place.update(dict.fromkeys(record.parameters, len(merged)))
            merged.append(record)
            continue
        if len(places) == 1:
            (index,) = places
            assert index is not None
            if set(merged[index].parameters) == set(record.parameters):
                merged[index] = merged[index].merge(record)
                continue
        first = merged[min(i for i in places if i is not None)]
        raise TypeError(
            f"{first.layer} and {record.layer} share some of their trained parameters but not all; their "
            "per-sample gradients cannot be combined exactly. Untie them, or freeze the shared parameter"
        )
    return merged
