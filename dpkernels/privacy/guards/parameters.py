"""The watch of parameters: only a private step may write them between a logical batch and its step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dpkernels.privacy.guards.preconditions import some_of
from dpkernels.privacy.ranks.sharded import is_sharded, local_part


class ParameterWatch:
    """Refuses a forward or backward that writes parameters, trained or frozen.

    Examples are a code book that is initialised from the first batch, dead codes that are replaced by activations, and
    an embedding with max_norm. They write values that depend on the data and would be released without noise.

    No parameter may be written from the moment that a logical batch is handed out (`open`) until its step, for every
    way to call the model: its `__call__`, another method, a part of it, a compiled copy. Without a loader that hands
    out batches, a forward of the model begins the watch (`begin`). Between a step and the next logical batch parameters
    may be written: projected, clamped, loaded.

    Every check compares autograd's version counters. These miss writes through `.data`. In the 1st, 2nd, 4th, 8th, ...
    batch the 1st, 2nd, 4th, ... check and the check before the step therefore also compare sums of the parameters'
    bits, which detect every write except an exchange of entries.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters = list(model.parameters())
        self._whole = all(type(parameter) is nn.Parameter for parameter in self._parameters)
        self._begun = self._checks = 0
        self._is_open = False
        self._versions: list[int] | None = None
        self._bits: dict[int, Tensor] = {}
        # Indices of parameters that are rewritten with unchanged values: max_norm if no row is too long.
        self._rewritten: set[int] = set()

    def open(self) -> None:
        """Begin the watch: a logical batch is handed out."""
        self._is_open = True
        self._note()

    def begin(self) -> None:
        """Begin the watch when a forward of the model begins, unless a logical batch is open."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return
        if not self._is_open:
            self._note()

    def end(self) -> None:
        """Check after a forward. The watch ends if no backward can follow and no batch is open."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return
        self.check()
        if not torch.is_grad_enabled() and not self._is_open:
            self.forget()

    def forget(self) -> None:
        """End the watch: a step, or the code of a training loop, may write the parameters."""
        self._is_open, self._versions, self._bits = False, None, {}

    def check(self, *, last: bool = False) -> None:
        """Raise RuntimeError, by name, if a parameter was written since `open` or `begin`.

        last: whether this is the batch's last check, which compares values in every batch that has them.
        """
        if self._versions is None:
            return
        self._checks += 1
        now = self._versions_now()
        moved = set()
        if now != self._versions:
            moved = {i for i, (a, b) in enumerate(zip(self._versions, now, strict=True)) if a != b}
        everything = last or is_power_of_two(self._checks)
        bits_now = self._read(self._bits if everything else self._bits.keys() & (self._rewritten | moved))
        written = {i for i, bits in bits_now.items() if not torch.equal(bits, self._bits[i])}
        self._rewritten |= moved & bits_now.keys() - written
        written |= moved - bits_now.keys()
        if written:
            raise RuntimeError(written_message(self._names[place] for place in sorted(written)))

    def _note(self) -> None:
        self._begun, self._checks = self._begun + 1, 0
        self._versions = self._versions_now()
        everything = is_power_of_two(self._begun)
        self._bits = self._read(range(len(self._parameters)) if everything else self._rewritten)

    def _versions_now(self) -> list[int]:
        if self._whole:  # `version_of` without its calls, which are thousands in every step
            return [0 if p.is_inference() else p._version for p in self._parameters]
        return list(map(version_of, self._parameters))

    def _read(self, places: Iterable[int]) -> dict[int, Tensor]:
        read = ((place, sum_of_bits(self._parameters[place])) for place in places)
        return {place: bits for place, bits in read if bits is not None}


def written_message(names: Iterable[str]) -> str:
    """The message that refuses a model which writes these parameters."""
    return (
        f"parameters were written while the model computed: {some_of(names)}. They may hold data of the "
        "examples, which would be released without noise. Move such updates (code books, max_norm, a moving "
        "average, initialisation from the first batch) from the module to the training loop, after step(), or "
        "do them before make_private, on public data."
    )


def is_power_of_two(count: int) -> bool:
    """Whether a count is 1, 2, 4, 8, ..."""
    return not count & (count - 1)


def version_of(parameter: Tensor) -> int:
    """Autograd's version counter; of a sharded tensor, also that of its local part."""
    version = 0 if parameter.is_inference() else parameter._version
    if type(parameter) is nn.Parameter or not is_sharded(parameter):
        return version
    return version + version_of(local_part(parameter))


@torch.no_grad()
def sum_of_bits(parameter: Tensor) -> Tensor | None:
    """The sum of a tensor's 64-bit words, int64, for every dtype; a contiguous tensor is not copied. Of a sharded
    tensor it is the local part's.

    Returns None if its bits cannot be read: fake tensors have none, and sparse and quantised tensors and subclasses
    have no plain layout. Their version counters are still compared.
    """
    parameter = local_part(parameter)
    plain = type(parameter) in (Tensor, nn.Parameter) and parameter.layout is torch.strided
    if not plain or parameter.is_meta or parameter.is_quantized:
        return None
    flat = parameter.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    words = len(flat) // 8 * 8
    return torch.sum(flat[:words].view(torch.int64)) + torch.sum(flat[words:], dtype=torch.int64)
