"""GhostModule, the mixin of every ghost layer, and two walks over a model's modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpkernels.nn.batch.batch_axis import Site
from dpkernels.nn.batch.shared import SharedTensor
from dpkernels.nn.copying import ordinary
from dpkernels.nn.recording.compiled import call_in_graph, fits_in_graph, is_shared
from dpkernels.nn.recording.tape import Tape


class GhostModule:
    """Mixin of the layers that record instead of filling `.grad`.

    While `ghost_tape` is None (the default) the layer behaves exactly as its torch class. `dpkernels.nn.attach`
    sets the tape.
    """

    ghost_tape: Tape | None = None
    ghost_name: str = ""
    # Names of the parameters that the layer's rule covers.
    ghost_covers: ClassVar[tuple[str, ...]] = ("weight", "bias")
    # Whether the layer only calls its children, by the same path with or without hooks on them. Checks then look at
    # the outputs of the children.
    ghost_container: ClassVar[bool] = False
    # The covered parameters whose per-sample gradients are materialised, since they are vectors.
    ghost_forms: ClassVar[tuple[str, ...]] = ("bias",)

    # Whether dimension 1 of the input holds the channels, so that a shared tensor [K, C] must not become [B, K, C].
    ghost_channels_second: ClassVar[bool] = False

    # Whether the forward itself finds out which of its tensors carry the batch (`Tape.axes`).
    ghost_asks_axes: ClassVar[bool] = False

    # Whether torch.compile may put the layer into its graph, as one op (`dpkernels.nn.recording.compiled`): tensors in,
    # new tensors out.
    ghost_in_graph: ClassVar[bool] = False
    # Whether the layer's backward may read its output. A graph then gets a copy, since a compiler may write over it.
    ghost_reads_output: ClassVar[bool] = False
    # By which compiled graphs name the layer; `attach` sets it.
    ghost_number: int = -1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's; a shared input is processed once for each example."""
        if torch.compiler.is_compiling():
            return self._ghost_compiled(args, kwargs)
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor and args[0].requires_grad:
            return nn.Module.__call__(
                cast(nn.Module, self), args[0]
            )  # from an earlier layer: see `_ghost_shared`
        return self._ghost_call(*args, **kwargs)

    def _ghost_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`__call__` while torch.compile traces: the plain layer, one op of the graph, or eager code outside of it."""
        module = cast(nn.Module, self)
        trained = any(p.requires_grad for p in module.parameters())
        if self.ghost_container or not trained or not self._ghost_records():
            return nn.Module.__call__(module, *args, **kwargs)
        if self.ghost_in_graph and self._ghost_fits_in_graph(args, kwargs):
            return call_in_graph(self, args, kwargs)
        return self._ghost_outside(args, kwargs)

    def _ghost_outside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`__call__` where the compiled graph ends before the layer."""
        return _outside_graphs(self, *args, **kwargs)

    def _ghost_fits_in_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a graph can hold this call: ordinary tensors that carry the batch, as far as earlier calls show."""
        values = (*args, *kwargs.values())
        if not values or type(values[0]) is not Tensor or not fits_in_graph(values):
            return False
        return values[0].requires_grad or not is_shared(self.ghost_number, values[0].dim())

    def ghost_result(self, tensors: list[Tensor]) -> Any:
        """The layer's output from its tensors, which a compiled graph returns as a list."""
        return tensors[0]

    def ghost_shapes(self, tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's output as a compiler needs it, for shapes and dtypes: by default that of the plain forward.

        Args:
            tensors: its parameters and buffers, in their order, which may be fake as the arguments are.
            args: of the forward.
            kwargs: of the forward.
        """
        module = cast(nn.Module, self)
        names = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
        values = dict(zip(names, tensors, strict=True))
        return torch.func.functional_call(module, values, args, kwargs)

    @torch.compiler.disable(reason="a warning that this private layer runs outside of the compiled graph")
    def _ghost_note_outside(self) -> None:
        """Warn once for each class of layer that a compiled graph ends before."""
        assert self.ghost_tape is not None
        kind = type(self).__name__
        if kind not in self.ghost_tape.compiled.outside:
            self.ghost_tape.compiled.outside.add(kind)
            warnings.warn(
                f"torch.compile: {self.ghost_label()!r} ({kind}) runs as eager code: the compiled graph ends before it "
                "and begins anew behind it (its input is not of a kind that a graph can hold, examples share it, or "
                "the layer has parameters of its own beside other layers). The sums are the same; "
                "docs/notes/compile.md lists these layers",
                stacklevel=2,
            )

    def _ghost_call(self, *args: Any, **kwargs: Any) -> Any:
        if (kwargs or len(args) > 1) and not self.ghost_asks_axes:
            args, kwargs = self._ghost_with_batch(args, kwargs)
        if args and not self.ghost_asks_axes and (shared := self._ghost_shared(args[0])) is not None:
            rest = args[1:]
            channels, label = self.ghost_channels_second, self.ghost_label()
            call = lambda x: nn.Module.__call__(self, x, *rest, **kwargs)  # noqa: E731
            return shared.through(call, label, channels_second=channels)
        return nn.Module.__call__(cast(nn.Module, self), *args, **kwargs)

    def _ghost_with_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The arguments of a layer that takes several (attention, an initial state), without SharedTensors.

        A shared tensor with the batch's dimension, as p.expand(B, -1, -1), becomes an ordinary one: index i of that
        dimension is taken from example i's row.
        """
        leaves, spec = tree_flatten((args, kwargs))
        if not any(isinstance(leaf, SharedTensor) for leaf in leaves):
            return args, kwargs
        call = None
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, SharedTensor):
                call = leaf.axes.next_call(self.ghost_label()) if call is None else call
                site = Site(self.ghost_label(), f"its shared tensor (argument {place})", call)
                axis = leaf.axes.of(site, leaf.shape, len(leaf.rows))
                if axis is None:
                    raise leaf.refuse(
                        f"an argument {tuple(leaf.shape)} of {self.ghost_label()!r}, without the batch,"
                    )
                leaves[place] = leaf.aligned(leaf.ndim, axis)
        arguments: tuple[Any, Any] = tree_unflatten(leaves, spec)
        return arguments

    def _ghost_shared(self, x: Any) -> SharedTensor | None:
        """The first input as a SharedTensor if the examples share it; None if it carries the batch.

        A constant (coordinates, a buffer of frames) may be shared. An input that requires grad comes from an earlier
        layer: it carries the batch, or is a SharedTensor already.
        """
        if isinstance(x, SharedTensor):
            return x
        tape = self.ghost_tape
        if tape is None or not isinstance(x, Tensor) or x.requires_grad or not self._ghost_records():
            return None
        size = tape.examples
        if size is None or not x.is_floating_point() or not self._ghost_trains():
            return None
        site = Site(self.ghost_label(), "its input", tape.axes.next_call(self.ghost_label()))
        if tape.axes.of(site, x.shape, size) is not None:
            return None
        return SharedTensor(x.unsqueeze(0).expand(size, *x.shape), self.ghost_label(), tape.axes)

    def _ghost_trains(self) -> bool:
        """Whether a parameter of this layer or one below it is trained."""
        inside = modules_of(cast(nn.Module, self))  # a tenth of the time of `parameters()`
        return any(p is not None and p.requires_grad for m in inside for p in m._parameters.values())

    def ghost_refusal(self) -> str | None:
        """Why this layer, as configured, cannot be trained privately, with the fix; None if it can."""
        return None

    def ghost_fused_rules(self) -> dict[nn.Parameter, str]:
        """Descriptions of the rules of parameters that child modules hold and this layer records (LoRA's)."""
        return {}

    def _ghost_active(self, *parameters: Tensor | None) -> bool:
        """Whether this forward is private; if it is, count it as a use of the trained ones among `parameters`."""
        # A frozen layer never reads the tape, so torch.compile of frozen blocks does not depend on the tape's state.
        trained = [p for p in parameters if p is not None and p.requires_grad]
        if not trained or not self._ghost_records():
            return False
        assert self.ghost_tape is not None
        self.ghost_tape.note_use(trained)
        return True

    def _ghost_trained(self, *parameters: Tensor | None) -> list[Tensor]:
        """The trained ones among `parameters` if this forward is private, else none. Counts no use."""
        trained = [p for p in parameters if p is not None and p.requires_grad]
        return trained if trained and self._ghost_records() else []

    def _ghost_all_trained(self) -> list[Tensor]:
        """The trained parameters of the layer and of its children; takes a fifth of the time of `parameters()`."""
        held = (p for part in modules_of(cast(nn.Module, self)) for p in part._parameters.values())
        return [p for p in held if p is not None and p.requires_grad]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As nn.Module's, but copies and pickles are ordinary modules: see `dpkernels.nn.copying`."""
        assert isinstance(self, nn.Module)
        return ordinary(self, super().__reduce_ex__(protocol))

    def _ghost_records(self) -> bool:
        """Whether a forward now is private: there is a tape that records, and gradients are enabled."""
        return self.ghost_tape is not None and self.ghost_tape.recording and torch.is_grad_enabled()

    def ghost_label(self) -> str:
        """The qualified name for messages, or the class name before `attach`."""
        return self.ghost_name or type(self).__name__


@torch.compiler.disable(reason="this private layer runs outside of the compiled graph")
def _outside_graphs(layer: GhostModule, *args: Any, **kwargs: Any) -> Any:
    layer._ghost_note_outside()
    return layer._ghost_call(*args, **kwargs)


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once, in the same order on every call for a model; takes a fifth of the time of named_modules."""
    modules, seen = [model], {model}
    for module in modules:  # the list grows
        yield module  # while it is in the processor's cache
        if not module._modules:
            continue
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As nn.Module.named_modules (names and modules, parents first, each once), but in a loop.

    torch's recursion passes a module at depth n through n generators. The checks of every step walk the model, and
    the recursion took 1 % of a LoRA step on two cores.
    """
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        prefix = f"{name}." if name else ""
        stack += [
            (prefix + key, child)
            for key, child in reversed(module._modules.items())
            if child is not None and child not in seen
        ]
