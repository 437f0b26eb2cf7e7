"""The row check: is row i of every record example i, and of no other?

Clipping takes row i of every layer's output gradient for the gradient of loss i. That is a property of the model, not
of a shape: a tensor that all examples share may have as many rows as there are examples, rows may be sorted by length
within the model, a statistic may mix them. So the gradients are asked. Backward is linear in what it starts from:
back-propagated from Σ_i w_i·loss_i in place of Σ_i loss_i, row i of a record is w_i times what it was where loss i and
no other reaches it. The weights are powers of two of either sign, in an order drawn anew for each check.

    backward from w     g'      only projections u'_i = ⟨g'_i, r⟩ are kept, [B] numbers a record
    backward from 1     g       u'_i = w_i·⟨g_i, r⟩ but for rounding, or it is refused before anything is summed

A check costs one more backward. It is due in a model's 1st, 2nd, 4th, 8th, ... backward, in the first backward after
the 1st, 2nd, 4th, ... step, and whenever a parameter is used that no check has seen a gradient of, or an axis is an
assumption. A backward of one example needs none: no other is there. What it cannot see is an example whose *forward*
reads another one past autograd, or before any trained layer: that is the batch-independence check's.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dpkernels.nn.batch.batch_axis import has_values
from dpkernels.nn.recording.records import Record
from dpkernels.nn.recording.tape import Tape
from dpkernels.nn.tensors import accumulation_dtype

Call = tuple[tuple[nn.Parameter, ...], int]
"""A record's parameters, and which of their records in a backward it is."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_HALF_TOLERANCE = 2.0**-4
"""Of a row's norm: what another order of additions on a GPU, or a recomputation, may change. A statistic over 64 rows
changes them by tens of per cent."""


class RowError(RuntimeError):
    """Rows of a layer's output gradient are not the examples'."""


class RowCheck:
    """Checks the backwards of one tape when it is due.

    Attributes:
        seen: trained parameters whose gradients were found to be the examples' own, in some backward.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._backwards = 0
        self._steps = 0
        self._stepped = False
        self.seen: set[nn.Parameter] = set()

    def note_step(self) -> None:
        """The parameters were changed: a gate that was 0 may let another path's gradient through."""
        self._steps += 1
        self._stepped = not self._steps & (self._steps - 1)

    def due(self, losses: Tensor) -> bool:
        """Whether the coming backward of losses [B] is to be checked; counts it."""
        self._backwards += 1
        scheduled = not self._backwards & (self._backwards - 1) or self._stepped
        self._stepped = False
        unseen = any(parameter not in self.seen for parameter in self._tape.used())
        planned = not has_values(losses)  # memory is, of a backward that is checked
        return len(losses) > 1 and (scheduled or unseen or planned or self._tape.axes.assumed)

    @contextmanager
    def checking(self, losses: Tensor) -> Iterator[None]:
        """Within it the next backward of `losses` [B] is compared with one from random weights, which is made here.

        Raises:
            RowError: naming the layer, where a row has a part that is not its example's, or lacks one.
        """
        weights = _weights(len(losses), losses.device)
        first = _Weighted()
        self._backward(losses, weights, first)
        if first.ambiguous:
            # Both of the first two axes have the batch's size: a backward from 1 tells them apart, and then again.
            chosen = _Chosen(weights, first.axes)
            self._backward(losses, torch.ones_like(weights), chosen)
            self._tape.confirm_axes(without=chosen.blank)
            first = _Weighted()
            self._backward(losses, weights, first)
        comparison = _Comparison(weights, first.projections)
        self._tape.inspector = comparison
        try:
            yield
        finally:
            self._tape.inspector = None
        comparison.check_complete()
        self._tape.confirm_axes(without=comparison.blank)
        self._tape.axes.confirm()
        self.seen |= comparison.seen

    def _backward(self, losses: Tensor, weights: Tensor, inspector: _Weighted | _Chosen) -> None:
        """A backward from these weights that keeps no record; the graph stays."""
        tape = self._tape
        tape.inspector = inspector
        tape.open(len(losses))
        try:
            # To these alone: the graph may go on into other models, whose gradients this backward must not touch.
            used = list(tape.used()) or None
            torch.autograd.backward(losses, weights.to(losses.dtype), retain_graph=True, inputs=used)
            tape.close(again=True)
        except BaseException as error:
            tape.discard()
            if isinstance(error, RuntimeError) and "use_reentrant" in str(error):
                raise RowError(_unseen_message("a checkpointed block")) from error
            raise
        finally:
            tape.inspector = None


