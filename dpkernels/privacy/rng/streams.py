"""Secret randomness: ChaCha20 streams under a key of this process, for Gaussian noise and for sampling.

A key is 256 bits from the operating system, drawn afresh in every process (after a fork too) and never written
anywhere: these objects refuse to be pickled or copied, and their repr does not show it. The 12-byte nonce holds the
purpose, a rank, the parameter's index and a draw counter that only ever grows inside the process, so no two draws
share a stream, also when a checkpoint sets the number of steps back.
"""

import math
import os
import struct
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from dpkernels.ops.chacha20 import chacha20_keystream, chacha20_normal

KEY_BYTES = 32
# Values of the nonce's first byte: one stream is never used for two things.
PURPOSE_NOISE = 1
PURPOSE_INCLUSION = 2
PURPOSE_SUBSET = 3
PURPOSE_ROUNDING = 4
_BLOCK_BYTES = 64
_MAX_BLOCKS = 2**32  # ChaCha20's block counter (RFC 8439)


# The noised sum is rounded to multiples of a power of two: this many binary places below the noise's deviation.
GRID_BITS = 12


def grid_of(noise_scale: float) -> float:
    """The public grid of a release: 2^(⌊log₂ noise_scale⌋ - 12), and 0 (no grid) without noise.

    A double's own spacing depends on its size, so that the last bits of sum + noise tell of the sum (Mironov 2012).
    Rounded to one grid for all sizes, what remains of the noise under each released value is some 2⁴⁰ of its doubles,
    whichever sum it was added to. It costs 2⁻²⁴/12 of the noise's variance.
    """
    return 0.0 if noise_scale == 0 else 2.0 ** (math.frexp(noise_scale)[1] - 1 - GRID_BITS)


def nonce(purpose: int, index: int, draw: int, rank: int = 0) -> bytes:
    """12 bytes: purpose (1), rank (1), index (4), draw (6), little-endian. Raises ValueError where one does
    not fit."""
    if not (0 <= purpose < 2**8 and 0 <= rank < 2**8 and 0 <= index < 2**32 and 0 <= draw < 2**48):
        limits = {"purpose": (purpose, 8), "rank": (rank, 8), "index": (index, 32), "draw": (draw, 48)}
        for name, (value, bits) in limits.items():
            if not 0 <= value < 2**bits:
                raise ValueError(f"nonce: {name}={value} does not fit {bits} bits")
    return struct.pack("<BBI", purpose, rank, index) + draw.to_bytes(6, "little")


class SecretStream:
    """ChaCha20 under a key that stays in this process.

    Args:
        key: 32 bytes, for tests only (warns); by default the operating system's.

    Raises:
        ValueError: a key that is not 32 bytes.
        TypeError: when pickled or copied.
    """

    __slots__ = ("_draw", "_fixed", "_key", "_pid")

    def __init__(self, key: bytes | None = None) -> None:
        if key is not None:
            if not isinstance(key, bytes) or len(key) != KEY_BYTES:
                raise ValueError(
                    f"noise_key must be {KEY_BYTES} bytes, got {type(key).__name__} of length {len(key)}"
                )
            warnings.warn(
                "noise_key fixes the noise and the sampling: whoever knows the key can remove the noise. It "
                "is for tests; leave it out to protect anything.",
                stacklevel=3,
            )
        self._fixed = key is not None
        self._key = os.urandom(KEY_BYTES) if key is None else key
        self._draw = 0
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(key=<hidden>)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} holds a secret key and is never pickled, copied or saved: a second use "
            "of the key would repeat the noise. Save state_dict() of the model, the optimizer and the "
            "engine instead."
        )

    @property
    def fixed(self) -> bool:
        """Whether the key was given, for a test."""
        return self._fixed

    def next_draw(self) -> int:
        """A number that this stream has not handed out before; it goes into the nonce."""
        if self._pid != os.getpid():
            if self._fixed:
                raise RuntimeError(
                    "this process was forked and would repeat its parent's noise (noise_key is fixed)"
                )
            self._key, self._draw, self._pid = os.urandom(KEY_BYTES), 0, os.getpid()
        self._draw += 1
        return self._draw

    def normal(self, shape: torch.Size, *, draw: int, index: int, device: torch.device) -> Tensor:
        """Independent standard normals in float64 on `device` for parameter `index` in draw `draw`.

        Box-Muller on 64-bit uniforms (`dpkernels.ops.chacha20_normal`); the tail reaches 9.4 σ.
        """
        count = shape.numel()
        if count * 8 > _MAX_BLOCKS * _BLOCK_BYTES:
            raise ValueError(f"a parameter of {count} entries outgrows one ChaCha20 stream (2^35 normals)")
        stream = nonce(PURPOSE_NOISE, index, draw)
        return chacha20_normal(count, key=self._key, nonce=stream, device=device, dtype=torch.float64).view(
            shape
        )

    def sweep_secrets(self, indices: Sequence[int], *, draw: int, rounding: bool) -> dict[str, Any]:
        """`key`, `nonces` and `rounding_nonces` of `dpkernels.ops.noise_adamw` for the parameters of these indices.

        The nonces are those of `normal`, so that the noise is the same; rounding has streams of its own purpose.
        """
        return {
            "key": self._key,
            "nonces": [nonce(PURPOSE_NOISE, index, draw) for index in indices],
            "rounding_nonces": [nonce(PURPOSE_ROUNDING, index, draw) for index in indices]
            if rounding
            else [],
        }

    def words(self, count: int, *, draw: int, purpose: int, index: int = 0) -> np.ndarray:
        """`count` independent uniform 64-bit words (numpy uint64)."""
        blocks = -(-count * 8 // _BLOCK_BYTES)
        if blocks > _MAX_BLOCKS:
            raise ValueError(f"{count} words outgrow one ChaCha20 stream (2^35 words)")
        stream = chacha20_keystream(self._key, 0, nonce(purpose, index, draw), blocks)
        return stream.numpy().view("<u8")[:count].astype(np.uint64, copy=False)
