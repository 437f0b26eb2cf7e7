"""Definition of the noise on finished sums."""

from torch import Tensor

from dpkernels.reference._definitions import definition
from dpkernels.reference.chacha20 import chacha20_normal


@definition
def noise_sums(
    sums: list[Tensor], key: Tensor, nonces: Tensor, noise_scale: float, grid: float, divisor: float
) -> None:
    """sum = round((sum + noise_scale·z)/grid)·grid/divisor."""
    secret, streams = bytes(key.tolist()), bytes(nonces.tolist())
    for i, total in enumerate(sums):
        noised = total.clone()
        if noise_scale > 0:
            z = chacha20_normal(total.numel(), key=secret, nonce=streams[12 * i : 12 * (i + 1)])
            noised += noise_scale * z.view(total.shape)
        if grid:
            noised = (noised / grid).round() * grid
        total.copy_(noised / divisor)
