"""The judge: is the private path of one model the plain model's, gradient by gradient?

Everything is float64, so that a wrong gradient cannot pass for rounding: the difference of what is right is some
1e-13, and the limit 1e-9.
"""

from __future__ import annotations

import copy
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

import dpkernels
from bench.models.entry import Batch, Entry, randomise, targets_of, without_dropout
from dpkernels.nn import RowCheck, attach, detach, freeze_batch_norm, swap
from dpkernels.nn.convert.swapping import has_ghost_class, load_library_rules

TOLERANCE = 1e-9
LOOSE_NORM = 5e-3
"""How far a norm may lie above the truth: the kernels' rounding bounds are for float32."""
SIZE = 3
RIGHT, REFUSED, WRONG, ERROR = "right", "refused", "wrong", "error"
METHODS = ("all", "lora")
_OWN = Path(dpkernels.__file__).resolve().parent
_REFUSALS = (ValueError, RuntimeError, NotImplementedError, TypeError)


@dataclass
class Verdict:
    """The verdict on one model with one method.

    Attributes:
        name, library, kind, method: what was judged; method "all" trains what the library itself trains, "lora" PEFT's.
        status: "right", "refused" (by an error of this package that names a module), "wrong" or "error".
        reason: the refusal, the error, or what differs.
        error: of a right one, the largest relative error of a loss, a per-example gradient or a norm that is too small.
        parameters: how many were trained.
        frozen_norms: whether it has batch norms, which `freeze_batch_norm` froze.
    """

    name: str
    library: str
    kind: str
    method: str
    status: str
    reason: str = ""
    error: float | None = None
    parameters: int = 0
    frozen_norms: bool = False


