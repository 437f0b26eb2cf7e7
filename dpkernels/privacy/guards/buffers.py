"""The watch of buffers: data kept in them is released with the model, or changes other examples' contributions."""

import hashlib
import io
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dpkernels.nn import named_modules
from dpkernels.privacy.guards.preconditions import some_of

_AT_LEAST_EVERY = 256  # steps


def released_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Every buffer that state_dict() would release, by name."""
    return {name: buffer for name, buffer, saved in _buffers(model) if saved}


def buffer_marks(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(identity, version) of the released buffers, by name."""
    return {name: (id(buffer), buffer._version) for name, buffer in released_buffers(model).items()}


def changed_buffers(then: dict[str, tuple[int, int]], now: dict[str, tuple[int, int]]) -> list[str]:
    """Names of the buffers that were written, replaced, added or removed between two `buffer_marks`."""
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


class BufferWatch:
    """Compares a model's buffers, and its modules' extra state, with their values at make_private.

    Before every backward the guard's other check compares identities and autograd's version counters of the buffers
    that `state_dict()` would release. It depends on this watch in two ways. The watch holds the buffers, so that no
    later tensor can get the identity of a replaced one. It also detects writes through `.data` (often used for code
    books that are moving averages) or numpy, which no counter records.

    Unsaved buffers are watched, too: through a queue, or a running mean that later forwards read, one example can
    change the contributions of others in steps without it. They may change their shape: a position table that grows
    is recorded again.

    Values are compared at the 1st, 2nd, 4th, 8th, ... call and every 256th, since each comparison waits for the device
    (a module that records the data mostly does so from the first forward on), and whenever `compare` is called.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._released = {
            name: (buffer, buffer.detach().clone()) for name, buffer in released_buffers(model).items()
        }
        self._unsaved = {
            name: buffer.detach().clone() for name, buffer, saved in _buffers(model) if not saved
        }
        self._extra = _extra_states(model)
        self._calls = 0

    def check(self) -> None:
        """Raise RuntimeError, by name, if a value has changed; does nothing in most calls."""
        self._calls += 1
        if not self._calls & (self._calls - 1) or self._calls % _AT_LEAST_EVERY == 0:
            self.compare()

    @torch.no_grad()
    def compare(self) -> None:
        """Raise RuntimeError, by name, if a value has changed."""
        written = [name for name, (buffer, was) in self._released.items() if not _same(buffer, was)]
        if written:
            raise RuntimeError(
                f"buffers of the model were written past autograd (.data, numpy): {some_of(written)}. Running "
                "statistics, code books and similar buffers would carry data of the examples into the saved model "
                "without noise. Put their modules into eval(), or take them out of the model."
            )
        now = {name: buffer for name, buffer, saved in _buffers(self._model) if not saved}
        kept = [
            name
            for name, was in self._unsaved.items()
            if name in now and not _same(now[name], was, grown=True)
        ]
        if kept:
            raise RuntimeError(
                f"buffers of the model that are not saved changed: {some_of(kept)}. Through values kept for later "
                "forwards (a queue, a running mean) an example can change the contributions of others in steps without "
                "it, beyond the clipping bound. Put their modules into eval(), or take them out of the model. "
                "If the buffer is a position table that grows with the longest input, run one forward of that length "
                "before make_private."
            )
        for name, buffer in now.items():
            if name not in self._unsaved or self._unsaved[name].shape != buffer.shape:
                self._unsaved[name] = buffer.detach().clone()
        states = _extra_states(self._model)
        changed = [name for name in states if states[name] != self._extra.get(name)]
        if changed:
            raise RuntimeError(
                f"extra state of modules changed: {some_of(changed)}. state_dict() saves the result of their "
                "get_extra_state() without noise. Put them into eval(), or take them out of the model."
            )


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Name and value of each buffer, and whether `state_dict()` would release it."""
    for prefix, module in named_modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                saved = name not in module._non_persistent_buffers_set
                yield f"{prefix}.{name}" if prefix else name, buffer, saved


def _extra_states(model: nn.Module) -> dict[str, str]:
    """A digest of `get_extra_state()` for each module that defines it, by name."""
    digests = {}
    for name, module in named_modules(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            written = io.BytesIO()
            torch.save(module.get_extra_state(), written)
            digests[name or type(module).__name__] = hashlib.sha256(written.getvalue()).hexdigest()
    return digests


def _same(buffer: Tensor, was: Tensor, *, grown: bool = False) -> bool:
    """Whether values are equal; a NaN equals a NaN. `grown`: the result for another shape, dtype or device."""
    if any(t.is_meta or isinstance(t, torch._subclasses.FakeTensor) for t in (buffer, was)):
        return True  # fake tensors have no values
    if buffer.shape != was.shape or buffer.dtype != was.dtype or buffer.device != was.device:
        return grown
    return bool(((buffer == was) | ((buffer != buffer) & (was != was))).all())
