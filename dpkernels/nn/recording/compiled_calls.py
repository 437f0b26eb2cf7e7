"""What the tape knows of layers in compiled graphs: the calls that wait for their backward, and who must come back.

A compiler may drop, merge or move what it takes for pure arithmetic. So every forward of the model has an *anchor*, a
scalar that every compiled call takes, and whose gradient is the number of calls that the graph came back through.
Outside of the graph the anchor is the output of `_Reached`, which autograd calls after the last compiled backward of
that forward, also if the graph dropped the gradient. When a backward ends, three numbers must agree for each layer of
the forwards that it reached: its calls in the forward, its records, and what the graph counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

_CALLS = count()


@dataclass
class Call:
    """One call of a layer in a compiled graph: its tensors as leaves, and its outputs with the layer's own graph.

    Args:
        layer: its label.
        site: the place of the call in the graph.
        inputs: those of its tensors that need a gradient.
        parameters: those that it may use.
        outputs: its output tensors.
    """

    layer: str
    site: str
    inputs: list[Tensor]
    parameters: list[Tensor]
    outputs: list[Tensor]


@dataclass(eq=False)
class _Forward:
    """One forward of the model: the calls of each layer in compiled graphs; None while no backward has reached it."""

    calls: Counter[str] = field(default_factory=Counter)
    counted: float | None = None


class _Reached(torch.autograd.Function):
    """The anchor of a forward; its backward notes what the graphs counted, 0 if they dropped the gradient."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, forward: _Forward) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.reached = forward
        return leaf.clone()

    @staticmethod
    @torch.compiler.disable(reason="the count of compiled backwards is kept outside of any graph")
    def backward(ctx: Any, counted: Tensor | None) -> tuple[None, None]:
        forward = ctx.reached
        forward.counted = (forward.counted or 0.0) + (0.0 if counted is None else float(counted))
        return None, None


class CompiledCalls:
    """The calls of one tape's layers in compiled graphs, from their forwards to the end of the backward.

    Attributes:
        leaf: a scalar that all anchors come from, so that a graph has one leaf that is no parameter of the model.
        anchor: of the present forward; every call takes it.
        outside: classes of layers that ran as eager code beside a compiled graph, of which the user has been told.
    """

    def __init__(self) -> None:
        self.leaf = torch.zeros((), requires_grad=True)
        self._waiting: dict[int, Call] = {}
        self._recorded: Counter[str] = Counter()
        self._is_open = False
        self.outside: set[str] = set()
        # The forwards whose graphs are alive, and the present one, which is expected even if its graph has no backward.
        self._forwards: WeakSet[_Forward] = WeakSet()
        self._renew()

    def _renew(self) -> None:
        self._present = _Forward()
        self._forwards.add(self._present)
        with torch.enable_grad():
            self.anchor: Tensor = _Reached.apply(self.leaf, self._present)

    def begin_forward(self) -> None:
        """Begin to count the calls of another forward of the model."""
        if self._present.calls:  # else no compiled graph has run with this anchor
            self._renew()

    def wait(self, call: Call) -> Tensor:
        """Keep a call until nobody holds its key, which the graph keeps for its backward; returns the key."""
        number = next(_CALLS)
        self._waiting[number] = call
        if not self._is_open:  # a checkpoint recomputes calls within the backward: they are no further ones
            self._present.calls[call.layer] += 1
        key = torch.tensor(number)
        weakref.finalize(key, self._waiting.pop, number, None).atexit = False
        return key

    def take(self, key: Tensor, layer: str, site: str) -> Call:
        """The call of this key, whose backward runs now. It stays: another backward may follow over the same forward.

        Args:
            key: as the graph kept it.
            layer: label of the layer whose backward this is.
            site: of the call whose backward this is.

        Raises:
            RuntimeError: the call is gone, since the graph kept another tensor than the key, or it is another's.
        """
        call = self._waiting.get(int(key))
        if call is None:
            raise RuntimeError(
                "torch.compile: the forward of a compiled private layer is gone before its backward: this backend does "
                "not keep the tensors that an op saves. Compile with another backend, or train without torch.compile"
            )
        if (call.layer, call.site) != (layer, site):
            raise RuntimeError(
                f"torch.compile: the backward of {layer!r} got what a forward of {call.layer!r} kept: the graph "
                "exchanged two calls. Train without torch.compile, and report this"
            )
        self._recorded[layer] += 1
        return call

    @property
    def in_use(self) -> bool:
        """Whether the backward of a compiled layer has run in this backward."""
        return bool(self._recorded)

    def begin(self) -> None:
        """Begin to count: a backward starts."""
        self._is_open = True
        self._recorded = Counter()
        for forward in self._forwards:
            forward.counted = None

    def check(self, *, again: bool = False) -> None:
        """Raise RuntimeError if a record of this backward was lost in a graph, or recorded twice.

        again: another backward follows over the same forward. This one may go to some inputs only, past the anchor; it
        is then not checked.
        """
        reached = [forward for forward in self._forwards if forward.counted is not None]
        if again and not reached:
            return
        calls: Counter[str] = Counter()
        for forward in reached or [self._present]:
            calls.update(forward.calls)
        counted = sum(forward.counted or 0.0 for forward in reached)
        if self._recorded.total() != counted:
            raise RuntimeError(
                f"torch.compile: the backwards of {self._recorded.total()} calls of compiled private layers ran, but "
                f"the graph counted {counted:g}: it repeated or dropped some. Train without torch.compile, and report "
                "this"
            )
        if lost := sorted((calls - self._recorded).keys()):
            raise RuntimeError(
                f"torch.compile: {', '.join(map(repr, lost[:5]))} ran in the compiled forward, and no backward "
                "reached them: their outputs do not lead to the losses, or the graph lost their records. Freeze these "
                "layers (requires_grad_(False)), run forwards that are not trained on under torch.no_grad(), or train "
                "without torch.compile"
            )
        if more := sorted((self._recorded - calls).keys()):
            raise RuntimeError(
                f"torch.compile: {', '.join(map(repr, more[:5]))} left more records than there were calls in the "
                "forward: the graph repeated them. Train without torch.compile, and report this"
            )
        if self._present in reached and not again:
            self._renew()  # for calls outside of the model's own forward

    def end(self) -> None:
        """End the backward. Calls whose graph is alive keep waiting: their backward may follow."""
        self._is_open = False
        self._recorded = Counter()

    def discard(self) -> None:
        """End the backward, and expect no call of the present forward any more."""
        self.end()
        if self._present.calls:
            self._renew()
