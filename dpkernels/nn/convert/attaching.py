"""attach, detach and uncovered: convert a swapped model to a private one, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from dpkernels.deprecation import warn_renamed
from dpkernels.nn.batch.batch_axis import batch_size_of, has_values, tensors_in
from dpkernels.nn.convert import swapping
from dpkernels.nn.convert.swapping import has_ghost_class, load_library_rules, subtree_refusal
from dpkernels.nn.copying import HANDLES, reduce_root
from dpkernels.nn.layers.batch_norm import FrozenBatchNorm
from dpkernels.nn.layers.expanded import ExpandingModule, expanding_class, expansion_refusal
from dpkernels.nn.recording.choice import Choice
from dpkernels.nn.recording.compiled import number_layer
from dpkernels.nn.recording.module import GhostModule
from dpkernels.nn.recording.tape import Tape


@dataclass(frozen=True)
class Uncovered:
    """A trained parameter without a norm rule."""

    name: str
    module_type: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name!r} ({self.module_type}): {self.reason}"


def attach(
    model: nn.Module, *, mixed: bool = False, choice: Choice | None = None, keep_small: bool | None = None
) -> Tape:
    """Make `model` private: set a new tape on every ghost layer, and expand small raw parameters. Call it after
    `swap`.

    Frozen parameters stay frozen. To train more of them later, detach, unfreeze them and attach again.
    `mixed` and `choice`: see `Tape`; `keep_small` is an old name of `mixed`.

    Raises ValueError naming every trained parameter that no rule covers, RuntimeError if a tape is attached already.
    """
    if any(getattr(module, "ghost_tape", None) is not None for module in model.modules()):
        raise RuntimeError(
            "attach: the model or a part of it is private already (a tape is attached to it): call "
            "dpkernels.nn.detach(model) first, or build a new model"
        )
    refused = uncovered(model)
    if refused:
        lines = "\n  ".join(str(item) for item in refused)
        raise ValueError(f"attach: these trained parameters have no per-sample norm rule:\n  {lines}")
    if keep_small is not None:
        warn_renamed("attach(keep_small=...)", "mixed")
        mixed = keep_small
    tape = Tape(model.named_parameters(), mixed=mixed, choice=choice)
    tape.needs_to_ask = any(parameter.requires_grad for parameter in model.parameters())
    for name, module in model.named_modules():
        if not isinstance(module, GhostModule):
            raw = tuple(name for name, _ in _direct_trained_parameters(module))
            if not raw:
                continue
            original: Any = type(module)
            module.__class__ = expanding_class(original, raw)
        assert isinstance(module, GhostModule)
        module.ghost_tape = tape
        module.ghost_name = name or type(module).__name__
        module.ghost_number = number_layer(module)

    # These need the values of Python objects outside of a compiled model's graph, as they are at each forward.
    @torch.compiler.disable(reason="the checks of a private forward run outside of the compiled graph")
    def note_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not model:
            return
        if tape.asking:
            return
        size = batch_size_of(args, kwargs)
        tape.enter_forward(size)
        if tape.before_forward is not None:
            tape.before_forward()
        if (
            size
            and _inputs_have_values(args, kwargs)
            and tape.needs_to_ask
            and torch.is_grad_enabled()
            and tape.recording
        ):
            tape.ask(model, args, kwargs, size)
            if tape.after_forward is not None and tape.before_forward is not None:
                tape.after_forward()  # these forwards are checked like any other
                tape.before_forward()

    @torch.compiler.disable(reason="the checks of a private forward run outside of the compiled graph")
    def note_end(module: nn.Module, *_: Any) -> None:
        if module is not model or tape.asking:
            return
        tape.leave_forward()
        if tape.after_forward is not None:
            tape.after_forward()

    model.__dict__[HANDLES] = (
        model.register_forward_pre_hook(note_batch, with_kwargs=True, prepend=True),
        model.register_forward_hook(note_end, always_call=True),
    )
    model.__dict__["__reduce_ex__"] = partial(reduce_root, model)  # copies do not get these hooks
    return tape


def _inputs_have_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the inputs have values. The fake tensors that estimate memory have none."""
    return all(has_values(tensor) for _, tensor in tensors_in((args, kwargs)))


