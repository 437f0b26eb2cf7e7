"""Definition of the fused step: noise, division and the optimizer's update in float64, rounded when stored."""

import torch
from torch import Tensor

from dpkernels.reference._definitions import definition
from dpkernels.reference.chacha20 import chacha20_keystream, chacha20_normal


def noised_gradient(
    total: Tensor, key: bytes, nonce: bytes, noise_scale: float, grid: float, divisor: float
) -> Tensor:
    """g = round((sum + noise_scale·z)/grid)·grid/divisor, ties to even, rounded to float32, as float64."""
    noised = total.clone()
    if noise_scale > 0:
        noised += noise_scale * chacha20_normal(total.numel(), key=key, nonce=nonce).view(total.shape)
    if grid:
        noised = (noised / grid).round() * grid
    return (noised / divisor).float().double()


def store(param: Tensor, value: Tensor, key: bytes, rounding_nonce: bytes) -> None:
    """Store a value in the parameter's dtype, rounded to nearest, or stochastically for bfloat16 with a nonce.

    The low 16 bits of a float32 are its distance from the bfloat16 towards 0, in units of 2⁻¹⁶ of the distance between
    its two neighbours. Rounding goes away from 0 if these bits plus 16 random bits carry.
    """
    value = value.float()
    if param.dtype == torch.bfloat16 and rounding_nonce:
        count = value.numel()
        stream = chacha20_keystream(key, 0, rounding_nonce, -(-count // 32)).view(-1, 2)[:count].long()
        random = (stream[:, 0] + 256 * stream[:, 1]).view(value.shape).to(value.device)
        bits = value.view(torch.int32).long()
        away = (bits % 65536 + random) >= 65536
        below = (bits - bits % 65536).int().view(torch.float32)
        above = (bits - bits % 65536 + 65536 * away).int().view(torch.float32)
        value = torch.where(torch.isfinite(value), torch.where(away, above, below), value)
    param.copy_(value)


@definition
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
    """Noise, then AdamW, one tensor after another."""
    secret, streams, rounding = (bytes(t.tolist()) for t in (key, nonces, rounding_nonces))
    for i, t in enumerate(steps):
        cut = slice(12 * i, 12 * (i + 1))
        g = noised_gradient(sums[i], secret, streams[cut], noise_scale, grid, divisor)
        sums[i].zero_()
        if grads:
            grads[i].copy_(g)
        p, m, v = params[i].double(), exp_avgs[i].double(), exp_avg_sqs[i].double()
        if maximize:
            g = -g
        if weight_decay != 0 and decoupled:
            p = p - lr * weight_decay * p
        elif weight_decay != 0:
            g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g.square()
        p = p - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        exp_avgs[i].copy_(m)
        exp_avg_sqs[i].copy_(v)
        store(params[i], p, secret, rounding[cut])


@definition
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
    """Noise, then SGD, one tensor after another."""
    secret, streams, rounding = (bytes(t.tolist()) for t in (key, nonces, rounding_nonces))
    for i, t in enumerate(steps):
        cut = slice(12 * i, 12 * (i + 1))
        g = noised_gradient(sums[i], secret, streams[cut], noise_scale, grid, divisor)
        sums[i].zero_()
        if grads:
            grads[i].copy_(g)
        if maximize:
            g = -g
        p = params[i].double()
        if weight_decay != 0:
            g = g + weight_decay * p
        if momentum != 0:
            b = g if t == 1 else momentum * momentum_buffers[i].double() + (1 - dampening) * g
            momentum_buffers[i].copy_(b)
            g = g + momentum * b if nesterov else b
        store(params[i], p - lr * g, secret, rounding[cut])
