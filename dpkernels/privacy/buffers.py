"""Buffers that a released model would carry: kept, so that what is written past autograd's counters is noticed."""

import torch
from torch import Tensor, nn

from dpkernels.nn import named_modules
from dpkernels.privacy.checks import some_of


def released_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Every buffer that state_dict() would release, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in named_modules(model)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def buffer_marks(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(identity, version) of the released buffers, by name."""
    return {name: (id(buffer), buffer._version) for name, buffer in released_buffers(model).items()}


def changed_buffers(then: dict[str, tuple[int, int]], now: dict[str, tuple[int, int]]) -> list[str]:
    """Names of the buffers that were written, replaced, added or removed in between."""
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


class BufferWatch:
    """The buffers that `state_dict()` would release, and their values at make_private.

    The guard's other check compares identities and autograd's version counters before every backward. It rests on
    this one: a buffer that was replaced leaves its identity to a later tensor, unless someone holds it; and writes
    through `.data` (code books that are moving averages are often written so) or numpy count nowhere. Values are
    compared at the 1st, 2nd, 4th, 8th, ... call, since each waits for the device: a module that records the data does
    so from the first forward on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = {
            name: (buffer, buffer.detach().clone()) for name, buffer in released_buffers(model).items()
        }
        self._calls = 0

    @torch.no_grad()
    def check(self) -> None:
        """Raise RuntimeError, by name, where a value has changed; does nothing in most calls."""
        self._calls += 1
        if self._calls & (self._calls - 1):
            return
        written = [name for name, (buffer, was) in self._kept.items() if not _same(buffer, was)]
        if written:
            raise RuntimeError(
                f"buffers of the model were written past autograd (.data, numpy): {some_of(written)}. Running "
                "statistics, code books and the like would carry data of the examples into the saved model without "
                "noise. Put their modules into eval(), or register them with persistent=False."
            )


def _same(buffer: Tensor, was: Tensor) -> bool:
    """Equal values; a NaN equals a NaN."""
    if any(t.is_meta or isinstance(t, torch._subclasses.FakeTensor) for t in (buffer, was)):
        return True  # a rehearsal: there are no values
    if buffer.shape != was.shape or buffer.dtype != was.dtype or buffer.device != was.device:
        return False
    return bool(((buffer == was) | ((buffer != buffer) & (was != was))).all())
