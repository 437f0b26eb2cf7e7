"""Parameters are watched: nothing but a private step may write them while the model computes."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dpkernels.privacy.guards.preconditions import some_of


class ParameterWatch:
    """Refuses a forward or backward that writes parameters, trained or frozen.

    A code book that is initialised from the first batch, dead codes that are replaced by activations, an embedding with
    max_norm: what is written there is of the data, and released without noise.

    From the moment that a logical batch is handed out (`open`) until its step nothing may write them, whichever way the
    model is entered: its `__call__`, another method, a part of it, a compiled copy. Where no loader hands out batches,
    a forward of the model begins the watch (`begin`). Between a step and the next logical batch parameters may be
    written: projected, clamped, loaded.

    Autograd's version counters are compared at every check. What is written through `.data` counts nowhere, so that of
    the 1st, 2nd, 4th, 8th, ... batch sums of the parameters' bits are compared, too, at its 1st, 2nd, 4th, ... check
    and before its step, which reads all of them and sees all but an exchange of entries.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters = list(model.parameters())
        self._begun = self._checks = 0
        self._is_open = False
        self._versions: list[int] | None = None
        self._bits: dict[int, Tensor] = {}
        # Places of those that are written with the values they have: max_norm where no row is too long.
        self._restless: set[int] = set()

    def open(self) -> None:
        """Note the parameters as they are: a logical batch is handed out."""
        self._is_open = True
        self._note()

    def begin(self) -> None:
        """Note the parameters as they are, unless a logical batch is open: a forward of the model begins."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return
        if not self._is_open:
            self._note()

    def end(self) -> None:
        """Check after a forward; where no backward can follow, and no batch is open, what comes next may write."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return
        self.check()
        if not torch.is_grad_enabled() and not self._is_open:
            self.forget()

    def forget(self) -> None:
        """What comes now may write: a step, or the code of a training loop."""
        self._is_open, self._versions, self._bits = False, None, {}

    def check(self, *, last: bool = False) -> None:
        """Raise RuntimeError, by name, where a parameter was written since `open` or `begin`.

        last: of this batch; values are compared where they are at all in it.
        """
        if self._versions is None:
            return
        self._checks += 1
        now = list(map(_version, self._parameters))
        moved = set()
        if now != self._versions:
            moved = {i for i, (a, b) in enumerate(zip(self._versions, now, strict=True)) if a != b}
        everything = last or _is_power_of_two(self._checks)
        found = self._read(self._bits if everything else self._bits.keys() & (self._restless | moved))
        written = {i for i, bits in found.items() if not torch.equal(bits, self._bits[i])}
        self._restless |= moved & found.keys() - written
        written |= moved - found.keys()
        if written:
            names = (self._names[place] for place in sorted(written))
            raise RuntimeError(
                f"parameters were written while the model computed: {some_of(names)}. Data of the examples in them "
                "would be released without noise. Take such updates (code books, max_norm, a moving average, "
                "initialisation from the first batch) out of the module into the training loop, after step(), or do "
                "them before make_private, on public data."
            )

    def _note(self) -> None:
        self._begun, self._checks = self._begun + 1, 0
        self._versions = list(map(_version, self._parameters))
        everything = _is_power_of_two(self._begun)
        self._bits = self._read(range(len(self._parameters)) if everything else self._restless)

    def _read(self, places: Iterable[int]) -> dict[int, Tensor]:
        read = ((place, _sum_of_bits(self._parameters[place])) for place in places)
        return {place: bits for place, bits in read if bits is not None}


def _is_power_of_two(count: int) -> bool:
    return not count & (count - 1)


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


@torch.no_grad()
def _sum_of_bits(parameter: Tensor) -> Tensor | None:
    """The sum of a tensor's 64-bit words, int64, whatever its dtype; a contiguous one is not copied.

    None where its bits cannot be read: those of a rehearsal have none, sparse and quantised ones and subclasses have no
    plain layout. Their version counters remain.
    """
    plain = type(parameter) in (Tensor, nn.Parameter) and parameter.layout is torch.strided
    if not plain or parameter.is_meta or parameter.is_quantized:
        return None
    flat = parameter.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    words = len(flat) // 8 * 8
    return torch.sum(flat[:words].view(torch.int64)) + torch.sum(flat[words:], dtype=torch.int64)
