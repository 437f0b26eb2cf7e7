"""What the user is told instead of a traceback: expected errors, and each warning once."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TextIO

from rich.console import Console

# Errors that are messages to the user whatever their base class, by the module that defines them.
_EXPECTED = {
    "asr_finetune.training.loop": ("Interrupted",),
    "asr_finetune.demo.synth": ("SynthesisError",),
    "dpkernels.privacy": ("BudgetExhausted", "SelfCheckError"),
}
_said: set[str] = set()


def expected(error: BaseException) -> bool:
    """Whether an error is a message of ours to the user, rather than a fault to be traced.

    ValueError and FileNotFoundError count where this package or dpkernels raised them; the same classes
    raised inside another library are faults.
    """
    for module, names in _EXPECTED.items():
        loaded = sys.modules.get(module)  # not loaded: the error cannot be one of its classes
        if loaded is not None and isinstance(error, tuple(getattr(loaded, name) for name in names)):
            return True
    if not isinstance(error, ValueError | FileNotFoundError):
        return False
    return _raising_module(error.__traceback__).split(".")[0] in ("asr_finetune", "dpkernels")


def _raising_module(trace: TracebackType | None) -> str:
    name = ""
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return name


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning, the same one once in a run wherever it arises."""
    if str(message) in _said:
        return
    _said.add(str(message))
    tell(f"warning: {message}", "yellow")


def tell(text: str, style: str) -> None:
    """A line on standard error."""
    Console(stderr=True, soft_wrap=True).print(text, style=style, markup=False, highlight=False)
