"""Per-sample gradients of a module of one's own: its forward runs as it is; its backward is asked for each example.

The forward is the plain module's, on the whole batch: nothing that decides its values is guessed. Its parameters p are
read through `_Tap`, whose backward is called with the plain gradient Σ_i J_iᵀ g_i once autograd has it, and makes the
parts J_iᵀ g_i, where g_i is what its outputs' gradients hold for example i:

- *sliced*: of row i of the inputs that have the batch's size, under torch.vmap: as cheap as the plain backward;
- *masked*: of all inputs, with the outputs' gradients zeroed but for row i. It assumes nothing of the inputs, and costs
  B backwards of the module.

The sliced way is taken where it has been seen to give what the module's own backward gives, for random signs of the
rows, since a tensor that examples share may have as many rows as there are examples. In every backward the parts must
add up to the plain gradient. That the outputs' rows are the examples' is the row check's to say.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpkernels.nn.batch.batch_axis import has_values, map_tensors, tensors_in
from dpkernels.nn.recording.records import ExpandedRecord
from dpkernels.nn.recording.tape import Tape, outside_message

logger = logging.getLogger("dpkernels")

Run = Callable[[Sequence[Tensor], tuple[Any, ...], dict[str, Any]], Any]
"""run(parameters, args, kwargs): the module's forward with these tensors in place of its trained parameters."""

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-2}
_HALF_TOLERANCE = 0.1
"""Of the norms that are added up: rounding, in half precision within the module too, and not a layout that was misread.
What is summed is what was measured, whichever it is."""


