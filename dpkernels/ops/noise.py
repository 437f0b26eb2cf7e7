"""Noise, grid and division of finished sums; and the composition of weighted sums with it."""

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
    """Noise finished sums and divide them, in place, once a logical batch.

    For every sum, with z the normals `chacha20_normal(n, key=key, nonce=nonces[i])` makes for sum i,

        sum = round((sum + noise_scale·z)/grid)·grid/divisor          in float64; without a grid, nothing is rounded

    which is the gradient of `noise_adamw` and `noise_sgd` before it is rounded to float32.

    Args:
        sums: float64, contiguous, any shapes, all on one device; none overlaps another.
        key: 32 bytes, secret.
        nonces: 12 bytes each; a (key, nonce) is never to be used twice. May be empty where noise_scale is 0.
        noise_scale: standard deviation of the noise on the sum, in its units; 0: none, and nothing is drawn.
        divisor: the expected batch size, > 0.
        grid: a power of two: the noised sum is rounded to a multiple of it, ties to even; 0: it is not.

    Raises:
        TypeError: another dtype; key or nonces that are not bytes.
        ValueError: sums on several devices, that overlap or are not contiguous; nonces of another number, or one given
            twice; a number out of range.

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
    """`weighted_sums`, and, where a key is given, `noise_sums` of the same sums, in place.

    For each layer l of kind k, out_l += Σ_i c_i g_iᵀx_i and its like; then, once a logical batch,

        out = round((out + noise_scale·z)/grid)·grid/divisor          in float64; without a grid, nothing is rounded

    with z the normals that `chacha20_normal` makes of key and that out's nonce. All arguments are checked before
    anything is added.

    Args:
        xs: one a layer, all with the same B: layer inputs; ids for an embedding, x̂ for a layer_norm; a bias's is not
            read (give its g).
        gs: one a layer: gradients of the layers' outputs.
        kinds: one a layer, of `dpkernels.ops.layers.KINDS`.
        factors: [B] float32, c_i from `clip_factors`; a sample with factor 0 is not read.
        outs: one a layer, in its parameter's shape; for a LoRA layer two, A's and B's. All contiguous, of one dtype:
            float64, or float32 where no noise is asked for. None may overlap another.
        key: 32 bytes, secret; None: no noise, no division.
        nonces: 12 bytes for each out; a (key, nonce) is never to be used twice.
        noise_scale: standard deviation of the noise, ≥ 0.
        grid: a power of two, or 0.
        divisor: the expected batch size, > 0.
        **columns: lists of what only some kinds take, one entry for each layer of the kind: hs, dhs, scalings for LoRA
            layers, as `lora_weighted_sum` takes them; padding_idxs for embeddings, -1 for none; strides, paddings,
            dilations for depthwise_conv1d.

    Raises:
        TypeError: dtypes that do not fit; a key or nonce that is not bytes; a list that no kind has.
        ValueError: lists of lengths that do not fit, an unknown kind, an out given twice; and what the layers' own
            weighted sums raise.

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
