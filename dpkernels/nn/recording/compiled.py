"""Ghost layers within torch.compile: one op in the graph for a layer's forward, and one for its backward.

A ghost layer's backward puts a record on the tape: Python code with an effect outside of the graph, which a compiler
would trace once and never run again. So a compiled graph does not contain the layer's code. It calls two ops that
torch.compile cannot look into:

    y, x', call = ghost_forward(x, parameters, anchor, layer's number)   runs the layer as eager code does
    dx, token = ghost_backward(g, x', call)                              runs its backward: the record is made here

What the layer does is therefore the same code, with the same bits, as without torch.compile; everything between the
layers is compiled. Between the two ops the call's own autograd graph waits in `CompiledCalls`, and `call` is its key.

**A record holds copies.** A compiler writes later results over a tensor that its graph no longer reads, and a record is
read after the whole backward. So the ops copy x (to x', which is what the graph keeps for its backward) and g.

**No record can be lost in the graph.** A compiler removes an op whose result nobody reads, and nobody reads dx of a
model's first layer. So every backward returns a token as well, its part of the gradient of the tape's `anchor`, a leaf
that requires grad: the graph has to compute the anchor's gradient. `CompiledCalls.check` compares that gradient with
the number of backwards that ran, and refuses a layer that ran in the forward and left no record.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dpkernels.nn.recording.module import GhostModule

# Every attached layer by its number. Numbers are never used again: a compiled graph holds them as constants.
_LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = count()
_CALLS = count()


@dataclass
class _Call:
    """One forward of a layer in a compiled graph: its inputs as leaves, and its output with the layer's own graph."""

    layer: str
    x: Tensor
    y: Tensor


class CompiledCalls:
    """The calls of one tape's layers in compiled graphs, from their forwards to the end of the backward.

    Attributes:
        anchor: scalar that every call takes; its gradient counts the calls whose backward ran.
    """

    def __init__(self) -> None:
        self.anchor = torch.zeros((), requires_grad=True)
        self._waiting: dict[int, _Call] = {}
        self._expected: set[str] = set()  # layers that ran; a graph without a backward keeps no key of theirs
        self._recorded: Counter[str] = Counter()

    def wait(self, call: _Call) -> Tensor:
        """Keep a call until nobody holds its key, which the graph keeps for its backward; returns the key."""
        number = next(_CALLS)
        self._waiting[number] = call
        self._expected.add(call.layer)
        key = torch.tensor(number)
        weakref.finalize(key, self._waiting.pop, number, None).atexit = False
        return key

    def begin(self) -> None:
        """Begin to count: a backward starts."""
        self._recorded = Counter()
        self.anchor.grad = None

    def take(self, key: Tensor) -> _Call:
        """The call of this key, whose backward runs now. It stays: another backward may follow over the same forward.

        Raises:
            RuntimeError: the call is gone, since the graph kept another tensor than the key.
        """
        call = self._waiting.get(int(key))
        if call is None:
            raise RuntimeError(
                "torch.compile: the forward of a compiled private layer is gone before its backward: this backend does "
                "not keep the tensors that an op saves. Compile with another backend, or train without torch.compile"
            )
        self._recorded[call.layer] += 1
        return call

    @property
    def in_use(self) -> bool:
        """Whether the backward of a compiled layer has run in this backward."""
        return bool(self._recorded)

    def check(self) -> None:
        """Raise RuntimeError if a record of this backward was lost in a graph, or recorded twice."""
        backwards = sum(self._recorded.values())
        counted = 0.0 if self.anchor.grad is None else float(self.anchor.grad)
        if backwards != counted:
            raise RuntimeError(
                f"torch.compile: the backwards of {backwards} compiled private layers ran, but the graph counted "
                f"{counted:g}: it repeated or dropped some. Train without torch.compile, and report this"
            )
        lost = sorted(self._expected - self._recorded.keys())
        if lost:
            raise RuntimeError(
                f"torch.compile: {', '.join(map(repr, lost[:5]))} ran in the compiled forward, and no backward "
                "reached them: their outputs do not lead to the losses, or the graph lost their records. Freeze these "
                "layers (requires_grad_(False)), run forwards that are not trained on under torch.no_grad(), or train "
                "without torch.compile"
            )

    def discard(self) -> None:
        """Expect no layer any more. Calls whose graph is alive keep waiting: their backward may follow."""
        self._expected, self._recorded = set(), Counter()
        self.anchor.grad = None


