"""Definition of the noise: ChaCha20 (RFC 8439) and Box-Muller normals from its keystream, in plain torch."""

import math

import torch
from torch import Tensor

from dpkernels.reference._definitions import definition

_CONSTANT = b"expand 32-byte k"
_MASK = 0xFFFFFFFF
_PIECE = 1 << 15  # blocks computed at a time, so that memory stays small


def _words(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def _rotate(v: Tensor, n: int) -> Tensor:
    return ((v << n) | (v >> (32 - n))) & _MASK


def _quarter_round(x: list[Tensor], a: int, b: int, c: int, d: int) -> None:
    x[a] = (x[a] + x[b]) & _MASK
    x[d] = _rotate(x[d] ^ x[a], 16)
    x[c] = (x[c] + x[d]) & _MASK
    x[b] = _rotate(x[b] ^ x[c], 12)
    x[a] = (x[a] + x[b]) & _MASK
    x[d] = _rotate(x[d] ^ x[a], 8)
    x[c] = (x[c] + x[d]) & _MASK
    x[b] = _rotate(x[b] ^ x[c], 7)


def _blocks(key: bytes, counters: Tensor, nonce: bytes) -> Tensor:
    """Return the 16 words of the block of each counter, as int64: [blocks, 16]."""
    fixed = _words(_CONSTANT + key)
    start = [torch.full_like(counters, word) for word in fixed]
    start += [counters, *(torch.full_like(counters, word) for word in _words(nonce))]
    x = list(start)
    for _ in range(10):
        for column in range(4):
            _quarter_round(x, column, column + 4, column + 8, column + 12)
        for i in range(4):
            _quarter_round(x, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return torch.stack([(a + b) & _MASK for a, b in zip(x, start, strict=True)], dim=1)


def _pieces(key: bytes, counter: int, nonce: bytes, blocks: int, device: torch.device | str) -> list[Tensor]:
    if counter < 0 or blocks < 0 or counter + blocks > 1 << 32:
        raise ValueError(
            f"blocks: given {blocks} from counter {counter} on; RFC 8439's 32-bit counter is not wrapped"
        )
    starts = range(counter, counter + blocks, _PIECE)
    ends = [min(start + _PIECE, counter + blocks) for start in starts]
    return [_blocks(key, torch.arange(a, b, device=device), nonce) for a, b in zip(starts, ends, strict=True)]


@definition
def chacha20_keystream(
    key: bytes, counter: int, nonce: bytes, blocks: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """The blocks counter, counter + 1, ..., concatenated: [64·blocks] uint8."""
    pieces = [
        # The four low bytes of each int64 word.
        words.contiguous().view(torch.uint8).reshape(-1, 8)[:, :4].reshape(-1)
        for words in _pieces(key, counter, nonce, blocks, device)
    ]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=device)


def box_muller(words: Tensor) -> Tensor:
    """Two independent standard normals from two uniform 64-bit words.

    z_0 = √(-2 ln u)·cos 2πv and z_1 = √(-2 ln u)·sin 2πv with u = (w_0 + 1)·2⁻⁶⁴ in (0, 1] and v = w_1·2⁻⁶⁴.
    Up to ½, u is rounded to float64; above, 1 - u is rounded, so that both ends keep full relative precision:
    the radii range from 2⁻³¹·⁵ (and 0) to √(128 ln 2) = 9.42. v is reduced to the nearest quarter turn in
    integers.

    Args:
        words: [n, 2] int64, the bits of the unsigned words.

    Returns:
        [n, 2] float64.
    """
    w0, w1 = words.unbind(dim=1)
    unit = 2.0**-64
    lower = torch.log((w0.clamp(min=0).double() + 1.0) * unit)
    upper = torch.log1p((~w0).clamp(min=0).double() * -unit)
    radius = torch.sqrt(-2.0 * torch.where(w0 < 0, upper, lower))
    # Eighths of a turn: an odd eighth is reduced towards the next quarter turn, an even one towards the last.
    eighth = w1 >> 61
    odd = eighth & 1
    rest = (w1 & ((1 << 61) - 1)) - (odd << 61)
    quarter = ((eighth + odd) >> 1) & 3
    angle = rest.double() * (2.0 * math.pi * unit)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    turned = quarter % 2 == 1
    x, y = torch.where(turned, sine, cosine), torch.where(turned, cosine, sine)
    x = torch.where((quarter == 1) | (quarter == 2), -x, x)
    y = torch.where(quarter >= 2, -y, y)
    return torch.stack([radius * x, radius * y], dim=1)


@definition
def chacha20_normal(
    n: int,
    *,
    key: bytes,
    nonce: bytes,
    counter: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`box_muller` of the keystream, 16 bytes (two little-endian words) a pair, rounded to dtype: [n]."""
    pieces = [
        box_muller((words[:, 0::2] | (words[:, 1::2] << 32)).reshape(-1, 2)).reshape(-1)
        for words in _pieces(key, counter, nonce, -(-n // 8), device)
    ]
    normals = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.float64, device=device)
    return normals[:n].to(dtype)
