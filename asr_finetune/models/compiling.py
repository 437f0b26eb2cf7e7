"""torch.compile of the blocks that are frozen.

Only of those: a trained layer puts records on the private model's tape, which is Python that torch.compile would break
its graphs at, or make part of them. A frozen block has no part in clipping: it passes activations and their gradients
on. What is checked of it is checked as ever: its parameters, buffers and modules are the same objects, a buffer that it
writes is seen to change, and the self-check's gradients go through the compiled code.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor, nn

from asr_finetune.config.values import ConfigError

Backend = str | Callable[..., Any]

# Compiled forms of one block: one utterance or several, in training and not, with gradients or without, and shapes that
# an operation treats differently. Whisper's encoder was seen to have 7; beyond torch's 8 a block runs uncompiled.
_FORMS = 64


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
        ConfigError: the backend does not work on this machine; says why.
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
        raise ConfigError(
            f"train.compile_frozen=true: torch.compile (backend {backend!r}) does not work here on {device}: {reason}. "
            "It needs a C++ compiler (g++ or clang++), and on a GPU Triton: install what is missing, or set it to false"
        ) from error


def _trial(x: Tensor) -> Tensor:
    return torch.sin(x) * x
