"""Parameters are watched: nothing but a private step may write them while the model computes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpkernels.privacy.checks import some_of


class ParameterWatch:
    """Refuses a forward or backward that writes parameters, trained or frozen.

    A code book that is initialised from the first batch, dead codes that are replaced by activations, an embedding with
    max_norm: what is written there is of the data, and released without noise.

    `begin` comes before each forward of the model, `check` after it and after the backward. Autograd's version counters
    are compared each time; what is written through `.data` counts nowhere, so that in the 1st, 2nd, 4th, 8th, ...
    forward sums of the parameters' bits are compared, too, which reads all of them. Between a step and the next
    forward parameters may be written: projected, clamped, loaded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters = list(model.parameters())
        self._forwards = 0
        self._versions: list[int] | None = None
        self._bits: list[Tensor | None] | None = None

    def begin(self) -> None:
        """Note the parameters as they are: a forward begins."""
        self._forwards += 1
        self._versions = [parameter._version for parameter in self._parameters]
        look = not self._forwards & (self._forwards - 1)
        self._bits = [_sum_of_bits(parameter) for parameter in self._parameters] if look else None

    def forget(self) -> None:
        """What comes now may write: a step, or the code of a training loop."""
        self._versions = self._bits = None

    def check(self) -> None:
        """Raise RuntimeError, by name, where a parameter was written since `begin`."""
        if self._versions is None:
            return
        now = [parameter._version for parameter in self._parameters]
        written: Sequence[str] = ()
        if now != self._versions:
            written = [name for name, a, b in zip(self._names, self._versions, now, strict=True) if a != b]
        elif self._bits is not None:
            pairs = zip(self._names, self._bits, map(_sum_of_bits, self._parameters), strict=True)
            written = [
                name for name, a, b in pairs if a is not None and b is not None and not torch.equal(a, b)
            ]
        if written:
            self.forget()
            raise RuntimeError(
                f"parameters were written while the model computed: {some_of(written)}. Data of the examples in them "
                "would be released without noise. Take such updates (code books, max_norm, initialisation from the "
                "first batch) out of the module, or do them before make_private, on public data."
            )


@torch.no_grad()
def _sum_of_bits(parameter: Tensor) -> Tensor | None:
    """The sum of a tensor's 64-bit words, int64: no copy, whatever its dtype. None where it has no values (a
    rehearsal's)."""
    if parameter.is_meta or isinstance(parameter, torch._subclasses.FakeTensor):
        return None
    flat = parameter.detach().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    words = len(flat) // 8 * 8
    return torch.sum(flat[:words].view(torch.int64)) + torch.sum(flat[words:], dtype=torch.int64)
