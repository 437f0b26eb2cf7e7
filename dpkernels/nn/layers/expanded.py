"""Small raw parameters by per-sample expansion: every small parameter that belongs to no ghost layer.

The per-sample gradients are materialised and take B times the parameter's memory, so large parameters are refused.
There are two ways:

- A module without children whose inputs carry the batch (a user's norm, a gain, a small layer) runs unchanged. Its
  backward computes per-sample gradients (`dpkernels.nn.layers.leaf_calls`).
- A module with children (Parakeet's attention with `bias_u`), or one whose inputs do not carry the batch (a table of
  positions), reads a `SharedTensor` as `self.bias_u`.

`attach` changes the class of such a module to a subclass with properties, so `named_parameters`, `state_dict` and
optimizers still see the parameter itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten

from dpkernels.nn.batch.batch_axis import Site, batch_size_of, tensors_in
from dpkernels.nn.batch.shared import SharedTensor
from dpkernels.nn.copying import ORIGINALS
from dpkernels.nn.layers.leaf_calls import LeafCall
from dpkernels.nn.recording.module import GhostModule
from dpkernels.nn.recording.records import ExpandedRecord
from dpkernels.nn.recording.tape import Tape
from dpkernels.nn.tensors import not_a_view

EXPANSION_LIMIT = 65_536
"""Largest parameter, in elements, that is expanded. Its per-sample gradients take B times its size: at most 256 KiB
per sample in float32."""


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, batch_size: int, tape: Tape, name: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.parameter, ctx.tape, ctx.name = parameter, tape, name
        # A copy and not a view, so that an in-place use does not write to the parameter itself.
        copy = parameter.detach().clone()
        return not_a_view(copy.unsqueeze(0).expand(batch_size, *parameter.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[None, None, None, None]:
        if g is not None:
            ctx.tape.add(ExpandedRecord(ctx.name, ctx.parameter, g))
        return None, None, None, None


class ExpandingModule(GhostModule):
    """Mixin of the classes of `expanding_class`; their properties return the values of `_ghost_substitutes`."""

    ghost_original: type[nn.Module]
    _ghost_substitutes: Mapping[str, Any] | None = None
    # Whether the last forward at another batch size (`Tape.ask`) returned one tensor.
    _ghost_one_output: bool = False
    ghost_asks_axes = True
    ghost_in_graph = True
    ghost_reads_output = True

    def _ghost_fits_in_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """As GhostModule's, and the module has no children, whose records are their own, and one output."""
        alone = next(cast(nn.Module, self).children(), None) is None
        return alone and self._ghost_one_output and super()._ghost_fits_in_graph(args, kwargs)

    def _ghost_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As GhostModule's; an evaluation stays in the graph."""
        hooked = bool(self._forward_hooks or self._forward_pre_hooks)  # type: ignore[attr-defined]
        if not self._ghost_records() and not hooked:
            return self.ghost_original.forward(self, *args, **kwargs)
        return super()._ghost_compiled(args, kwargs)

    def _ghost_outside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As GhostModule's; what a module with children calls in its forward is compiled."""
        if next(cast(nn.Module, self).children(), None) is None:
            return super()._ghost_outside(args, kwargs)
        return _between_graphs(self, *args, **kwargs)

    @contextmanager
    def _substituted(self, values: Mapping[str, Any]) -> Iterator[None]:
        before = self._ghost_substitutes
        self.__dict__["_ghost_substitutes"] = values
        try:
            yield
        finally:
            self.__dict__["_ghost_substitutes"] = before

    def get_parameter(self, target: str) -> Any:
        """As nn.Module's; an expanded parameter of this module is returned as its forward reads it."""
        if target in self.ghost_covers:
            return getattr(self, target)
        return nn.Module.get_parameter(cast(nn.Module, self), target)

    @torch.compiler.disable(recursive=False)
    def _ghost_call(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(cast(nn.Module, self), *args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def _expanded_forward(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        assert isinstance(self, nn.Module)
        trained = {
            name: p
            for name in self.ghost_covers
            if (p := self._parameters.get(name)) is not None and p.requires_grad
        }
        tape = self.ghost_tape
        if self._ghost_substitutes is not None or not trained or not self._ghost_records():
            return forward(*args, **kwargs)
        assert tape is not None
        label, size = self.ghost_label(), tape.examples
        if next(self.children(), None) is None and _carries_batch(label, tape, args, kwargs):
            if tape.asking:
                output = forward(*args, **kwargs)
                self.__dict__["_ghost_one_output"] = type(output) is Tensor
                return output
            tape.note_use(trained.values())

            def run(values: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                with self._substituted(dict(zip(trained, values, strict=True))):
                    return forward(*args, **kwargs)

            ways = self.__dict__.setdefault("_ghost_ways", {})
            return LeafCall(label, list(trained), list(trained.values()), run, tape, ways)(args, kwargs)
        if size is None:
            size = batch_size_of(args, kwargs)
        if size is None:
            raise RuntimeError(
                f"{label!r}: neither the model's forward nor this module's got a tensor, so the batch size is unknown "
                f"and the trained parameters ({', '.join(map(repr, trained))}) cannot be expanded per sample; pass the "
                "model a tensor whose first dimension is the batch, or freeze them (requires_grad_(False))"
            )
        with self._substituted(SharedParameters(trained, label, size, tape)):
            return forward(*args, **kwargs)


@torch.compiler.disable(
    recursive=False, reason="this module reads parameters of its own outside of the graphs"
)
def _between_graphs(module: ExpandingModule, *args: Any, **kwargs: Any) -> Any:
    module._ghost_note_outside()
    return module._ghost_call(*args, **kwargs)


class SharedParameters(Mapping[str, SharedTensor]):
    """A module's trained parameters in one forward; each is expanded on its first read."""

    def __init__(self, parameters: dict[str, nn.Parameter], label: str, size: int, tape: Tape) -> None:
        self._parameters, self._label, self._size, self._tape = parameters, label, size, tape
        self._expanded: dict[str, SharedTensor] = {}

    def __getitem__(self, name: str) -> SharedTensor:
        if name not in self._expanded:
            parameter, full = self._parameters[name], f"{self._label}.{name}"
            self._tape.note_use((parameter,))
            # The first read may be under no_grad; the gradient of a later read must not be lost.
            with torch.enable_grad():
                rows = _Expand.apply(parameter, self._size, self._tape, full)
            self._expanded[name] = SharedTensor(rows, full, self._tape.axes)
        return self._expanded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def _carries_batch(label: str, tape: Tape, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether one of a module's input tensors carries the batch, and none is a SharedTensor."""
    leaves, _ = tree_flatten((args, kwargs))
    if any(isinstance(leaf, SharedTensor) for leaf in leaves):
        return False
    tensors = [(path, t) for path, t in tensors_in((args, kwargs)) if t.dim() > 0]
    size = tape.examples
    if size is None:  # called outside of the root module's forward
        return bool(tensors)
    call = tape.axes.next_call(label)
    axes = [tape.axes.of(Site(label, f"its argument {path}", call), t.shape, size) for path, t in tensors]
    return any(axis is not None for axis in axes)


def _property(name: str) -> property:
    def read(self: Any) -> Any:
        if torch.compiler.is_compiling() and self._parameters[name].requires_grad and self._ghost_records():
            return read_outside(self)
        return read_now(self)

    def read_now(self: Any) -> Any:
        substitutes, parameter = self._ghost_substitutes, self._parameters[name]
        if substitutes is None and parameter.requires_grad and self._ghost_records():
            # Read outside of the module's own forward: from a ParameterList, or by the parent of the module.
            size = self.ghost_tape.examples
            if size is not None:
                return SharedParameters({name: parameter}, self.ghost_label(), size, self.ghost_tape)[name]
        if substitutes is None or name not in substitutes:
            return parameter
        return substitutes[name]

    read_outside = torch.compiler.disable(
        read_now, reason="a parameter is read outside of the compiled graph"
    )
    return property(read)


@cache
def expanding_class(original: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of `original` that expands its parameters `names`."""

    @torch.compiler.disable(recursive=False)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._expanded_forward(original.forward.__get__(self), args, kwargs)

    forward.__wrapped__ = original.forward  # the original's signature
    body: dict[str, Any] = {name: _property(name) for name in names}
    body |= {
        "forward": forward,
        "ghost_covers": names,
        "ghost_original": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    expanding = type(original.__name__, (ExpandingModule, original), body)
    ORIGINALS[expanding] = original
    return expanding


def expansion_refusal(module: nn.Module, parameter: nn.Parameter) -> str | None:
    """Why `parameter`, a raw parameter of `module`, cannot be expanded; None if it can."""
    if isinstance(module, nn.RNNBase):
        return (
            "the module is a subclass with its own forward around one fused function; use nn.LSTM, nn.GRU or nn.RNN "
            "itself, or register a ghost class (dpkernels.nn.ghost_subclass), or freeze the module"
        )
    if isinstance(module, nn.Embedding):
        # Under vmap a lookup is an index, whose backward ignores these options.
        for option in ("padding_idx", "max_norm", "sparse", "scale_grad_by_freq"):
            value = getattr(module, option)
            if value is not None and value is not False:  # padding_idx=0 is a value
                return (
                    f"the module is a subclass of nn.Embedding with its own forward and {option}={value}, "
                    "which per-sample expansion would ignore; build it without that option, write a rule "
                    "(dpkernels.nn.ghost_subclass), or freeze it"
                )
    if parameter.numel() > EXPANSION_LIMIT:
        return (
            f"it has no rule, and its {parameter.numel():,} elements exceed the limit of {EXPANSION_LIMIT:,} for "
            "per-sample expansion; freeze it, or write a rule (dpkernels.nn.register_swap)"
        )
    return None
