"""Noise, grid and division of finished sums, and their composition with the weighted sums."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpkernels.ops import _check, _library
from dpkernels.ops._secrets import check_secrets
from dpkernels.ops.grouped import add
from dpkernels.ops.layers import check_sums, from_columns

_noise_sums = _library.define(
    "noise_sums",
    "(Tensor(a!)[] sums, Tensor key, Tensor nonces, float noise_scale, float grid, float divisor) -> ()",
    fake=lambda *args: None,
)


def noise_sums(
    sums: Sequence[Tensor],
    *,
    key: bytes,
    nonces: Sequence[bytes],
    noise_scale: float,
    divisor: float,
    grid: float = 0.0,
) -> None:
    """Add noise to finished sums and divide them, in place, once a logical batch.

    For every sum, with z = `chacha20_normal(n, key=key, nonce=nonces[i])` for sum i,

        sum = round((sum + noise_scale·z)/grid)·grid/divisor          in float64; without a grid, nothing is rounded

    The result is the gradient of `noise_adamw` and `noise_sgd` before it is rounded to float32.

    Args:
        sums: float64, contiguous, disjoint, of any shapes, all on one device.
        key: 32 bytes, secret.
        nonces: 12 bytes each; never use a (key, nonce) twice. May be empty if noise_scale is 0.
        noise_scale: standard deviation of the noise on the sum, in the sum's units; 0: no noise is drawn.
        divisor: the expected batch size, > 0.
        grid: a power of two: the noised sum is rounded to a multiple of it, ties to even; 0: no rounding.

    Raises:
        TypeError: a sum's dtype is not float64, or key or nonces are not bytes.
        ValueError: sums are on several devices, overlap or are not contiguous; the number of nonces differs, or one is
            given twice; a number is out of range.

    Source: Abadi et al. 2016, arXiv:1607.00133, algorithm 1; Mironov 2012, doi:10.1145/2382196.2382264 (the grid).
    """
    _check.sums("sums", sums, noised=True)
    if not sums:
        return
    key_bytes, nonce_bytes, _, *numbers = check_secrets(sums, key, nonces, (), noise_scale, grid, divisor)
    _noise(sums, key_bytes, nonce_bytes, *numbers)


def _noise(sums: Sequence[Tensor], *noise: Any) -> None:
    _noise_sums(list(sums), *noise)
    torch.autograd.graph.increment_version(list(sums))


def clip_and_noise(
    xs: Sequence[Tensor],
    gs: Sequence[Tensor],
    kinds: Sequence[str],
    factors: Tensor,
    outs: Sequence[Tensor],
    *,
    key: bytes | None = None,
    nonces: Sequence[bytes] = (),
    noise_scale: float = 0.0,
    grid: float = 0.0,
    divisor: float = 1.0,
    **columns: Sequence[Any],
) -> None:
    """`weighted_sums`, followed by `noise_sums` of the same sums if a key is given, in place.

    For each layer l, out_l += Σ_i c_i G_li, as in `weighted_sums`; then, once a logical batch,

        out = round((out + noise_scale·z)/grid)·grid/divisor          in float64; without a grid, nothing is rounded

    with z = `chacha20_normal` of key and that out's nonce. All arguments are checked before anything is added.

    Args:
        xs: one a layer, all with the same B: the layer's input, ids for an embedding, x̂ for a layer_norm; a bias's
            entry is not read (pass its g).
        gs: the gradients of the layers' outputs, one a layer.
        kinds: keys of `dpkernels.ops.layers.KINDS`, one a layer.
        factors: [B] float32, c_i from `clip_factors`; a sample with factor 0 is not read.
        outs: one a layer, in its parameter's shape; for a LoRA layer two, A's and B's. All are contiguous, disjoint and
            of one dtype: float64, or float32 if no noise is added.
        key: 32 bytes, secret; None: no noise and no division.
        nonces: 12 bytes for each out; never use a (key, nonce) twice.
        noise_scale: standard deviation of the noise, ≥ 0.
        grid: a power of two, or 0.
        divisor: the expected batch size, > 0.
        **columns: lists of the arguments of some kinds only, with one entry for each layer of the kind: hs, dhs,
            scalings for LoRA layers, as in `lora_weighted_sum`; padding_idxs for embeddings, -1 for none; strides,
            paddings, dilations for depthwise_conv1d.

    Raises:
        TypeError: dtypes do not fit, a key or nonce is not bytes, or no kind takes a list of that name.
        ValueError: a list's length does not fit, a kind is unknown, or an out is given twice; also the errors of the
            layers' weighted sums.

    Source: Bu et al. 2022, arXiv:2210.00038 (book-keeping); Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    layers = from_columns(xs, gs, kinds, columns, outs)
    check_sums(layers, factors, "xs")
    _check.sums("outs", outs, noised=key is not None)
    noise: tuple[Any, ...] = ()
    if key is not None:
        key_bytes, nonce_bytes, _, *numbers = check_secrets(outs, key, nonces, (), noise_scale, grid, divisor)
        noise = (key_bytes, nonce_bytes, *numbers)
    if not layers:
        return
    add(layers, factors, list(outs))
    if noise:
        _noise(outs, *noise)