class _Wide(TorchFunctionMode):
    """float64 also where a model casts to float32, as norms and softmaxes do."""

    _narrow = (torch.float32, torch.float16, torch.bfloat16)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()
        widened = {k: self._wide(v) for k, v in (kwargs or {}).items()}
        return func(*(self._wide(a) for a in args), **widened)

    def _wide(self, value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value in self._narrow else value


@contextmanager
def in_float64() -> Iterator[None]:
    """Context in which new floating-point tensors are float64 by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def made(entry: Entry, method: str) -> nn.Module:
    """The entry's model, in float64 and training mode, without dropout; with PEFT's LoRA where method is "lora"."""
    torch.manual_seed(0)
    with _Wide():
        model = entry.build().double()
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=targets_of(entry, model)))
    randomise(model)
    without_dropout(model)
    widen_leaves(model)
    return model.train()


def widen_leaves(model: nn.Module) -> None:
    """Have the modules that the private backward computes again be wide then, too: autograd turns the mode off."""
    load_library_rules()
    for module in model.modules():
        cls: Any = type(module)
        leaf = bool(module._parameters) and next(module.children(), None) is None
        if leaf and not cls.__module__.startswith("torch.nn.") and not has_ghost_class(module):
            module.__class__ = _wide_class(cls)


@cache
def _wide_class(cls: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Wide():
            return cls.forward(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def judge(entry: Entry, method: str) -> Verdict:
    """Judge one entry at two batch sizes; exceptions of the model or the library become verdicts."""
    verdict = Verdict(entry.name, entry.library, entry.kind.name, method, RIGHT)
    with in_float64():
        try:
            model = made(entry, method)
            if any(isinstance(module, _BatchNorm) for module in model.modules()):
                verdict.frozen_norms = True
                with naming(model):
                    freeze_batch_norm(model)
            verdict.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
            worst = 0.0
            for size in (SIZE, entry.kind.size):
                torch.manual_seed(1)
                error, what = largest_error(model, entry, entry.kind.batch(size))
                worst = max(worst, error)
                if not error <= TOLERANCE:
                    verdict.status, verdict.reason = WRONG, f"B = {size}: {what}, off by {error:.2g}"
                    break
            verdict.error = float(f"{worst:.1e}")
        except Refused as refused:
            verdict.status, verdict.reason = REFUSED, str(refused)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the table has to show
            verdict.status, verdict.reason = (
                ERROR,
                _one_line(f"{type(error).__name__}: {error}{_place(error)}"),
            )
    return verdict


class Refused(Exception):
    """The library refused the model by name."""


@contextmanager
def naming(model: nn.Module) -> Iterator[None]:
    """Turn an error within, which this package raised and which names a part of `model`, into Refused."""
    try:
        yield
    except _REFUSALS as error:
        if not _names_what_is_refused(error, model):
            raise
        raise Refused(_one_line(str(error))) from error


def largest_error(model: nn.Module, entry: Entry, batch: Batch) -> tuple[float, str]:
    """(the largest relative error, of what) of the private path of a copy of `model`. Raises Refused."""
    losses, expected = one_by_one(model, entry, batch)
    squares = {name: g.reshape(len(g), -1).square().sum(1) for name, g in expected.items()}
    exact = torch.stack(list(squares.values())).sum(0).sqrt()
    if not float(exact.min()) > 1e-6:
        raise AssertionError(f"norms of the plain gradients: {exact.tolist()}; nothing would be shown")
    with naming(model):
        found_losses, norms, sums = run_private(copy.deepcopy(model), entry, batch)
    errors = [(float((found_losses - losses).abs().max() / losses.abs().max().clamp(min=1e-3)), "the losses")]
    short = ((exact - norms) / exact.clamp(min=1e-6)).max()
    errors.append((float(short.clamp(min=0)), "a norm that is too small"))
    excess = ((norms - exact) / exact.clamp(min=1e-6)).max()
    errors.append((float((excess - LOOSE_NORM).clamp(min=0)), "a norm that is too large"))
    for name, want in expected.items():
        error = (sums[name] - want).reshape(len(want), -1).norm(dim=1)
        # A parameter whose gradient is 0 but for rounding is held to the whole gradient.
        scale = squares[name].sqrt() + 1e-2 * exact + 1e-12
        errors.append((float((error / scale).max()), f"the gradient of {name}"))
    return max(errors, key=lambda item: float("inf") if item[0] != item[0] else item[0])


def one_by_one(model: nn.Module, entry: Entry, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """(losses [B], name -> [B,*shape]): each example alone through a copy of the plain model."""
    plain = copy.deepcopy(model)
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    losses, rows = [], []
    for i in range(len(next(iter(batch.values())))):
        with _Wide():
            loss = entry.kind.loss(plain, {name: t[i : i + 1] for name, t in batch.items()})
        grads = torch.autograd.grad(loss.sum(), list(trained.values()), allow_unused=True)
        losses.append(loss.detach())
        rows.append(
            [torch.zeros_like(p) if g is None else g for p, g in zip(trained.values(), grads, strict=True)]
        )
    return torch.cat(losses), {
        name: torch.stack(row) for name, row in zip(trained, zip(*rows, strict=True), strict=True)
    }


def run_private(model: nn.Module, entry: Entry, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(losses [B], norms [B], name -> per-example gradients [B,*shape]) of one private backward; swaps `model`."""
    tape = attach(swap(model))
    trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
    try:
        with _Wide():
            losses = entry.kind.loss(model, batch)
        size = len(losses)
        with RowCheck(tape).checking(losses):  # as the engine does in the first backward
            tape.open(size)
            losses.sum().backward()
            records = tape.close()
    finally:
        tape.discard()
        detach(model)
    if filled := [name for p, name in trained.items() if p.grad is not None]:
        raise Refused(f"trained parameters were used past their layers' rules: {', '.join(filled[:3])}")
    norm_sq = sum((record.norm_sq().detach().double() for record in records), torch.zeros(size))
    gradients = {name: torch.zeros(size, *p.shape) for p, name in trained.items()}
    for i in range(size):
        factors = torch.eye(size, dtype=torch.float32)[i]
        sums = {p: gradients[name][i] for p, name in trained.items()}
        for record in records:
            record.add_weighted_sum(factors, sums)
    return losses.detach(), norm_sq.sqrt(), gradients


def _names_what_is_refused(error: BaseException, model: nn.Module) -> bool:
    """Whether this package raised `error`, and its text names a module or a parameter of the model."""
    frames = traceback.extract_tb(error.__traceback__)
    if not Path(frames[-1].filename).resolve().is_relative_to(_OWN):
        return False
    words = set(re.findall(r"[\w.]+", str(error)))
    names = {name for name, _ in model.named_modules() if name} | {
        name for name, _ in model.named_parameters()
    }
    return bool(words & names) or type(model).__name__ in words


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.name != "__torch_function__"), frames[-1])
    return f" [{Path(frame.filename).name}, {frame.name}]"


def _one_line(text: str) -> str:
    return " ".join(text.split())
