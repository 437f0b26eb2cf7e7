"""The row check: row i of every record must come from example i, and from no other example.

Clipping takes row i of every layer's output gradient for the gradient of loss i. Whether it is depends on the model,
and shapes do not show it: a tensor that all examples share may have as many rows as there are examples, the model may
sort rows by length, and a statistic may mix them. So the check compares gradients. A backward is linear in the gradient
it starts from. If it starts from Σ_i w_i·loss_i instead of Σ_i loss_i, row i of a record is multiplied by w_i, provided
that loss i reaches the row and no other loss does. The weights are powers of two of either sign, in an order drawn anew
for each check.

    backward from w     g'      only projections u'_i = ⟨g'_i, r⟩ are kept, [B] numbers a record
    backward from 1     g       u'_i = w_i·⟨g_i, r⟩ up to rounding, or RowError is raised before anything is summed

A check costs one more backward. It is due in a model's 1st, 2nd, 4th, 8th, ... backward, in the first backward after
the 1st, 2nd, 4th, ... step, and whenever a parameter is used whose gradient no check has seen, or an axis is an
assumption. A backward of one example needs no check. The check cannot see an example whose *forward* reads another one
past autograd, or before any trained layer: the batch-independence check covers that.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dpkernels.errors import UserError
from dpkernels.nn.batch.batch_axis import has_values
from dpkernels.nn.recording.records import Record
from dpkernels.nn.recording.tape import Tape
from dpkernels.nn.tensors import accumulation_dtype

Call = tuple[tuple[nn.Parameter, ...], int]
"""A record's parameters, and the record's number among theirs in a backward."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_HALF_TOLERANCE = 2.0**-4
"""Relative to a row's norm: the change that another order of additions on a GPU, or a recomputation, may cause. A
statistic over 64 rows changes rows by tens of per cent."""


class RowError(UserError, RuntimeError):
    """Rows of a layer's output gradient do not belong to one example each."""


class RowCheck:
    """Checks the backwards of one tape whenever a check is due.

    Attributes:
        seen: trained parameters whose gradients passed a check, one row per example, in some backward.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._backwards = 0
        self._steps = 0
        self._stepped = False
        self.seen: set[nn.Parameter] = set()

    def note_step(self) -> None:
        """Note that a step changed the parameters: a gate that was 0 may now let another path's gradient through."""
        self._steps += 1
        self._stepped = not self._steps & (self._steps - 1)

    def due(self, losses: Tensor) -> bool:
        """Whether the next backward, of losses [B], is to be checked; counts that backward."""
        self._backwards += 1
        scheduled = not self._backwards & (self._backwards - 1) or self._stepped
        self._stepped = False
        unseen = any(parameter not in self.seen for parameter in self._tape.used())
        planned = not has_values(losses)  # memory is planned for a backward with a check
        return len(losses) > 1 and (scheduled or unseen or planned or self._tape.axes.assumed)

    @contextmanager
    def checking(self, losses: Tensor) -> Iterator[None]:
        """Run a backward from random weights; compare it with the next backward of `losses` [B] within this context.

        Raises:
            RowError: naming the layer, if a row contains a part of another example's gradient, or lacks one of its own.
        """
        weights = _weights(len(losses), losses.device)
        first = _Weighted()
        self._backward(losses, weights, first)
        if first.ambiguous:
            # Both of the first two axes have the batch's size: a backward from 1 decides, then the first is repeated.
            chosen = _AxisChoice(weights, first.axes)
            self._backward(losses, torch.ones_like(weights), chosen)
            self._tape.confirm_axes(without=chosen.blank)
            first = _Weighted()
            self._backward(losses, weights, first)
        comparison = _Comparison(weights, first.projections, self._tape)
        self._tape.inspector = comparison
        try:
            yield
        finally:
            self._tape.inspector = None
        comparison.check_complete()
        self._tape.confirm_axes(without=comparison.blank)
        self._tape.axes.confirm()
        self.seen |= comparison.seen

    def _backward(self, losses: Tensor, weights: Tensor, inspector: _Weighted | _AxisChoice) -> None:
        """Run a backward from these weights that keeps no record and retains the graph."""
        tape = self._tape
        tape.inspector = inspector
        tape.open(len(losses))
        try:
            # Only for these inputs: the graph may extend into other models, whose gradients must stay as they are.
            used = list(tape.used()) or None
            with reentrant_checkpoints_named():
                torch.autograd.backward(losses, weights.to(losses.dtype), retain_graph=True, inputs=used)
            tape.close(again=True)
        except BaseException:
            tape.discard()
            raise
        finally:
            tape.inspector = None


@contextmanager
def reentrant_checkpoints_named() -> Iterator[None]:
    """Turn torch's error about gradients of some inputs through a reentrant checkpoint into a RowError with the fix."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise RowError(_unseen_message()) from error
        raise


def _weights(count: int, device: torch.device) -> Tensor:
    """±1, ±½, ±¼ and ±⅛ in random order, all different up to 8, both signs from two on; [count] float32.

    Powers of two scale a row exactly in any dtype.
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
    """Inspects the backward from weights: keeps projections, and no record."""

    def __init__(self) -> None:
        self._calls = _Calls()
        self.projections: dict[Call, tuple[Tensor, Tensor]] = {}
        self.axes: dict[Call, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}

    def begin(self) -> None:
        """Do nothing: there is only one backward."""

    @property
    def ambiguous(self) -> bool:
        return bool(self.axes)

    def see(self, record: Record) -> bool:
        self.projections[self._calls.of(record)] = _project(record.output_gradient)
        return False

    def see_axes(self, call: Call, g: Tensor) -> int:
        self.axes[call] = _project(g), _project(g.transpose(0, 1))
        return 0