def detach(model: nn.Module, *, unswap: bool = False) -> None:
    """Undo `attach`, so that the model trains ordinarily. Does nothing to a model that is not attached.

    unswap: also undo `swap`. The model is then as it was before `make_private`, with the trained values.
    """
    handles: tuple[RemovableHandle, ...] = model.__dict__.pop(HANDLES, ())
    for handle in handles:
        handle.remove()
    model.__dict__.pop("__reduce_ex__", None)
    for module in model.modules():
        if isinstance(module, GhostModule):
            module.ghost_tape = None
        if isinstance(module, ExpandingModule):
            module.__class__ = module.ghost_original  # type: ignore[assignment]
    if unswap:
        swapping.unswap(model)


def uncovered(model: nn.Module) -> list[Uncovered]:
    """The trained parameters (requires_grad) of a swapped model that no rule covers, each with the reason and the fix.
    `dpkernels.coverage` lists them for any model, together with the rules of the other parameters.

    A parameter of several modules is listed if one of them has no rule for it, unless that module has children and a
    ghost layer uses the parameter.
    """
    load_library_rules()
    refused: dict[nn.Module, str] = {}
    for module in model.modules():
        reason = subtree_refusal(module)
        if reason is not None:
            refused |= dict.fromkeys(module.modules(), reason)
    has_rule = {
        parameter
        for module in model.modules()
        if isinstance(module, GhostModule) and not isinstance(module, ExpandingModule)
        for name, parameter in _direct_trained_parameters(module)
        if name in module.ghost_covers
    }
    without_rule = []
    for prefix, module in model.named_modules():
        for name, parameter in _direct_trained_parameters(module):
            reason = refused.get(module) or _refusal(module, name, parameter)
            merely_holds = not isinstance(module, GhostModule) and next(module.children(), None) is not None
            if reason is not None and not (merely_holds and parameter in has_rule):
                path = f"{prefix}.{name}" if prefix else name
                without_rule.append(Uncovered(path, type(module).__name__, reason))
    return without_rule


def coverage(model: nn.Module) -> list[Uncovered]:
    """The old name of `uncovered`."""
    warn_renamed("dpkernels.nn.coverage", "uncovered (and dpkernels.coverage(model) is the whole table)")
    return uncovered(model)


def _direct_trained_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad:
            yield name, parameter


def _refusal(module: nn.Module, name: str, parameter: nn.Parameter) -> str | None:
    if isinstance(module, parametrize.ParametrizationList) or parametrize.is_parametrized(module):
        return (
            "the module is parametrised (weight_norm, spectral_norm, ...): its weight is computed from other "
            "parameters, outside of any layer; fold them into the weight "
            "(torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')), or freeze the module"
        )
    computed = next((key for key in vars(module) if name.startswith(f"{key}_")), None)
    if computed is not None and isinstance(vars(module)[computed], Tensor):
        return (
            f"a hook computes {computed!r} from it before each forward (weight_norm, spectral_norm, pruning); remove "
            "the hook (torch.nn.utils.remove_weight_norm, remove_spectral_norm, prune.remove), or freeze the module"
        )
    if isinstance(module, GhostModule):
        if name not in module.ghost_covers:
            return f"{type(module).__name__} has no rule for a parameter of this name; freeze it"
        return module.ghost_refusal()
    if has_ghost_class(module):
        return "its module is not swapped; call dpkernels.swap(model) first"
    if isinstance(module, _BatchNorm) and not isinstance(module, FrozenBatchNorm):
        return "batch statistics mix the samples; call dpkernels.nn.freeze_batch_norm(model), or freeze it"
    return expansion_refusal(module, parameter)