def _weights(count: int, device: torch.device) -> Tensor:
    """±1, ±½, ±¼ and ±⅛ in random order, no two alike up to 8, both signs from two on; [count] float32.

    Powers of two: in any type a row is scaled exactly.
    """
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    values = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.25, -0.25, 0.125, -0.125]).repeat(count // 8 + 1)[:count]
    return values[torch.randperm(count, generator=generator)].to(device)


def _project(g: Tensor) -> tuple[Tensor, Tensor]:
    """⟨g_i, r⟩ and ‖g_i‖ of g [B,*], float64 [B]; r is the product of two fixed random vectors of the rows' sizes."""
    if not g.numel() or not has_values(g):
        zeros = g.new_zeros(g.shape[0], dtype=torch.float64)
        return zeros, zeros
    rows = g.detach().reshape(g.shape[0], -1, g.shape[-1] if g.dim() > 1 else 1).to(accumulation_dtype(g))
    generator = torch.Generator().manual_seed(20_250_411)
    last, middle = (
        torch.randn(n, generator=generator, dtype=torch.float64).to(rows)
        for n in (rows.shape[2], rows.shape[1])
    )
    projection = ((rows @ last) @ middle).double()
    return projection, rows.flatten(1).norm(dim=1).double()


class _Calls:
    """Numbers the records of each group of parameters in a backward."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[nn.Parameter, ...]] = Counter()

    def of(self, record: Record) -> Call:
        call = (record.parameters, self._counts[record.parameters])
        self._counts[record.parameters] += 1
        return call


class _Weighted:
    """The backward from weights: keeps projections, and no record."""

    def __init__(self) -> None:
        self._calls = _Calls()
        self.projections: dict[Call, tuple[Tensor, Tensor]] = {}
        self.axes: dict[Call, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}

    def begin(self) -> None:
        """Nothing: it sees one backward."""

    @property
    def ambiguous(self) -> bool:
        return bool(self.axes)

    def see(self, record: Record) -> bool:
        self.projections[self._calls.of(record)] = _project(record.output_gradient)
        return False

    def see_axes(self, call: Call, g: Tensor) -> int:
        self.axes[call] = _project(g), _project(g.transpose(0, 1))
        return 0


class _Chosen:
    """The backward from 1: which of two axes has the weights."""

    def __init__(
        self, weights: Tensor, axes: dict[Call, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]
    ) -> None:
        self._weights, self._axes = weights, axes
        # Calls whose gradients are 0: they say nothing of their axis.
        self.blank: set[Call] = set()

    def begin(self) -> None:
        """Nothing: it sees one backward."""

    def see(self, record: Record) -> bool:
        return False

    def see_axes(self, call: Call, g: Tensor) -> int:
        if call not in self._axes:
            return 0
        first, second = self._axes[call]
        if not has_values(g) or not bool(first[1].any()):
            self.blank.add(call)
            return 0
        if not bool(_differ(self._weights, first, _project(g), g.dtype).any()):
            return 0
        return int(not bool(_differ(self._weights, second, _project(g.transpose(0, 1)), g.dtype).any()))


class _Comparison:
    """The backward that is summed: each record's rows against those of the backward from weights."""

    def __init__(self, weights: Tensor, projections: dict[Call, tuple[Tensor, Tensor]]) -> None:
        self._weights = weights
        self._expected = projections
        self._calls = _Calls()
        self._backwards = 0
        self.seen: set[nn.Parameter] = set()
        self.blank: set[Call] = set()

    def begin(self) -> None:
        """The first is compared; the second of two_pass is held to the first by its norms."""
        self._backwards += 1

    def see(self, record: Record) -> bool:
        """True: the tape takes the record, once its rows are found to be the examples'."""
        if self._backwards > 1:  # the second of two_pass, which is held to the first by its norms
            return True
        expected = self._expected.pop(self._calls.of(record), None)
        if expected is None:
            raise RowError(_unseen_message(record.layer))
        g = record.output_gradient
        if not has_values(g):  # memory is planned: the check's backward counts, its answer does not
            self.seen.update(record.parameters)
            return True
        now = _project(g)
        wrong = _differ(self._weights, expected, now, g.dtype)
        if bool(wrong.any()):
            raise RowError(_message(record, int(wrong.count_nonzero())))
        if int(now[1].count_nonzero()) > 1:
            self.seen.update(record.parameters)
        return True

    def see_axes(self, call: Call, g: Tensor) -> int:
        self.blank.add(call)  # what the first two backwards could not settle: the layer has no gradient
        return 0

    def check_complete(self) -> None:
        """Raise RowError where the backward from weights had a gradient that this one lacks."""
        left = self._expected.items()
        missing = [p for (p, _), (_, norms) in left if has_values(norms) and bool((norms > 0).any())]
        if missing:
            raise RowError(
                f"{len(missing)} layers had a gradient in one of two backwards of the same losses and none in the "
                "other: a recomputed forward reads something that changes. Make it repeat the forward"
            )


def _differ(
    weights: Tensor, weighted: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """[B] bool: the rows for which ⟨g'_i, r⟩ is not w_i·⟨g_i, r⟩. Rows that are not finite in either add nothing."""
    w = weights.double().to(plain[0].device)
    limit = _TOLERANCE.get(dtype, _HALF_TOLERANCE) * (weighted[1] + w.abs() * plain[1])
    # Of a very confident example: gradients below the type's normal numbers are rounded by more than a share of them.
    limit += 1e3 * torch.finfo(dtype).tiny if dtype is not torch.float16 else 0.0
    finite = weighted[1].isfinite() & plain[1].isfinite()
    return finite & ~((weighted[0] - w * plain[0]).abs() <= limit)


def _unseen_message(layer: str) -> str:
    return (
        f"{layer!r}: its gradient cannot be compared between two backwards of the same losses, so that nothing shows "
        "which of its rows is which example's. A checkpoint with use_reentrant=True hides its layers from the forward: "
        "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or model.gradient_checkpointing_enable("
        'gradient_checkpointing_kwargs={"use_reentrant": False}). Nothing was spent'
    )


def _message(record: Record, rows: int) -> str:
    return (
        f"{record.layer!r}: {rows} of the {record.batch_size} rows of its output gradient are not the gradients of one "
        "example's loss each, so that clipping row by row would not bound what an example adds (the count is NOT "
        "PRIVATE). Likely causes: its first dimension is not the batch but happens to have its size (positions, a "
        "mask, prototypes that all examples share), rows change places within the model (sorted by length), examples "
        "are mixed (a statistic over the batch), or a forward that is computed again draws other random numbers "
        "(checkpoint with preserve_rng_state=False). Give the layer an input whose first dimension is the batch, in "
        "the batch's order, or freeze it (requires_grad_(False)). Where the size is a coincidence, call "
        "engine.self_check(loss_fn, batch) with a batch of another size first. Nothing was spent"
    )
