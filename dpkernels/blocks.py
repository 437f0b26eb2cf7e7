"""What is done with whole blocks of a model: recomputed activations, and torch.compile of those that are frozen.

Activation checkpointing is torch's non-reentrant kind: the reentrant one gives a block whose input needs no gradient,
as the first one above frozen layers, none at all, and refuses the `torch.autograd.grad` that the self-check uses.

Only frozen blocks are compiled: a trained layer puts records on the private model's tape, which is Python that
torch.compile would break its graphs at, or make part of them. A frozen block has no part in clipping: it passes
activations and their gradients on. What is checked of it is checked as ever: its parameters, buffers and modules are
the same objects, a buffer that it writes is seen to change, and the self-check's gradients go through the compiled
code.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor, nn

Backend = str | Callable[..., Any]

# Compiled forms of one block: one utterance or several, in training and not, with gradients or without, and shapes that
# an operation treats differently. Whisper's encoder was seen to have 7; beyond torch's 8 a block runs uncompiled.
_FORMS = 64


def base_model(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap is not None else model


def has_checkpointing(model: nn.Module) -> bool:
    """Whether the transformers model, under any PEFT wrapper, can recompute its blocks."""
    return bool(getattr(base_model(model), "supports_gradient_checkpointing", False))


def checkpoint_blocks(model: nn.Module, **options: Any) -> None:
    """Have every block of the model recomputed in the backward, in place; in training mode only.

    Dropout masks are those of the forward: torch's `preserve_rng_state` stays True, unless `options` say otherwise.

    Args:
        model: a transformers model, or a PEFT model around one.
        options: further arguments of `torch.utils.checkpoint.checkpoint`.

    Raises:
        ValueError: a model that has no such blocks.
    """
    base = base_model(model)
    if not has_checkpointing(model):
        raise ValueError(f"{type(base).__name__} has no activation checkpointing: train it without")
    # The second name is of transformers before 5.24, which calls it deprecated.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False, **options})


class CompilerError(ValueError):
    """torch.compile does not work on this machine; the message says why."""


def compile_frozen_blocks(model: nn.Module, *, backend: Backend = "inductor") -> list[str]:
    """Compile every frozen block of the model in place, for any batch and length; call it before `make_private`.

    A block is compiled when it is first called. One that is checkpointed as a whole block's part stays so; what is
    checkpointed within it no longer is. For the process, torch's limit of compiled forms is set higher, and compiled
    backwards keep what a second backward needs (strategy="two_pass").

    Args:
        model: with what is trained chosen. Names, classes and saved files stay as they are; a copy is not compiled.
        backend: of torch.compile.

    Returns:
        Names of the blocks: `frozen_blocks`.

    Raises:
        CompilerError: the backend does not work on this machine; says why.
    """
    blocks = list(frozen_blocks(model))
    if blocks and isinstance(backend, str):
        _check(backend, next(model.parameters()).device)
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _FORMS)
    torch._functorch.config.donated_buffer = False
    part: Any  # a flag is set on it that not every module has
    for _, block in blocks:
        for part in block.modules():
            # Graphs with checkpoints in them are not for every backend, and what a compiled block keeps for its
            # backward is chosen by torch.compile; nothing, where no gradient passes (a whole frozen encoder).
            if getattr(part, "gradient_checkpointing", False):
                vars(part)["gradient_checkpointing"] = False
        block.compile(dynamic=True, backend=backend)
    return [name for name, _ in blocks]


def frozen_blocks(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest submodules that hold parameters, none of them trained, and submodules, and have a forward; by name.

    A layer alone is none: it is one kernel in any case. Nor are lists of modules, which are not called, and torch's own
    containers (nn.Sequential): `Module.compile` passes over code of torch.nn, and would compile nothing.
    """
    parameters = list(model.parameters())
    frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
    children = list(model.named_children())
    own_forward = not getattr(type(model).forward, "__module__", "").startswith("torch.nn.")
    if frozen and children and own_forward:
        yield name, model
        return
    for key, child in children:
        yield from frozen_blocks(child, f"{name}.{key}" if name else key)


def _check(backend: str, device: torch.device) -> None:
    """Compile and run one small operation, so that a machine that cannot is found at once, and not within a block."""
    try:
        torch.compile(_trial, backend=backend, dynamic=True)(torch.ones(2, device=device))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise CompilerError(
            f"torch.compile (backend {backend!r}) does not work here on {device}: {reason}. It needs a C++ compiler "
            "(g++ or clang++), and on a GPU Triton: install what is missing, or train without"
        ) from error


def _trial(x: Tensor) -> Tensor:
    return torch.sin(x) * x
