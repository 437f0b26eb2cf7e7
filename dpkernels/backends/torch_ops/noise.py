"""Noise, grid and division of finished sums, composed from PyTorch and the op `chacha20_normal`."""

from torch import Tensor

from dpkernels.backends import registry


@registry.composition
def noise_sums(
    sums: list[Tensor], key: Tensor, nonces: Tensor, noise_scale: float, grid: float, divisor: float
) -> None:
    """sum = round((sum + noise_scale·z)/grid)·grid/divisor; see `dpkernels.ops.noise_sums`."""
    normal = registry.implementation("chacha20_normal", sums[0].device.type)
    secret, streams, unit = bytes(key.tolist()), bytes(nonces.tolist()), grid or 1.0
    for i, total in enumerate(sums):
        total.div_(unit)  # exact
        if noise_scale > 0:
            nonce = streams[12 * i : 12 * (i + 1)]
            z = normal(total.numel(), key=secret, nonce=nonce, device=total.device)
            total.add_(z.view(total.shape).mul_(noise_scale / unit))
        if grid:
            total.round_()
        total.mul_(unit / divisor)