class _AxisChoice:
    """Inspects the backward from 1: finds which of two axes carries the weights."""

    def __init__(
        self, weights: Tensor, axes: dict[Call, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]
    ) -> None:
        self._weights, self._axes = weights, axes
        # Calls whose gradients are 0, so that their axis stays undecided.
        self.blank: set[Call] = set()

    def begin(self) -> None:
        """Do nothing: there is only one backward."""

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
    """Inspects the backward that is summed: compares each record's rows with those of the backward from weights."""

    def __init__(self, weights: Tensor, projections: dict[Call, tuple[Tensor, Tensor]], tape: Tape) -> None:
        self._weights = weights
        self._expected = projections
        self._tape = tape
        self._calls = _Calls()
        self._backwards = 0
        self.seen: set[nn.Parameter] = set()
        self.blank: set[Call] = set()

    def begin(self) -> None:
        """Count the backward: only the first is compared. The norms of two_pass's second must repeat the first's."""
        self._backwards += 1

    def see(self, record: Record) -> bool:
        """Return True, so that the tape takes the record; raise RowError if its rows are not the examples'."""
        if self._backwards > 1:  # the second of two_pass, whose norms must repeat the first's
            return True
        expected = self._expected.pop(self._calls.of(record), None)
        if expected is None:
            raise RowError(_unseen_message(record.layer))
        g = record.output_gradient
        if not has_values(g):  # memory is planned: the check's backward has to run, its result is not needed
            self.seen.update(record.parameters)
            return True
        now = _project(g)
        wrong = _differ(self._weights, expected, now, g.dtype)
        if bool(wrong.any()):
            raise RowError(_message(record, int(wrong.count_nonzero()), compiled=self._tape.compiled.in_use))
        if int(now[1].count_nonzero()) > 1:
            self.seen.update(record.parameters)
        return True

    def see_axes(self, call: Call, g: Tensor) -> int:
        self.blank.add(call)  # the first two backwards did not decide: the layer has no gradient
        return 0

    def check_complete(self) -> None:
        """Raise RowError if the backward from weights had a gradient that this one lacks."""
        remaining = self._expected.items()
        missing = [p for (p, _), (_, norms) in remaining if has_values(norms) and bool((norms > 0).any())]
        if missing:
            raise RowError(
                f"{len(missing)} layers had a gradient in one of two backwards of the same losses and none in the "
                "other: a recomputed forward (of a checkpoint) differs from the first. Make it repeat the first exactly"
            )


def _differ(
    weights: Tensor, weighted: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """[B] bool: the rows for which ⟨g'_i, r⟩ is not w_i·⟨g_i, r⟩. Rows that are not finite are not compared: clipping
    sets them to zero."""
    w = weights.double().to(plain[0].device)
    limit = _TOLERANCE.get(dtype, _HALF_TOLERANCE) * (weighted[1] + w.abs() * plain[1])
    # A very confident example has gradients below the dtype's normal numbers, whose relative rounding error is larger.
    limit += 1e3 * torch.finfo(dtype).tiny if dtype is not torch.float16 else 0.0
    finite = weighted[1].isfinite() & plain[1].isfinite()
    return finite & ~((weighted[0] - w * plain[0]).abs() <= limit)


def _unseen_message(layer: str | None = None) -> str:
    return (
        f"{'a checkpointed block' if layer is None else repr(layer)}: its gradient cannot be compared "
        "between two backwards of the same losses, so the row check cannot find out which row belongs to which "
        "example. A checkpoint with use_reentrant=True hides its layers from the forward: use "
        "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or "
        'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}). Nothing was spent'
    )


def _message(record: Record, rows: int, *, compiled: bool) -> str:
    recomputed = (
        "the compiled graph recomputes a checkpointed layer with dropout (LoRA's), which then draws another mask: "
        "train without torch.compile, without checkpointing, or with this dropout at 0"
        if compiled
        else "a recomputed forward draws other random numbers (checkpoint with preserve_rng_state=False)"
    )
    return (
        f"{record.layer!r}: {rows} of the {record.batch_size} rows of its output gradient do not belong to one example "
        "each, so clipping row by row would not bound the contribution of an example (the count is NOT PRIVATE). "
        "Likely causes: its first dimension is not the batch but happens to have its size (positions, a mask, "
        "prototypes that all examples share), the model reorders rows (sorts them by length), it mixes examples (a "
        f"statistic over the batch), or {recomputed}. Give the layer an input whose first dimension is the batch, in "
        "the batch's order, or freeze it (requires_grad_(False)). If the size is a coincidence, call "
        "engine.self_check(loss_fn, batch) with a batch of another size first. Nothing was spent"
    )