def number_layer(layer: Any) -> int:
    """Give a layer its number, by which graphs name it."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return number


def call_in_graph(layer: GhostModule, x: Tensor) -> Tensor:
    """layer(x), as one op of the graph that torch.compile traces now."""
    tape = layer.ghost_tape
    assert tape is not None
    assert isinstance(layer, nn.Module)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    tensors = [*layer.parameters(), *layer.buffers()]
    y, _, _ = _forward(x, tensors, tape.compiled.anchor, layer.ghost_number, x.requires_grad, dtype)
    return y


@torch.library.custom_op("dpkernels::ghost_forward", mutates_args=())
def _forward(
    x: Tensor, tensors: Sequence[Tensor], anchor: Tensor, layer: int, needs_x: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    module = _layer(layer)
    kept = x.clone()
    leaf = kept.detach().requires_grad_(needs_x)
    with _as_eager(x.device.type, dtype):
        y = module._ghost_call(leaf)
    if type(y) is not Tensor or not y.requires_grad:
        raise RuntimeError(
            f"torch.compile: {module.ghost_label()!r} returned a {type(y).__name__} that leads to no record, because "
            "all examples share its input: call it outside of the compiled graph (torch.compiler.disable)"
        )
    key = module.ghost_tape.compiled.wait(_Call(module.ghost_label(), leaf, y))
    y = y.detach()
    # A hook may have saved y for its own backward, and generated code writes over what the graph no longer reads.
    return (y.clone() if module._forward_hooks else y).contiguous(), kept, key


@_forward.register_fake
def _(
    x: Tensor, tensors: Sequence[Tensor], anchor: Tensor, layer: int, needs_x: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    # torch would free what a compiled backward keeps within its first run; the row check runs it twice.
    torch._functorch.config.donated_buffer = False
    module = _layer(layer)
    names = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    with module.ghost_tape.paused(), _autocast(x.device.type, dtype):
        y = torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), (x,))
    return y.new_empty(y.shape), torch.empty_like(x), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("dpkernels::ghost_backward", mutates_args=())
def _backward(g: Tensor, x: Tensor, key: Tensor, layer: int, needs_x: bool) -> tuple[Tensor, Tensor]:
    call = _layer(layer).ghost_tape.compiled.take(key)
    with _as_eager(g.device.type, None):
        torch.autograd.backward([call.y], [g := g.clone()], retain_graph=True)
    dx, call.x.grad = call.x.grad, None
    if not needs_x:
        return x.new_empty(0), torch.ones(())
    if dx is None:
        dx = torch.zeros_like(x)
    elif dx.stride() != x.stride() or dx.untyped_storage().data_ptr() == g.untyped_storage().data_ptr():
        dx = torch.empty_like(x).copy_(
            dx
        )  # with x's strides, and no view of an argument, as the graph expects
    return dx, torch.ones(())


@_backward.register_fake
def _(g: Tensor, x: Tensor, key: Tensor, layer: int, needs_x: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if needs_x else x.new_empty(0), torch.empty((), device="cpu")


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, tensors, _, ctx.layer, ctx.needs_x, _ = inputs
    ctx.tensors = len(tensors)
    ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
    x, key = ctx.saved_tensors
    dx, token = _backward(g, x, key, ctx.layer, ctx.needs_x)
    return (dx if ctx.needs_x else None), [None] * ctx.tensors, token, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def _layer(number: int) -> Any:
    module = _LAYERS.get(number)
    if module is None or module.ghost_tape is None:
        raise RuntimeError(
            "torch.compile: the private layer of this compiled graph is gone: the model was detached or deleted. "
            "Compile the model again after make_private"
        )
    return module


@contextmanager
def _as_eager(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Within an op: run code as outside of it, where autograd records, under the forward's autocast."""
    include = torch._C._dispatch_tls_local_include_set().add(torch._C.DispatchKey.ADInplaceOrView)
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        exclude = exclude.remove(key)
    with (
        torch._C._ForceDispatchKeyGuard(include, exclude),
        torch.enable_grad(),
        _autocast(device_type, dtype),
    ):
        yield


# Of the dispatcher: what an op excludes while its kernel runs, because autograd has already seen the op.
_AUTOGRAD_KEYS = tuple(
    getattr(torch._C.DispatchKey, name)
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")
)


def _autocast(device_type: str, dtype: torch.dtype | None) -> Any:
    return torch.autocast(device_type, dtype, enabled=dtype is not None)