class LeafCall:
    """One call of a module without children.

    Args:
        label: the module, for messages.
        names: of its trained parameters.
        parameters: these.
        run: its forward.
        tape: the model's.
        ways: what was found out in earlier calls: whether slicing is right, by which inputs have the batch's size.
    """

    def __init__(
        self,
        label: str,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        run: Run,
        tape: Tape,
        ways: dict[tuple[Any, ...], bool],
    ) -> None:
        self._label, self._names, self._parameters = label, names, parameters
        self._run, self._tape, self._ways = run, tape, ways
        self._number = tape.axes.next_call(f"{label} as a leaf")
        self._gradients: dict[int, Tensor] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's outputs; their gradients are noted on their way back."""
        self._inputs = args, kwargs
        devices = {t.device for _, t in tensors_in(self._inputs) if t.device.type == "cuda"}
        self._devices = sorted(device.index or 0 for device in devices)
        self._draws = self._generators()
        kinds = ["cpu", *({"cuda"} if devices else ())]
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)
        ]
        tapped = _Tap.apply(self, *self._parameters)
        for tensor in tapped:
            tensor._is_param = True  # what isinstance(p, nn.Parameter) asks
        output = self._run(tapped, args, kwargs)
        self._is_random = any(
            not torch.equal(a, b) for a, b in zip(self._draws, self._generators(), strict=True)
        )
        # Aliases: the gradient of one has nothing of what comes back through the module's other outputs.
        output = map_tensors(output, lambda t: torch.ops.aten.alias(t) if t.is_floating_point() else t)
        for place, tensor in enumerate(_floating(output)):
            if tensor.requires_grad:
                tensor.register_hook(self._noting(place))
        return output

    def _generators(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in self._devices)]

    def _noting(self, place: int) -> Callable[[Tensor], None]:
        gradients = self._gradients

        def note(gradient: Tensor) -> None:
            gradients[place] = gradient.detach()

        return note

    def record(self, plain: Sequence[Tensor | None]) -> None:
        """Put the per-sample gradients on the tape; `plain` are the module's own, summed over the batch."""
        gradients, batch = dict(self._gradients), self._tape.batch_size
        self._gradients.clear()
        if batch is None:
            raise RuntimeError(outside_message(self._label))
        if not gradients:
            raise RuntimeError(
                f"{self._label!r}: its outputs are not among what its forward returned as tensors, or within tuples, "
                "lists, mappings and dataclasses of them, so that its gradient cannot be told apart by sample. Return "
                "the tensors themselves, or freeze it (requires_grad_(False))"
            )
        first = next(iter(gradients.values()))
        axis = self._tape.batch_axis(tuple(self._parameters), first, features=0)
        if any(g.dim() <= axis or g.shape[axis] != batch for g in gradients.values()):
            shapes = [tuple(g.shape) for g in gradients.values()]
            raise ValueError(
                f"{self._label!r}: its outputs have shapes {shapes}, and the losses {batch} examples: no dimension of "
                "them is the batch, so that its gradient cannot be told apart by sample. Give it an input whose first "
                f"dimension is the batch ({batch}), or freeze it (requires_grad_(False))"
            )
        for part, parameter, name in zip(
            self._parts(gradients, axis, batch, plain), self._parameters, self._names, strict=True
        ):
            self._tape.add(ExpandedRecord(f"{self._label}.{name}", parameter, part))

    def _parts(
        self, gradients: dict[int, Tensor], axis: int, batch: int, plain: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Each trained parameter's gradients [B, *shape], which add up to `plain`."""
        rows = tuple(
            isinstance(x, Tensor)
            and not isinstance(x, nn.Parameter)
            and x.dim() > axis
            and x.shape[axis] == batch
            for x in tree_flatten(self._cut_off())[0]
        )
        # Of one example every tensor of one row is right; that says nothing of other sizes.
        way = (self._number, rows, axis, tuple(sorted(gradients)), batch == 1)
        if not self._is_random and any(rows) and self._ways.get(way, True):
            sliced = self._sliced(gradients, rows, axis)
            if (
                sliced is not None
                and way not in self._ways
                and not self._agree(sliced, gradients, axis, batch)
            ):
                sliced = None
            if sliced is not None and self._add_up(sliced, plain):
                self._ways[way] = True
                return sliced
            self._ways[way] = False
        parts = self._masked(gradients, axis, batch)
        if not self._add_up(parts, plain):
            raise RuntimeError(
                f"{self._label!r}: the per-sample gradients of {', '.join(map(repr, self._names))} do not add up to "
                "their gradient. "
                "Its forward does not repeat itself: it reads something that changes between forward and backward, or "
                "its inputs were changed in place. Freeze it, or write a rule (dpkernels.nn.register_swap)"
            )
        return parts

    def _add_up(self, parts: Sequence[Tensor], plain: Sequence[Tensor | None]) -> bool:
        ones = torch.ones(len(parts[0]), device=parts[0].device)
        wholes = (torch.zeros_like(p[0]) if w is None else w for p, w in zip(parts, plain, strict=True))
        return all(_adds_up(part, whole, ones) for part, whole in zip(parts, wholes, strict=True))

    def _cut_off(self) -> Any:
        """The inputs with their tensors cut off from the graph, dataclasses as they are."""
        return map_tensors(self._inputs, lambda t: t.detach() if not isinstance(t, nn.Parameter) else t)

    def _sliced(self, gradients: dict[int, Tensor], rows: Sequence[bool], axis: int) -> list[Tensor] | None:
        """By torch.vmap over the inputs' rows; None where it cannot run the module: it branches on values, say."""
        leaves, spec = tree_flatten(self._cut_off())
        places = sorted(gradients)

        def one(parameters: list[Tensor], inputs: list[Tensor], gs: list[Tensor]) -> Any:
            each = iter(inputs)
            mine = [next(each).unsqueeze(axis) if row else x for x, row in zip(leaves, rows, strict=True)]

            def outputs(*values: Tensor) -> tuple[Tensor, ...]:
                for value in values:
                    value._is_param = True
                args, kwargs = tree_unflatten(mine, spec)
                tensors = _floating(self._run(values, args, kwargs))
                return tuple(tensors[place] for place in places)

            found, pull_back = torch.func.vjp(outputs, *parameters)[:2]
            if any(y.shape != g.unsqueeze(axis).shape for y, g in zip(found, gs, strict=True)):
                raise ValueError("an example alone has outputs of another shape")
            return pull_back(tuple(g.unsqueeze(axis).to(y.dtype) for y, g in zip(found, gs, strict=True)))

        with torch.enable_grad(), self._as_in_forward():
            values = [p.detach() for p in self._parameters]
            inputs = [x for x, row in zip(leaves, rows, strict=True) if row]
            gs = [gradients[place] for place in places]
            try:
                return list(torch.vmap(one, in_dims=(None, axis, axis))(values, inputs, gs))
            except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
                logger.info(
                    "%s: its gradients are asked one example at a time: slower. %s",
                    self._label,
                    error,
                )
                return None

    def _masked(self, gradients: dict[int, Tensor], axis: int, batch: int) -> list[Tensor]:
        values, outputs = self._again(gradients)
        parts = []
        for row in range(batch):
            masked = []
            for place in sorted(gradients):
                g = torch.zeros_like(gradients[place])
                g.select(axis, row).copy_(gradients[place].select(axis, row))
                masked.append(g)
            parts.append(_pull_back(outputs, values, masked))
        return [torch.stack(of_one) for of_one in zip(*parts, strict=True)]

    def _again(self, gradients: dict[int, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The forward once more, with the random draws that it had: its parameters, and its outputs with a gradient."""
        args, kwargs = self._cut_off()
        with torch.random.fork_rng(devices=self._devices), torch.enable_grad(), self._as_in_forward():
            torch.set_rng_state(self._draws[0])
            for index, state in zip(self._devices, self._draws[1:], strict=True):
                torch.cuda.set_rng_state(state, index)
            values: list[Tensor] = [p.detach().requires_grad_() for p in self._parameters]
            for value in values:
                value._is_param = True
            found = _floating(self._run(values, args, kwargs))
        return values, [found[place] for place in sorted(gradients)]

    def _agree(self, sliced: Sequence[Tensor], gradients: dict[int, Tensor], axis: int, batch: int) -> bool:
        """Whether the parts are those of the module's own backward, for rows of random signs."""
        generator = torch.Generator().manual_seed(secrets.randbits(63))
        signs = torch.randint(0, 2, (batch,), generator=generator, dtype=torch.int8).mul(2).sub(1)
        values, outputs = self._again(gradients)
        signed = []
        for place in sorted(gradients):
            g = gradients[place]
            shape = [1] * g.dim()
            shape[axis] = batch
            signed.append(g * signs.to(g).view(shape))
        wholes = _pull_back(outputs, values, signed)
        return all(_adds_up(part, whole, signs) for part, whole in zip(sliced, wholes, strict=True))

    def _as_in_forward(self) -> AbstractContextManager[Any]:
        if not self._autocast:
            return nullcontext()
        kind, dtype = self._autocast[-1]
        return torch.autocast(kind, dtype)


class _Tap(torch.autograd.Function):
    """The parameters as they are; their gradient ends here."""

    @staticmethod
    def forward(ctx: Any, call: LeafCall, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        # Copies: an in-place use must not write to the parameter itself.
        return tuple(p.detach().clone() for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.call.record(gradients)
        return (None,) * (len(gradients) + 1)


def _floating(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in order: a gradient is known by its place among them."""
    return [t for _, t in tensors_in(output) if t.is_floating_point()]


def _pull_back(outputs: Sequence[Tensor], values: Sequence[Tensor], gs: Sequence[Tensor]) -> list[Tensor]:
    """Σ over the outputs of Jᵀ g, for each of the values; zeros where an output does not depend on it."""
    with_graph = [(y, g.to(y.dtype)) for y, g in zip(outputs, gs, strict=True) if y.requires_grad]
    ys, cotangents = zip(*with_graph, strict=True) if with_graph else ((), ())
    found = torch.autograd.grad(ys, values, cotangents, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(v) if f is None else f for v, f in zip(values, found, strict=True)]


def _adds_up(part: Tensor, whole: Tensor, weights: Tensor) -> bool:
    """Whether Σ_i w_i·part_i is `whole`, but for rounding; one that is not finite cannot say."""
    if not has_values(part):
        return True
    wide = part.double().reshape(len(part), -1)
    total = (wide * weights.to(wide).unsqueeze(1)).sum(0)
    error = (total - whole.double().reshape(-1)).norm()
    scale = wide.norm(dim=1).sum()
    tolerance = _TOLERANCE.get(part.dtype, _HALF_TOLERANCE)
    return not bool(torch.isfinite(scale) & (error > tolerance * scale + 1e-30))
