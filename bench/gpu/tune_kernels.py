"""What `bench.gpu.tune` chooses between, and what it calls: by kernel, its shapes and configurations, and a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import dpkernels.ops  # noqa: F401 - hands the ops' definitions to the registry
from dpkernels.backends import triton_ops
from dpkernels.backends.layer import GroupedLayer
from dpkernels.backends.triton_ops import configs

RANK = 16
Shape = tuple[int, int, int, int]  # B, T, d, p
LINEAR: tuple[Shape, ...] = ((32, 188, 1024, 1024), (16, 750, 1024, 1024), (16, 750, 1024, 4096))
LORA: tuple[Shape, ...] = ((64, 188, 1024, 1024), (64, 188, 1024, 4096), (16, 750, 1024, 1024))
NARROW: tuple[Shape, ...] = ((32, 750, 1024, 1024),)


def _config(warps: int, stages: int, **tiles: int) -> configs.Config:
    return configs.Config(tiles, warps, stages)


TAPS = 9
GROUPED_LAYERS = 24


@dataclass(frozen=True)
class Job:
    """What is called to run a kernel, by the number of the call, and the same in plain PyTorch."""

    call: Callable[[int], object]
    plain: Callable[[int], object] | None


@dataclass(frozen=True)
class Batch:
    """What one call reads: x [B,T,d], g [B,T,p], h and dh [B,T,RANK] in bfloat16, factors [B] in float32."""

    x: Tensor
    g: Tensor
    h: Tensor
    dh: Tensor
    factors: Tensor


def _each(batches: Sequence[Batch], call: Callable[[Batch], object], plain: Callable[[Batch], object]) -> Job:
    """A job that takes one batch a call, in turn."""
    n = len(batches)
    return Job(lambda i: call(batches[i % n]), lambda i: plain(batches[i % n]))


def _zeros(like: Tensor, *sizes: int) -> Tensor:
    return torch.zeros(*sizes, device=like.device, dtype=torch.float64)


def _gram(batches: Sequence[Batch]) -> Job:
    return _each(
        batches,
        lambda b: triton_ops.linear_norm_sq(b.x, b.g, method="gram"),
        lambda b: (torch.bmm(b.x, b.x.mT) * torch.bmm(b.g, b.g.mT)).sum((1, 2)),
    )


def _direct(batches: Sequence[Batch]) -> Job:
    return _each(
        batches,
        lambda b: triton_ops.linear_norm_sq(b.x, b.g, method="direct"),
        lambda b: torch.bmm(b.g.mT, b.x).square().sum((1, 2)),
    )


def _linear_sum(batches: Sequence[Batch]) -> Job:
    out = _zeros(batches[0].x, batches[0].g.shape[2], batches[0].x.shape[2])
    return _each(
        batches,
        lambda b: triton_ops.linear_weighted_sum(b.x, b.g, b.factors, out),
        lambda b: (b.g * b.factors[:, None, None].bfloat16()).flatten(0, 1).T @ b.x.flatten(0, 1),
    )


def _bias(batches: Sequence[Batch]) -> Job:
    return _each(batches, lambda b: triton_ops.bias_norm_sq(b.g), lambda b: b.g.sum(1).square().sum(1))


def _layer_norm(batches: Sequence[Batch]) -> Job:
    return _each(
        batches,
        lambda b: triton_ops.layer_norm_norm_sq(b.x, b.g),
        lambda b: (b.x * b.g).sum(1).square().sum(1),
    )


def _depthwise(batches: Sequence[Batch]) -> Job:
    # frames adjacent, as convolutions have them
    batches = [replace(b, x=b.x.mT.contiguous(), g=b.g.mT.contiguous()) for b in batches]
    pad = TAPS // 2

    def plain(b: Batch) -> Tensor:
        windows = F.pad(b.x, (pad, pad)).unfold(2, TAPS, 1)
        return torch.einsum("bctk,bct->bck", windows, b.g).square().sum((1, 2))

    return _each(
        batches,
        lambda b: triton_ops.depthwise_conv1d_norm_sq(b.x, b.g, kernel_size=TAPS, padding=pad),
        plain,
    )


def _both(b: Batch) -> tuple[Tensor, Tensor]:
    return torch.bmm(b.dh.mT, b.x), torch.bmm(b.g.mT, b.h)


def _lora_forms(batches: Sequence[Batch]) -> Job:
    return _each(batches, lambda b: triton_ops.lora_gradients(b.x, b.h, b.g, b.dh), _both)


def _lora_pieces(batches: Sequence[Batch]) -> Job:
    return _each(
        batches,
        lambda b: triton_ops.lora_norm_sq(b.x, b.h, b.g, b.dh),
        lambda b: [part.square().sum((1, 2)) for part in _both(b)],
    )


def _layers(batches: Sequence[Batch], *, sums: bool) -> list[GroupedLayer]:
    """LoRA layers of a grouped op: a batch is a layer."""
    layers = []
    for b in batches:
        shapes = [(RANK, b.x.shape[2]), (b.g.shape[2], RANK)] if sums else []
        outs = tuple(_zeros(b.x, *shape) for shape in shapes)
        layers.append(GroupedLayer("lora", (b.x, b.h, b.g, b.dh), {"scaling": 1.0}, outs))
    return layers


def _grouped_norms(batches: Sequence[Batch]) -> Job:
    layers = _layers(batches, sums=False)
    return Job(lambda i: triton_ops.total_norm_sq(layers), None)


def _grouped_sums(batches: Sequence[Batch]) -> Job:
    layers, factors = _layers(batches, sums=True), batches[0].factors
    return Job(lambda i: triton_ops.weighted_sums(layers, factors), None)


@dataclass(frozen=True)
class Kernel:
    """What is tuned of one kernel.

    Attributes:
        job: what runs it, from the batches that its calls take in turn.
        shapes: the sizes that it is timed at; configurations are compared at the first.
        candidates: the configurations.
    """

    job: Callable[[Sequence[Batch]], Job]
    shapes: tuple[Shape, ...]
    candidates: tuple[configs.Config, ...]


KERNELS: dict[str, Kernel] = {
    "linear_gram": Kernel(
        _gram,
        LINEAR,
        (
            _config(8, 4, BS=128, BT=128, BK=64),
            _config(8, 3, BS=128, BT=128, BK=64),
            _config(4, 4, BS=64, BT=128, BK=64),
            _config(4, 4, BS=64, BT=64, BK=64),
        ),
    ),
    "linear_direct": Kernel(
        _direct,
        LINEAR,
        (
            _config(4, 3, BT=64, BP=128, BD=64),
            _config(8, 4, BT=64, BP=128, BD=128),
            _config(8, 3, BT=128, BP=128, BD=128),
        ),
    ),
    "linear_sum": Kernel(
        _linear_sum,
        LINEAR,
        (
            _config(4, 4, BT=64, BP=64, BD=64),
            _config(8, 3, BT=64, BP=128, BD=64),
            _config(16, 4, BT=64, BP=128, BD=128),
        ),
    ),
    "lora_pieces": Kernel(
        _lora_pieces,
        LORA,
        (_config(4, 4, BT=64, BN=64, SAMPLES=4), _config(4, 3, BT=64, BN=128, SAMPLES=4)),
    ),
    "lora_forms": Kernel(_lora_forms, LORA, (_config(4, 4, BT=64, BN=64), _config(4, 3, BT=64, BN=128))),
    "grouped_norms": Kernel(
        _grouped_norms, LORA, (_config(4, 2, BT=64, BN=128), _config(4, 3, BT=64, BN=128))
    ),
    "grouped_sums": Kernel(_grouped_sums, LORA, (_config(4, 3, BT=64, BN=64), _config(4, 3, BT=64, BN=128))),
    "bias_sums": Kernel(
        _bias,
        NARROW,
        (_config(4, 1, BT=128, BN=64), _config(4, 1, BT=64, BN=64), _config(4, 1, BT=256, BN=32)),
    ),
    "layer_norm_sums": Kernel(
        _layer_norm,
        NARROW,
        (_config(4, 1, BT=64, BN=32), _config(4, 1, BT=128, BN=32), _config(4, 1, BT=64, BN=64)),
    ),
    "depthwise_conv1d_sums": Kernel(
        _depthwise,
        NARROW,
        (
            _config(4, 1, BC=8, BT=16, EACH=2, SPAN=1024),
            _config(4, 1, BC=4, BT=32, EACH=2, SPAN=1024),
            _config(4, 1, BC=16, BT=8, EACH=4, SPAN=512),
            _config(2, 1, BC=4, BT=16, EACH=2, SPAN=1024),
        ),
    ),
}
"""The kernels whose tiles are tuned, by the names of `configs.CONFIGS`."""


def job(kernel: str, shape: Shape, device: str = "cuda") -> Job:
    """The two calls, on fresh inputs: more than the cache holds, or of a grouped kernel one for each layer."""
    batch, frames, d, p = shape
    sets = 2 if device == "meta" else max(2, int(120e6 / (batch * frames * (d + p) * 2)) + 1)
    if kernel.startswith("grouped"):
        sets = GROUPED_LAYERS  # each its own: what two layers read would come from the cache the second time

    def normals(width: int) -> list[Tensor]:
        return [torch.randn(batch, frames, width, device=device).to(torch.bfloat16) for _ in range(sets)]

    factors = torch.rand(batch, device=device) + 0.1
    tensors = zip(*(normals(width) for width in (d, p, RANK, RANK)), strict=True)
    return KERNELS[kernel].job([Batch(x, g, h, dh, factors) for x, g, h, dh in tensors])
