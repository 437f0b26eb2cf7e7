"""What every ghost layer shares: the mixin, and the small rules of dtype, shape and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpkernels.nn.batch.batch_axis import Site
from dpkernels.nn.batch.shared import SharedTensor
from dpkernels.nn.copying import ordinary
from dpkernels.nn.recording.tape import Tape


class GhostModule:
    """Mixin of the layers that record instead of filling `.grad`.

    With `ghost_tape` None (the default) the layer is exactly its torch class. `dpkernels.nn.attach` sets
    the tape.
    """

    ghost_tape: Tape | None = None
    ghost_name: str = ""
    # Names of the parameters that the layer's rule covers.
    ghost_covers: ClassVar[tuple[str, ...]] = ("weight", "bias")
    # Whether it only calls its children, on one path whatever hooks they have: checks look at their outputs then.
    ghost_container: ClassVar[bool] = False
    # Those of them whose per-sample gradients, being vectors, are kept themselves.
    ghost_forms: ClassVar[tuple[str, ...]] = ("bias",)

    # Whether dimension 1 of its input is its channels: it cannot take what examples share, [K, C], for [B, K, C].
    ghost_channels_second: ClassVar[bool] = False

    # Whether its forward has to know which of its tensors carry the batch (`Tape.axes`).
    ghost_asks_axes: ClassVar[bool] = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's; an input that examples share is computed for each of them."""
        if (kwargs or len(args) > 1) and not self.ghost_asks_axes:
            args, kwargs = self._ghost_with_batch(args, kwargs)
        if args and not self.ghost_asks_axes and (shared := self._ghost_shared(args[0])) is not None:
            rest = args[1:]
            channels, label = self.ghost_channels_second, self.ghost_label()
            call = lambda x: nn.Module.__call__(self, x, *rest, **kwargs)  # noqa: E731
            return shared.through(call, label, channels_second=channels)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _ghost_with_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The arguments of a layer of several (attention, a first state), where what examples share has the batch's
        dimension, as p.expand(B, -1, -1): with example i's row there.
        """
        leaves, spec = tree_flatten((args, kwargs))
        if not any(isinstance(leaf, SharedTensor) for leaf in leaves):
            return args, kwargs
        call = None
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, SharedTensor):
                call = leaf.axes.next_call(self.ghost_label()) if call is None else call
                site = Site(self.ghost_label(), f"its tensor {place}, which examples share,", call)
                axis = leaf.axes.of(site, leaf.shape, len(leaf.rows))
                if axis is None:
                    raise leaf.refuse(
                        f"an argument {tuple(leaf.shape)} of {self.ghost_label()!r}, without the batch,"
                    )
                leaves[place] = leaf.aligned(leaf.ndim, axis)
        found: tuple[Any, Any] = tree_unflatten(leaves, spec)
        return found

    def _ghost_shared(self, x: Any) -> SharedTensor | None:
        """The first input where examples share it; None where it carries the batch.

        A constant (coordinates, a buffer of frames) may. What requires grad comes from a layer before, which has given
        it the batch, or is a SharedTensor already.
        """
        if isinstance(x, SharedTensor):
            return x
        tape = self.ghost_tape
        if tape is None or not isinstance(x, Tensor) or x.requires_grad or not self._ghost_records():
            return None
        size = tape.examples
        trained = any(p.requires_grad for p in cast(nn.Module, self).parameters())
        if size is None or not trained or not x.is_floating_point():
            return None
        site = Site(self.ghost_label(), "its input", tape.axes.next_call(self.ghost_label()))
        if tape.axes.of(site, x.shape, size) is not None:
            return None
        return SharedTensor(x.unsqueeze(0).expand(size, *x.shape), self.ghost_label(), tape.axes)

    def ghost_refusal(self) -> str | None:
        """Why this layer, as configured, cannot be trained privately, with the fix; None when it can."""
        return None

    def ghost_fused_rules(self) -> dict[nn.Parameter, str]:
        """The rules, in words, of parameters that this layer records though layers within it hold them (LoRA's)."""
        return {}

    def _ghost_active(self, *parameters: Tensor | None) -> bool:
        """Whether this forward is a private one, which is then counted as a use of what is trained here."""
        trained = self._ghost_trained(*parameters)
        if trained:
            assert self.ghost_tape is not None
            self.ghost_tape.note_use(trained)
        return bool(trained)

    def _ghost_trained(self, *parameters: Tensor | None) -> list[Tensor]:
        """Those that are trained, of a forward that is a private one: a tape, and gradients wanted. Counts nothing."""
        # First: a frozen layer never looks at the tape, so that torch.compile of frozen blocks depends on none of its
        # state.
        trained = [p for p in parameters if p is not None and p.requires_grad]
        return trained if trained and self._ghost_records() else []

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As any module's, for copies and pickles that are ordinary modules: see `dpkernels.nn.copying`."""
        assert isinstance(self, nn.Module)
        return ordinary(self, super().__reduce_ex__(protocol))

    def _ghost_records(self) -> bool:
        """Whether a forward now is a private one."""
        return self.ghost_tape is not None and self.ghost_tape.recording and torch.is_grad_enabled()

    def ghost_label(self) -> str:
        """The qualified name for messages, or the class name before `attach`."""
        return self.ghost_name or type(self).__name__


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once, the same order on every call of the same model; a fifth of the time of named_modules."""
    found, seen = [model], {model}
    for module in found:  # which grows
        yield module  # while it is in the cache
        if not module._modules:
            continue
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As nn.Module.named_modules: names and modules, parents first, each once; in a loop.

    torch's own recursion passes every module through as many generators as it is deep. Checks of every step walk the
    model; that took 1 % of a LoRA step on two cores.
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
