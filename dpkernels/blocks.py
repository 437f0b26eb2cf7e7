"""Operations on blocks of a model: activation checkpointing, and torch.compile of frozen blocks.

Activation checkpointing is torch's non-reentrant kind. The reentrant kind computes no gradient for a block whose input
needs none, such as the first one above frozen layers, and refuses the `torch.autograd.grad` that the self-check uses.

Only frozen blocks are compiled here. A trained layer adds records to the private model's tape; torch.compile of a whole
private model puts such layers into its graph as single ops (`dpkernels.nn.recording.compiled`). A frozen block is not
clipped: it only passes on activations and their gradients. All checks of it remain: its parameters, buffers and modules
are the same objects, a change of a buffer is detected, and the self-check's gradients go through the compiled code.
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

# Compiled forms of one block: one utterance or several, training or evaluation, with gradients or without, and shapes
# that an operation treats differently. Whisper's encoder has 7; beyond torch's limit of 8 a block runs uncompiled.
_FORMS = 64


def base_model(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap is not None else model


def has_checkpointing(model: nn.Module) -> bool:
    """Whether the transformers model, under any PEFT wrapper, can recompute its blocks."""
    return bool(getattr(base_model(model), "supports_gradient_checkpointing", False))


def checkpoint_blocks(model: nn.Module, **options: Any) -> None:
    """Recompute every block of the model in the backward, in place; in training mode only.

    Dropout masks are those of the forward, since torch's `preserve_rng_state` is True unless `options` changes it.

    Args:
        model: a transformers model, or a PEFT model around one.
        options: further arguments of `torch.utils.checkpoint.checkpoint`.

    Raises:
        ValueError: the model has no activation checkpointing.
    """
    base = base_model(model)
    if not has_checkpointing(model):
        raise ValueError(f"{type(base).__name__} has no activation checkpointing: train it without")
    # The second name is that of transformers before 5.24, and deprecated since.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False, **options})


class CompilerError(ValueError):
    """torch.compile does not work on this machine; the message has the reason."""


def compile_frozen_blocks(model: nn.Module, *, backend: Backend = "inductor") -> list[str]:
    """Compile every frozen block of the model in place, for any batch and length; call it before `make_private`.

    A block is compiled at its first call. Checkpointing of a larger block around it remains; checkpointing within it is
    switched off. For the process, torch's limit of compiled forms is raised, and compiled backwards keep the tensors
    that a second backward needs (strategy="two_pass").

    Args:
        model: the model, with its trained parameters chosen. Names, classes and saved files are unchanged; a copy is
            not compiled.
        backend: the backend of torch.compile.

    Returns:
        Names of the blocks: `frozen_blocks`.

    Raises:
        CompilerError: the backend does not work on this machine; the message has the reason.
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
            # Some backends do not support graphs with checkpoints, and torch.compile itself chooses the tensors that a
            # compiled block keeps for its backward (none, if no gradient passes, as in a fully frozen encoder).
            if getattr(part, "gradient_checkpointing", False):
                vars(part)["gradient_checkpointing"] = False
        block.compile(dynamic=True, backend=backend)
    return [name for name, _ in blocks]


def frozen_blocks(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest submodules with parameters, all of them frozen, with submodules, and with a forward; by name.

    A single layer is not a block, since it is one kernel anyway. Lists of modules are not called, and torch's own
    containers (nn.Sequential) are left out because `Module.compile` skips code of torch.nn and would compile nothing.
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
    """Compile and run one small operation, so that a missing compiler is reported at once, not within a block."""
    try:
        torch.compile(_trial, backend=backend, dynamic=True)(torch.ones(2, device=device))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise CompilerError(
            f"torch.compile (backend {backend!r}) does not work here on {device}: {reason}. It needs a C++ compiler "
            "(g++ or clang++), and on a GPU Triton: install the missing one, or train without torch.compile"
        ) from error


def _trial(x: Tensor) -> Tensor:
    return torch.sin(x) * x
