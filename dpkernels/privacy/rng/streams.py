"""Secret randomness: ChaCha20 streams under a key of this process, for Gaussian noise and for sampling.

A key is 256 bits from the operating system, drawn in every process (also after a fork) and never written anywhere:
these objects cannot be pickled or copied, and their repr does not show the key. The 12-byte nonce holds the purpose, a
rank, the parameter's index and a draw counter that only grows within the process, so no two draws share a stream, also
after a checkpoint has reset the number of steps.
"""

import math
import os
import struct
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from dpkernels.ops.chacha20 import chacha20_keystream

KEY_BYTES = 32
# Values of the nonce's first byte: no stream is used for two purposes.
PURPOSE_NOISE = 1
PURPOSE_INCLUSION = 2
PURPOSE_SUBSET = 3
PURPOSE_ROUNDING = 4
PURPOSE_CANARIES = 5
PURPOSE_COUNT = 6
_BLOCK_BYTES = 64
_MAX_BLOCKS = 2**32  # ChaCha20's block counter (RFC 8439)


# The noised sum is rounded to multiples of a power of two, this many binary places below the noise's deviation.
GRID_BITS = 12


def grid_of(noise_scale: float) -> float:
    """The public grid of a release: 2^(⌊log₂ noise_scale⌋ - 12), and 0 (no grid) without noise.

    The spacing of doubles depends on their size, so the last bits of sum + noise reveal information about the sum
    (Mironov 2012). After rounding to one grid for all sizes, each released value covers some 2⁴⁰ doubles of the noise,
    for every sum. The rounding adds 2⁻²⁴/12 of the noise's variance.
    """
    return 0.0 if noise_scale == 0 else 2.0 ** (math.frexp(noise_scale)[1] - 1 - GRID_BITS)


def nonce(purpose: int, index: int, draw: int, rank: int = 0) -> bytes:
    """12 bytes: purpose (1), rank (1), index (4), draw (6), little-endian. Raises ValueError if one does not fit."""
    if not (0 <= purpose < 2**8 and 0 <= rank < 2**8 and 0 <= index < 2**32 and 0 <= draw < 2**48):
        limits = {"purpose": (purpose, 8), "rank": (rank, 8), "index": (index, 32), "draw": (draw, 48)}
        for name, (value, bits) in limits.items():
            if not 0 <= value < 2**bits:
                raise ValueError(f"nonce: {name}={value} does not fit {bits} bits")
    return struct.pack("<BBI", purpose, rank, index) + draw.to_bytes(6, "little")


def secret_key() -> bytes:
    """A key from the operating system."""
    return os.urandom(KEY_BYTES)


class SecretStream:
    """ChaCha20 under a key that stays in this process.

    Args:
        key: 32 bytes, for tests only (warns); by default the operating system's.

    Raises:
        ValueError: a key that is not 32 bytes.
        TypeError: when pickled or copied.
    """

    __slots__ = ("_draw", "_fixed", "_key", "_pid", "_shared")

    def __init__(self, key: bytes | None = None) -> None:
        if key is not None:
            if not isinstance(key, bytes) or len(key) != KEY_BYTES:
                raise ValueError(
                    f"noise_key must be {KEY_BYTES} bytes, got {type(key).__name__} of length {len(key)}"
                )
            warnings.warn(
                "noise_key fixes the noise and the sampling: whoever knows the key can remove the noise. It "
                "is for tests only; leave it out to protect data.",
                stacklevel=3,
            )
        self._fixed = key is not None
        self._shared = False
        self._key = secret_key() if key is None else key
        self._draw = 0
        self._pid = os.getpid()

    @classmethod
    def with_secret(cls, key: bytes, *, fixed: bool = False) -> "SecretStream":
        """A stream under a key of this run that other processes, or another stream of this process, have, too.

        fixed: whether the key was given for a test (a warning was given then).
        """
        stream = cls()
        stream._key, stream._fixed, stream._shared = key, fixed, True
        return stream

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
        """Whether the key was given (for a test)."""
        return self._fixed

    def next_draw(self) -> int:
        """A number that this stream has not handed out before; it goes into the nonce."""
        if self._pid != os.getpid():
            if self._fixed or self._shared:
                reason = "noise_key is fixed" if self._fixed else "several processes share its key"
                raise RuntimeError(
                    f"this process was forked and would repeat its parent's draws, since {reason}; leave noise_key "
                    "out, and train in the processes that called make_private"
                )
            self._key, self._draw, self._pid = secret_key(), 0, os.getpid()
        self._draw += 1
        return self._draw

    def noise_secrets(self, indices: Sequence[int], *, draw: int) -> dict[str, Any]:
        """`key` and `nonces` of `dpkernels.ops.noise_sums` for the parameters of these indices in draw `draw`."""
        return {"key": self._key, "nonces": [nonce(PURPOSE_NOISE, index, draw) for index in indices]}

    def step_secrets(self, indices: Sequence[int], *, draw: int, rounding: bool) -> dict[str, Any]:
        """`key`, `nonces` and `rounding_nonces` of `dpkernels.ops.noise_adamw` for the parameters of these indices.

        The nonces are those of `noise_secrets`, so that the noise is the same. Rounding has streams of another purpose.
        """
        rounded = indices if rounding else ()
        return {
            **self.noise_secrets(indices, draw=draw),
            "rounding_nonces": [nonce(PURPOSE_ROUNDING, index, draw) for index in rounded],
        }

    def count_secrets(self, *, draw: int) -> dict[str, Any]:
        """`key` and `nonces` of `dpkernels.ops.noise_sums` for the counts of adaptive clipping in draw `draw`."""
        return {**self.noise_secrets((), draw=draw), "nonces": [nonce(PURPOSE_COUNT, 0, draw)]}

    def words(self, count: int, *, draw: int, purpose: int, index: int = 0) -> np.ndarray:
        """`count` independent uniform 64-bit words (numpy uint64)."""
        blocks = -(-count * 8 // _BLOCK_BYTES)
        if blocks > _MAX_BLOCKS:
            raise ValueError(f"{count} words exceed one ChaCha20 stream (2^35 words)")
        stream = chacha20_keystream(self._key, 0, nonce(purpose, index, draw), blocks)
        return stream.numpy().view("<u8")[:count].astype(np.uint64, copy=False)
