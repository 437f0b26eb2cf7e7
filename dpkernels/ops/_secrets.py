"""Checks of the noise's arguments, and conversion of keys and nonces to the tensors of an op's schema.

The ops' schemas take the key as a tensor, not as bytes: a graph stores a reference to a tensor, not its value.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpkernels.ops import _check
from dpkernels.ops.chacha20 import COUNTER_END, NORMALS_PER_BLOCK


def check_secrets(
    params: Sequence[Tensor],
    key: bytes,
    nonces: Sequence[bytes],
    rounding_nonces: Sequence[bytes],
    noise_scale: float,
    grid: float,
    divisor: float,
) -> tuple[Tensor, Tensor, Tensor, float, float, float]:
    """Check the noise's arguments; return key, nonces, rounding_nonces (flat uint8), noise_scale, grid, divisor.

    These are the arguments of `_NOISE` in `dpkernels.ops.optim`, except `maximize`.
    """
    for name, values in (("nonces", nonces), ("rounding_nonces", rounding_nonces)):
        optional = name == "rounding_nonces" or noise_scale == 0
        if len(values) != len(params) and not (optional and not values):
            raise ValueError(
                f"{name}: expected {len(params)}, as many as params; given {len(values)}; pass one a parameter"
            )
    for label, size, secrets in (
        ("key", 32, (key,)),
        ("nonces", 12, nonces),
        ("rounding_nonces", 12, rounding_nonces),
    ):
        for i, secret in enumerate(secrets):
            if isinstance(secret, bytes) and len(secret) == size:
                continue
            name = label if label == "key" else f"{label}[{i}]"
            if not isinstance(secret, bytes):
                raise TypeError(
                    f"{name}: expected bytes; given {type(secret).__name__}; convert it: bytes(...)"
                )
            # the message omits the value: a key must not reach a log
            raise ValueError(
                f"{name}: expected {size} bytes; given {len(secret)}; draw it: os.urandom({size})"
            )
    if len({*nonces, *rounding_nonces}) != len(nonces) + len(rounding_nonces):
        raise ValueError(
            "nonces: expected distinct nonces, rounding_nonces included; given one twice, so two tensors would "
            "share their noise; draw one a tensor"
        )
    if not (math.isfinite(noise_scale) and noise_scale >= 0):
        raise ValueError(f"noise_scale: expected a finite number ≥ 0; given {noise_scale}; pass σ·S")
    if grid != 0 and not (math.isfinite(grid) and math.frexp(grid)[0] == 0.5):
        raise ValueError(f"grid: expected a power of two, or 0; given {grid}; round it down: 2.0**k")
    _check.positive("divisor", divisor)
    if grid != 0 and not (
        math.isfinite(1.0 / grid) and math.isfinite(noise_scale / grid) and grid / divisor > 0
    ):
        raise ValueError(
            f"grid: expected a grid near the noise's scale; given {grid} with noise_scale {noise_scale}; 1/grid, "
            "noise_scale/grid or grid/divisor is out of range; pass 2⁻¹² of the noise, or 0"
        )
    most = max((param.numel() for param in params), default=0)
    if most > COUNTER_END * NORMALS_PER_BLOCK:
        raise ValueError(
            f"params: expected at most 2³⁵ entries, one ChaCha20 stream; given a tensor of {most}; split it"
        )
    return (
        _bytes([key]),
        _bytes(nonces or [bytes(12)] * len(params)),
        _bytes(rounding_nonces),
        float(noise_scale),
        float(grid),
        float(divisor),
    )


def _bytes(rows: Sequence[bytes]) -> Tensor:
    """Return the rows, concatenated, as uint8."""
    return (
        torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
        if rows
        else torch.empty(0, dtype=torch.uint8)
    )
