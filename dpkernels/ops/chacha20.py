"""The noise: a cryptographic keystream, and standard normals computed from it.

These are plain functions, not `torch.library` ops: traced graphs and the compile cache would store a key that is an
op's argument.
"""

import torch
from torch import Tensor

from dpkernels.backends import registry

COUNTER_END = 1 << 32
"""Blocks of one (key, nonce); RFC 8439's counter has 32 bits."""

NORMALS_PER_BLOCK = 8


def _check(key: bytes, counter: int, nonce: bytes, blocks: int, request: str) -> None:
    for name, value, size in (("key", key, 32), ("nonce", nonce, 12)):
        if not isinstance(value, bytes):
            raise TypeError(
                f"{name}: expected bytes; given {type(value).__name__}; convert it: bytes({name})"
            )
        if len(value) != size:  # the message omits the value: a key must not reach a log
            raise ValueError(
                f"{name}: expected {size} bytes; given {len(value)}; draw it: os.urandom({size})"
            )
    if not 0 <= counter < COUNTER_END:
        raise ValueError(f"counter: expected 0 ≤ counter < 2³²; given {counter}; use another nonce")
    if blocks > COUNTER_END - counter:
        raise ValueError(
            f"{request}: needs {blocks} blocks of 64 bytes from counter {counter} on; {COUNTER_END - counter} "
            "remain before the 32-bit counter repeats; draw the rest with a new nonce"
        )


def chacha20_keystream(
    key: bytes, counter: int, nonce: bytes, blocks: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """The ChaCha20 keystream: blocks counter, counter + 1, ..., each of 64 bytes.

    Args:
        key: 32 bytes, secret.
        counter: the first block, 0 ≤ counter < 2³².
        nonce: 12 bytes; never use a (key, nonce, counter) twice.
        blocks: the number of blocks; counter + blocks ≤ 2³².
        device: the result's device; the bits are the same on all devices.

    Returns:
        [64·blocks] uint8.

    Raises:
        TypeError: key or nonce is not bytes.
        ValueError: key, nonce or counter has another size, blocks is negative, or fewer blocks remain.

    Source: RFC 8439, sections 2.3 and 2.4.
    """
    if blocks < 0:
        raise ValueError(f"blocks: expected 0 or more; given {blocks}; pass the number of 64-byte blocks")
    _check(key, counter, nonce, blocks, f"blocks={blocks}")
    function = registry.implementation("chacha20_keystream", torch.device(device).type)
    result: Tensor = function(key, counter, nonce, blocks, device=device)
    return result


def chacha20_normal(
    n: int,
    *,
    key: bytes,
    nonce: bytes,
    counter: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Independent standard normals from the ChaCha20 keystream, by Box-Muller on 64-bit uniforms.

    Each 16 bytes, two little-endian words w_0 and w_1, give √(-2 ln u)·cos 2πv and √(-2 ln u)·sin 2πv, where
    u = (w_0 + 1)·2⁻⁶⁴ in (0, 1] and v = w_1·2⁻⁶⁴. The op computes in float64 for either dtype; no normal exceeds 9.42;
    `dpkernels.reference.chacha20.box_muller` defines the rounding at both ends. Native code returns the same bits on
    every CPU and GPU and for every number of threads; the reference differs by a few units in the last place.

    Args:
        n: the number of normals, 8 a block.
        key: 32 bytes, secret.
        nonce: 12 bytes; never use a (key, nonce, counter) twice.
        counter: the first block, 0 ≤ counter < 2³².
        device: the result's device.
        dtype: torch.float64, or torch.float32 (the same values, rounded).

    Returns:
        [n] of that dtype.

    Raises:
        TypeError: key or nonce is not bytes, or dtype is neither float32 nor float64.
        ValueError: key, nonce or counter has another size, n is negative, or fewer blocks remain.

    Source: Box and Muller 1958, Ann. Math. Statist. 29(2); RFC 8439.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected float64 or float32; given {dtype}; add noise in float32 or wider")
    if n < 0:
        raise ValueError(f"n: expected 0 or more; given {n}; pass the number of normals")
    _check(key, counter, nonce, -(-n // NORMALS_PER_BLOCK), f"n={n}")
    function = registry.implementation("chacha20_normal", torch.device(device).type)
    result: Tensor = function(n, key=key, nonce=nonce, counter=counter, device=device, dtype=dtype)
    return result
