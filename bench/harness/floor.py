"""The floor: the least time that this machine needs for an op's arithmetic and for its bytes.

time >= max(FLOPs / rate of a large matrix product, bytes / rate of a large copy), with both rates measured in the
same run (bytes of a copy: read plus written) and FLOPs and bytes from the table of docs/design.md: each input read
once, each output written once. A norm of a linear layer has two forms; its floor is the cheaper one's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.harness.timer import Call, interleave, stopwatch


@dataclass(frozen=True)
class Ceilings:
    """flops: FLOP/s of a large matrix product in `dtype`; bandwidth: bytes/s of a large copy."""

    flops: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        """The floor of that many FLOPs and bytes."""
        return max(flops / self.flops, moved / self.bandwidth)


def measure(device: str, dtype: torch.dtype = torch.float32, *, quick: bool = False) -> Ceilings:
    """Both ceilings of this machine, from medians, on random numbers (zeros can run faster than data)."""
    side = 256 if quick else 1536 if device == "cpu" else 8192
    entries = 1 << (16 if quick else 26 if device == "cpu" else 29)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(entries, device=device)
    target = torch.empty_like(source)
    taken = interleave(
        {
            "product": Call(lambda: torch.mm(a, b, out=product)),
            "copy": Call(lambda: target.copy_(source)),
        },
        rounds=3 if quick else 9,
        measure=stopwatch(device),
    )
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(2 * side**3 / taken["product"].median, moved / taken["copy"].median)
