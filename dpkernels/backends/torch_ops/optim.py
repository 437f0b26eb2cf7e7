"""The step composed from PyTorch, in several passes, with the arithmetic and the order of csrc/common/optim.h."""

import torch
from torch import Tensor

from dpkernels.backends import registry


def _gradient(
    total: Tensor,
    key: Tensor,
    nonce: Tensor,
    noise_scale: float,
    grid: float,
    divisor: float,
) -> Tensor:
    """round((total + noise_scale·z)/grid)·grid/divisor in float32; `total` is set to 0."""
    unit = grid or 1.0
    noised = total / unit  # exact
    if noise_scale > 0:
        normal = registry.implementation("chacha20_normal", total.device.type)
        z = normal(total.numel(), key=bytes(key.tolist()), nonce=bytes(nonce.tolist()), device=total.device)
        noised += z.view(total.shape).mul_(noise_scale / unit)
    if grid:
        noised.round_()
    total.zero_()
    return noised.mul_(unit / divisor).float()


def _random_16(key: Tensor, nonce: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Return 16 uniform bits an entry, from the stream's bytes 2j and 2j + 1."""
    keystream = registry.implementation("chacha20_keystream", device.type)
    count = shape.numel()
    stream = keystream(bytes(key.tolist()), 0, bytes(nonce.tolist()), -(-count // 32), device=device)
    return (stream.view(torch.int16)[:count].int() & 0xFFFF).view(shape)


def _write(param: Tensor, value: Tensor, key: Tensor, rounding_nonce: Tensor | None) -> None:
    if param.dtype == torch.bfloat16 and rounding_nonce is not None:
        bits = value.view(torch.int32) + _random_16(key, rounding_nonce, value.shape, value.device)
        rounded = ((bits >> 16) << 16).view(torch.float32)
        value = torch.where(torch.isfinite(value), rounded, value)
    param.copy_(value)


def _nonce(nonces: Tensor, i: int) -> Tensor:
    return nonces[12 * i : 12 * (i + 1)]


def noise_adamw(
    params: list[Tensor],
    sums: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    steps: list[float],
    key: Tensor,
    nonces: Tensor,
    rounding_nonces: Tensor,
    noise_scale: float,
    grid: float,
    divisor: float,
    maximize: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """Noise, then AdamW; see `dpkernels.ops.noise_adamw`."""
    for i, (param, m, v, t) in enumerate(zip(params, exp_avgs, exp_avg_sqs, steps, strict=True)):
        g = _gradient(sums[i], key, _nonce(nonces, i), noise_scale, grid, divisor)
        if grads:
            grads[i].copy_(g)
        if maximize:
            g.neg_()
        p = param.float()
        if decoupled:
            p = p * (1.0 - lr * weight_decay)
        elif weight_decay != 0:  # 0 times an infinite parameter is not 0
            g += p * weight_decay
        m.mul_(beta1).add_(g * (1.0 - beta1))
        v.mul_(beta2).add_(g * (1.0 - beta2) * g)
        denominator = v.sqrt().mul_((1.0 - beta2**t) ** -0.5).add_(eps)
        p = p - (m / denominator).mul_(lr / (1.0 - beta1**t))
        _write(param, p, key, _nonce(rounding_nonces, i) if rounding_nonces.numel() else None)


def noise_sgd(
    params: list[Tensor],
    sums: list[Tensor],
    momentum_buffers: list[Tensor],
    grads: list[Tensor],
    steps: list[float],
    key: Tensor,
    nonces: Tensor,
    rounding_nonces: Tensor,
    noise_scale: float,
    grid: float,
    divisor: float,
    maximize: bool,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """Noise, then SGD; see `dpkernels.ops.noise_sgd`."""
    for i, (param, t) in enumerate(zip(params, steps, strict=True)):
        g = _gradient(sums[i], key, _nonce(nonces, i), noise_scale, grid, divisor)
        if grads:
            grads[i].copy_(g)
        if maximize:
            g.neg_()
        p = param.float()
        if weight_decay != 0:  # 0 times an infinite parameter is not 0
            g += p * weight_decay
        if momentum != 0:
            buffer = momentum_buffers[i]
            if t == 1:
                buffer.copy_(g)
            else:
                buffer.mul_(momentum).add_(g * (1.0 - dampening))
            g = g + buffer * momentum if nesterov else buffer.clone()
        p = p - g * lr
        _write(param, p, key, _nonce(rounding_nonces, i) if rounding_nonces.numel() else None)
