"""Ghost layers within torch.compile: one op in the graph for a layer's forward, and one for its backward.

A ghost layer's backward puts a record on the tape: Python code with an effect outside of the graph, which a compiler
would trace once and never run again. So a compiled graph does not contain the layer's code. It calls two ops that
torch.compile cannot look into:

    [*y, *x', call] = ghost_layer([*x], parameters, anchor, layer's number, form)   runs the layer as eager code does
    [*dx, token] = ghost_backward([*g], [*x'], call)                     runs its backward: the record is made here

What the layer does is therefore the same code, with the same bits, as without torch.compile; everything between the
layers is compiled. Between the two ops the call's own autograd graph waits in `CompiledCalls`, and `call` is its key.

**A record holds copies.** A compiler writes later results over a tensor that its graph no longer reads, and a record is
read after the whole backward. So the ops copy x (to x', which is what the graph keeps for its backward) and g.

**No record can be lost in the graph.** A compiler removes an op whose result nobody reads, and nobody reads dx of a
model's first layer. So every backward returns a token as well, its part of the gradient of the forward's `anchor`: the
graph has to compute that. `CompiledCalls.check` compares it with the calls and the records of each layer.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from dpkernels.nn.recording.compiled_calls import Call

if TYPE_CHECKING:
    from dpkernels.nn.recording.module import GhostModule

# Every attached layer by its number. Numbers are never used again: a compiled graph holds them as constants.
_LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = count()
_SITES = count()


def number_layer(layer: Any) -> int:
    """Give a layer its number, by which graphs name it."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return number


def fits_in_graph(value: Any) -> bool:
    """Whether a graph can hold these arguments: ordinary tensors, constants that are no numbers, tuples of both."""
    if value is None or type(value) in (Tensor, bool, str):
        return True
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return all(fits_in_graph(part) for part in value)
    return False


@torch.compiler.assume_constant_result
def is_shared(number: int, dims: int) -> bool:
    """Whether the first input of a layer, of so many dimensions, was without the batch in an earlier call.

    A graph cannot hold such a call, whose result is a SharedTensor. The answer is a constant of the graph. If it
    becomes wrong, the op raises.
    """
    layer = _layer(number)
    return bool(layer.ghost_tape.axes.is_shared(layer.ghost_label(), dims))


