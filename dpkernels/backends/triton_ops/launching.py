"""From tensors to kernel arguments: strides, alignment, configurations, the one place that launches."""

import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from dpkernels.backends import torch_ops, triton_availability
from dpkernels.backends.triton_ops import configs

INTERPRETED = triton_availability.interpreting()
"""Decided when kernels are defined, hence when this package is imported."""

_ALIGN_BYTES = 16
_ALIGNS = (16, 8)
"""Elements: with strides and sizes divisible by one of them, loads are as wide as the hardware's (8: a small rank)."""

# what every launch says: whether a·b + c may be one instruction (a bound never minds; Triton's default will change)
OPTIONS = {"enable_fp_fusion": True}


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` without specialisation on integers, which a kernel must annotate as `int`.

    Triton compiles other code for arguments that are 1 or divisible by 16. A batch's size, its padding or a stride
    that holds the padding would then choose the layout of a tile, and with it the order of a sum.
    """
    integers = [name for name, kind in function.__annotations__.items() if kind is int]
    return triton.jit(function, do_not_specialize=integers)


def architecture(device: torch.device) -> int:
    """Compute capability × 10 of a CUDA device; 0 in the interpreter."""
    return _capability(device) if device.type == "cuda" else 0


@functools.cache
def _capability(device: torch.device) -> int:
    # asked several times a layer, and torch asks the driver each time
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(
    function: Any,
    programs: int,
    like: Tensor,
    *arguments: Any,
    aligned: bool = True,
    **constants: Any,
) -> None:
    """Run a kernel on `programs` programs, with the configuration for its name, `like`'s dtype and device.

    Args:
        function: the kernel.
        programs: how many; 0 launches nothing.
        like: a tensor of the device it runs on and of the dtype that it reads.
        arguments: tensors, integers, None.
        aligned: whether the configuration is for tensors that `rows` found aligned.
        constants: constexprs besides those of the configuration.
    """
    if programs == 0:
        return
    chosen = configs.config(function.__name__, like.dtype, architecture(like.device), aligned)
    execute(function, programs, like.device, arguments, chosen.options | constants)


def execute(
    function: Any, programs: int, device: torch.device, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Hand a kernel to Triton, on `device`'s current stream. `bench.gpu.triton_table` puts a compiler in its place."""
    if device.type != "cuda":
        function[programs,](*arguments, **keywords, **OPTIONS)
        return
    with torch.cuda.device(device):
        function[programs,](*arguments, **keywords, **OPTIONS)


def tiles(size: int, tile: int) -> int:
    """How many tiles cover `size`."""
    return -(-size // tile)


def tile_of(function: Any, like: Tensor, name: str, aligned: bool = True) -> int:
    """The size of a tile in the configuration that `launch` will use."""
    return configs.config(function.__name__, like.dtype, architecture(like.device), aligned).tiles[name]


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it does not start at a multiple of 16 bytes, as all allocations do."""
    return tensor.clone() if not tensor.is_meta and tensor.data_ptr() % _ALIGN_BYTES else tensor


def rows(tensor: Tensor) -> tuple[tuple[Any, ...], int]:
    """A [B, T, n] tensor as kernel arguments, and the constexpr ALIGN that they go with.

    Returns:
        (tensor, stride of B, of T, of n, n) and ALIGN: 0 for any strides; 1 where features are adjacent; 16 or 8
        where, on top, n and the other strides are multiples of it, which are then passed divided by it
        (`device.times`).
    """
    tensor = aligned(tensor)
    width = tensor.shape[2]
    # a stride over one entry means nothing, so it must not decide anything
    batch, frame, feature = (s if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    if feature != 1 and width > 1:
        return (tensor, batch, frame, feature, width), 0
    for align in _ALIGNS:
        if width % align == 0 and batch % align == 0 and frame % align == 0:
            return (tensor, batch // align, frame // align, 1, width // align), align
    return (tensor, batch, frame, 1, width), 1


def dense(tensor: Tensor | None) -> Tensor | None:
    """A vector (lengths, factors) as kernels read it: contiguous and aligned."""
    return None if tensor is None else aligned(tensor.contiguous())


def float64_bits(value: float) -> tuple[int, int]:
    """The upper and lower 32 bits of a float64, for `device.float64_of`: kernels' integers are 32 bits, as an `int`
    annotation is to Triton (a larger one is an OverflowError)."""
    low, high = struct.unpack("<ii", struct.pack("<d", value))
    return high, low


def float64_int(value: float) -> int:
    """The bits of a float64 as an int64, for a table in memory."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def upcast(tensor: Tensor) -> bool:
    """Whether products must be made of float32 copies: the interpreter has none of bfloat16."""
    return INTERPRETED and tensor.dtype == torch.bfloat16


def scratch(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised float64 memory."""
    return torch.empty(shape, dtype=torch.float64, device=like.device)


def float64_by_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves float64 inputs, which only tests have, to the torch composition: a norm and its sum alike."""
    composed = getattr(torch_ops, function.__name__)

    @functools.wraps(function)
    def op(*arguments: Any, **options: Any) -> Any:
        floating = next(a for a in arguments if isinstance(a, Tensor) and a.is_floating_point())
        return (composed if floating.dtype == torch.float64 else function)(*arguments, **options)

    return op
