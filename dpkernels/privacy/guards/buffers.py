"""Buffers are watched: what a model keeps of the data in them is released with it, or steers what others add."""

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
    """Names of the buffers that were written, replaced, added or removed in between."""
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


class BufferWatch:
    """The values of a model's buffers, and its modules' extra state, at make_private.

    The guard's other check compares identities and autograd's version counters of the buffers that `state_dict()`
    would release, before every backward. It rests on this one: a buffer that was replaced leaves its identity to a
    later tensor, unless someone holds it; and writes through `.data` (code books that are moving averages are often
    written so) or numpy count nowhere.

    Buffers that are not saved are watched too: a queue, or a running mean that later forwards read, lets one example
    change what others add in steps that it is not in. They may take another shape: a table of positions that grows is
    kept anew.

    Values are compared at the 1st, 2nd, 4th, 8th, ... call and every 256th, since each waits for the device (a module
    that records the data mostly does so from the first forward on), and whenever `compare` is called.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._released = {
            name: (buffer, buffer.detach().clone()) for name, buffer in released_buffers(model).items()
        }
        self._passing = {
            name: buffer.detach().clone() for name, buffer, saved in _buffers(model) if not saved
        }
        self._extra = _extra_states(model)
        self._calls = 0

    def check(self) -> None:
        """Raise RuntimeError, by name, where a value has changed; does nothing in most calls."""
        self._calls += 1
        if not self._calls & (self._calls - 1) or self._calls % _AT_LEAST_EVERY == 0:
            self.compare()

    @torch.no_grad()
    def compare(self) -> None:
        """Raise RuntimeError, by name, where a value has changed."""
        written = [name for name, (buffer, was) in self._released.items() if not _same(buffer, was)]
        if written:
            raise RuntimeError(
                f"buffers of the model were written past autograd (.data, numpy): {some_of(written)}. Running "
                "statistics, code books and the like would carry data of the examples into the saved model without "
                "noise. Put their modules into eval(), or take them out of the model."
            )
        now = {name: buffer for name, buffer, saved in _buffers(self._model) if not saved}
        kept = [
            name
            for name, was in self._passing.items()
            if name in now and not _same(now[name], was, grown=True)
        ]
        if kept:
            raise RuntimeError(
                f"buffers of the model changed, though they are not saved: {some_of(kept)}. What one forward leaves "
                "for later ones (a queue, a running mean) lets an example change what others add in steps that it "
                "is not in, beyond the clipping bound. Put their modules into eval(), or take them out of the model. "
                "Where it is a table that the longest input makes (of positions), make it before make_private: one "
                "forward of that length."
            )
        for name, buffer in now.items():
            if name not in self._passing or self._passing[name].shape != buffer.shape:
                self._passing[name] = buffer.detach().clone()
        states = _extra_states(self._model)
        changed = [name for name in states if states[name] != self._extra.get(name)]
        if changed:
            raise RuntimeError(
                f"extra state of modules changed: {some_of(changed)}. state_dict() saves what their "
                "get_extra_state() gives, without noise. Put them into eval(), or take them out of the model."
            )


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, buffer, and whether `state_dict()` would release it."""
    for prefix, module in named_modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                saved = name not in module._non_persistent_buffers_set
                yield f"{prefix}.{name}" if prefix else name, buffer, saved


def _extra_states(model: nn.Module) -> dict[str, str]:
    """A digest of what `get_extra_state` gives, for the modules that have one."""
    found = {}
    for name, module in named_modules(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            written = io.BytesIO()
            torch.save(module.get_extra_state(), written)
            found[name or type(module).__name__] = hashlib.sha256(written.getvalue()).hexdigest()
    return found


def _same(buffer: Tensor, was: Tensor, *, grown: bool = False) -> bool:
    """Equal values; a NaN equals a NaN. `grown`: one of another form may be anything."""
    if any(t.is_meta or isinstance(t, torch._subclasses.FakeTensor) for t in (buffer, was)):
        return True  # a rehearsal: there are no values
    if buffer.shape != was.shape or buffer.dtype != was.dtype or buffer.device != was.device:
        return grown
    return bool(((buffer == was) | ((buffer != buffer) & (was != was))).all())