def call_in_graph(layer: GhostModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """layer(*args, **kwargs), as one op of the graph that torch.compile traces now."""
    tape = layer.ghost_tape
    assert tape is not None
    assert isinstance(layer, nn.Module)
    inputs: list[Tensor] = []
    named = "".join(f"{name!r}: {_form(kwargs[name], inputs)}, " for name in kwargs)
    form = f"({_form(args, inputs)}, {{{named}}})"
    needs = [x.requires_grad for x in inputs]
    kind = inputs[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    tensors = [*layer.parameters(), *layer.buffers()]
    anchor, number = tape.compiled.anchor, layer.ghost_number
    # Beside a graph, where dynamo lets the op run by itself, a checkpoint would repeat the call at another site.
    site = _new_site() if torch.compiler.is_dynamo_compiling() else ""
    found = _forward(inputs, tensors, anchor, number, form, site, needs, dtype)
    return layer.ghost_result(found[: len(found) - sum(needs) - 1])


def _form(value: Any, tensors: list[Tensor]) -> str:
    """Arguments as a Python literal, in which an integer stands for a tensor's place among `tensors`."""
    if isinstance(value, Tensor):
        for place in range(len(tensors)):
            if tensors[place] is value:  # a layer may ask whether two of its arguments are the same tensor
                return str(place)
        tensors.append(value)
        return str(len(tensors) - 1)
    if isinstance(value, tuple | list):
        parts = "".join(f"{_form(part, tensors)}, " for part in value)
        return f"({parts})"
    return repr(value)


def _filled(form: Any, tensors: Sequence[Tensor]) -> Any:
    """The arguments that `_form` describes."""
    if isinstance(form, tuple):
        return tuple(_filled(part, tensors) for part in form)
    if isinstance(form, dict):
        return {name: _filled(part, tensors) for name, part in form.items()}
    return tensors[form] if type(form) is int else form


def _arguments(form: str, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = _filled(_parsed(form), tensors)
    return args, kwargs


_parsed = cache(ast.literal_eval)


@torch.compiler.assume_constant_result
def _new_site() -> str:
    """Another string for each call in a graph: two calls of one layer with the same input must not become one."""
    return str(next(_SITES))


def _tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a layer's output, in order."""
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in _tensors_of(part)]
    return [] if output is None else [output]


# The tag: a layer may draw at random, and a checkpoint that is compiled must draw again what the forward drew.
@torch.library.custom_op("dpkernels::ghost_layer", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _forward(
    inputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    anchor: Tensor,
    layer: int,
    form: str,
    site: str,
    needs: Sequence[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    module = _layer(layer)
    copies = [x.clone() for x in inputs]
    leaves = [x.detach().requires_grad_(need) for x, need in zip(copies, needs, strict=True)]
    args, kwargs = _arguments(form, leaves)
    with _as_eager(inputs[0].device.type, dtype):
        ys = _tensors_of(module._ghost_call(*args, **kwargs))
    if any(type(y) is not Tensor for y in ys) or not any(y.requires_grad for y in ys):
        raise RuntimeError(
            f"torch.compile: {module.ghost_label()!r} returned a {type(ys[0]).__name__} that leads to no record, "
            "because all examples share its input: call it outside of the compiled graph (torch.compiler.disable)"
        )
    kept = [x for x, need in zip(copies, needs, strict=True) if need]
    waiting = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    call = Call(module.ghost_label(), site, waiting, module._ghost_all_trained(), ys)
    key = module.ghost_tape.compiled.wait(call)
    # Generated code writes over what the graph no longer reads, and the layer's or a hook's backward may read y.
    copied = module.ghost_reads_output or bool(module._forward_hooks)
    ys = [y.clone() if copied else y for y in (y.detach() for y in ys)]
    return [*(y.contiguous() for y in ys), *kept, key]


@_forward.register_fake
def _(
    inputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    anchor: Tensor,
    layer: int,
    form: str,
    site: str,
    needs: Sequence[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    # torch would free what a compiled backward keeps within its first run; the row check runs it twice.
    torch._functorch.config.donated_buffer = False
    module = _layer(layer)
    args, kwargs = _arguments(form, inputs)
    with module.ghost_tape.paused(), _autocast(inputs[0].device.type, dtype):
        ys = _tensors_of(module.ghost_shapes(tensors, args, kwargs))
    kept = [torch.empty_like(x) for x, need in zip(inputs, needs, strict=True) if need]
    key = torch.empty((), dtype=torch.int64, device="cpu")
    return [*(y.new_empty(y.shape) for y in ys), *kept, key]


@torch.library.custom_op("dpkernels::ghost_backward", mutates_args=())
def _backward(
    gs: Sequence[Tensor | None], kept: Sequence[Tensor], key: Tensor, layer: int, site: str
) -> list[Tensor]:
    module = _layer(layer)
    call = module.ghost_tape.compiled.take(key, module.ghost_label(), site)
    given = [
        (y, g.clone()) for y, g in zip(call.outputs, gs, strict=True) if g is not None and y.requires_grad
    ]
    ys, outputs = [y for y, _ in given], [g for _, g in given]
    with _as_eager(outputs[0].device.type, None):
        # To all parameters, so that every part of the layer records. Unlike backward, grad copies no gradient.
        found = torch.autograd.grad(
            ys, [*call.inputs, *call.parameters], outputs, retain_graph=True, allow_unused=True
        )
    dxs, past = found[: len(kept)], zip(call.parameters, found[len(kept) :], strict=True)
    for parameter, gradient in past:
        if gradient is not None:  # read past its rule: the engine looks for filled gradients
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    # A view of g is no result of its own, as the graph expects.
    records = {g.untyped_storage().data_ptr() for g in outputs}
    return [*(_own_gradient(dx, x, records) for dx, x in zip(dxs, kept, strict=True)), torch.ones(())]


def _own_gradient(dx: Tensor | None, x: Tensor, records: set[int]) -> Tensor:
    """dx with x's strides, and memory of its own; zeros where the layer has none."""
    if dx is None:
        return torch.zeros_like(x)
    if dx.stride() != x.stride() or dx.untyped_storage().data_ptr() in records:
        return torch.empty_like(x).copy_(dx)
    return dx


@_backward.register_fake
def _(
    gs: Sequence[Tensor | None], kept: Sequence[Tensor], key: Tensor, layer: int, site: str
) -> list[Tensor]:
    return [*(torch.empty_like(x) for x in kept), torch.empty((), device="cpu")]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    _, tensors, _, ctx.layer, _, ctx.site, ctx.needs, _ = inputs
    ctx.tensors = len(tensors)
    ctx.save_for_backward(*output[len(output) - sum(ctx.needs) - 1 :])


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    *kept, key = ctx.saved_tensors
    *found, token = _backward(list(grads[: len(grads) - len(kept) - 1]), kept, key, ctx.layer, ctx.site)
    dxs = iter(found)
    inputs = [next(dxs) if need else None for need in ctx.needs]
    return inputs, [None] * ctx.tensors, token, None, None, None, None, None


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
    exclude = torch._C._dispatch_tls_local_exclude_set() & _AUTOCAST
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        if dtype is None and not torch.is_autocast_enabled(device_type):
            yield
        else:
            with _autocast(device_type, dtype):
                yield


# Of the dispatcher: all that ordinary code may exclude. An op's kernel runs without autograd and vmap, which have
# already seen the op.
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
for _name in vars(torch._C.DispatchKey):
    if _name.startswith("Autocast"):
        _AUTOCAST = _AUTOCAST.add(getattr(torch._C.DispatchKey, _name))


def _autocast(device_type: str, dtype: torch.dtype | None) -> Any:
    return torch.autocast(device_type, dtype, enabled=dtype is not None)
