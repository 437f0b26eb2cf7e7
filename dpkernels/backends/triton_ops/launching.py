"""Kernel arguments from tensors (strides, alignment, configurations), and the only function that launches."""

import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from dpkernels.backends import registry
from dpkernels.backends.triton_ops import availability, bounds, configs

INTERPRETED = availability.interpreting()
"""Whether kernels are interpreted, decided when they are defined, that is when this package is imported."""

_ALIGN_BYTES = 16
_ALIGNS = (16, 8)
"""Divisors, in elements, of strides and sizes for which loads have the hardware's full width (8 for small ranks)."""

# a·b + c may be one instruction in every launch: the bounds hold either way, and Triton's default will change
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
    # called several times a layer, and torch queries the driver each time
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(
    function: Any,
    programs: int,
    like: Tensor,
    *arguments: Any,
    aligned: bool = True,
    variant: str = "",
    **constants: Any,
) -> None:
    """Run a kernel on `programs` programs, with the configuration for its name, `like`'s dtype and device.

    Args:
        function: the kernel.
        programs: the number of programs; 0 launches nothing.
        like: a tensor of the kernel's device and input dtype.
        arguments: tensors, integers, None.
        aligned: whether the configuration is for tensors that `rows` found aligned.
        variant: of the configuration, where a kernel has several: a word after its name.
        constants: constexprs besides those of the configuration.
    """
    if programs == 0:
        return
    chosen = _config(function, like, aligned, variant)
    execute(function, programs, like.device, arguments, chosen.options | constants)


def execute(
    function: Any, programs: int, device: torch.device, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Launch a kernel on `device`'s current stream. `bench.gpu.triton_table` replaces this function by a compiler."""
    if device.type != "cuda":
        function[programs,](*arguments, **keywords, **OPTIONS)
        return
    with torch.cuda.device(device):
        function[programs,](*arguments, **keywords, **OPTIONS)


def tiles(size: int, tile: int) -> int:
    """Return the number of tiles that cover `size`."""
    return -(-size // tile)


def tile_of(function: Any, like: Tensor, name: str, aligned: bool = True, variant: str = "") -> int:
    """Return the size of a tile in the configuration that `launch` uses."""
    return _config(function, like, aligned, variant).tiles[name]


def _config(function: Any, like: Tensor, aligned: bool, variant: str) -> configs.Config:
    name = f"{function.__name__} {variant}" if variant else function.__name__
    return configs.config(name, like.dtype, architecture(like.device), aligned)


def is_long(function: Any, like: Tensor, aligned: bool = True, frames: int | None = None) -> bool:
    """Return whether samples of `frames` (None: those of `like` [B, T, n]) may have more than PIECES·BT of them.

    A kernel's variant "long" then adds parts of so many frames in float64. The rest of its batch may send a sample
    there, which changes the order of its sums, and not its bound.
    """
    count = like.shape[1] if frames is None else frames
    return count > bounds.PIECES * tile_of(function, like, "BT", aligned)


def in_pairs(function: Any, like: Tensor, frames: int, aligned: bool) -> bool:
    """Return whether a kernel adds samples of `frames` in pairs of float32 numbers (`bounds`, "Pairs")."""
    return architecture(like.device) not in bounds.FLOAT64 and not is_long(function, like, aligned, frames)


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if it does not start at a multiple of 16 bytes, as every allocation does."""
    return tensor.clone() if not tensor.is_meta and tensor.data_ptr() % _ALIGN_BYTES else tensor


def rows(tensor: Tensor) -> tuple[tuple[Any, ...], int]:
    """Return a [B, T, n] tensor as kernel arguments, and their constexpr ALIGN.

    Returns:
        (tensor, stride of B, of T, of n, n) and ALIGN: 0 for any strides; 1 if features are adjacent; 16 or 8
        if, in addition, n and the other strides are multiples of it. These are then passed divided by it
        (`device.times`).
    """
    tensor = aligned(tensor)
    width = tensor.shape[2]
    # the stride of a dimension of size 1 is arbitrary, so it must have no influence
    batch, frame, feature = (s if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    if feature != 1 and width > 1:
        return (tensor, batch, frame, feature, width), 0
    for align in _ALIGNS:
        if width % align == 0 and batch % align == 0 and frame % align == 0:
            return (tensor, batch // align, frame // align, 1, width // align), align
    return (tensor, batch, frame, 1, width), 1


def dense(tensor: Tensor | None) -> Tensor | None:
    """Return a vector (lengths, factors) contiguous and aligned, as kernels require."""
    return None if tensor is None else aligned(tensor.contiguous())


def float64_bits(value: float) -> tuple[int, int]:
    """Return the upper and lower 32 bits of a float64, for `device.float64_of`. Triton reads an `int` annotation as 32
    bits, and raises OverflowError for a larger integer."""
    low, high = struct.unpack("<ii", struct.pack("<d", value))
    return high, low


def float64_int(value: float) -> int:
    """Return the bits of a float64 as an int64, for a table in memory."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def upcast(tensor: Tensor) -> bool:
    """Whether products need float32 copies, because the interpreter cannot multiply bfloat16."""
    return INTERPRETED and tensor.dtype == torch.bfloat16


def scratch(like: Tensor, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return uninitialised memory."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def float64_by_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Dispatch float64 inputs, which only tests have, to the torch composition, for norms and sums alike."""

    @functools.wraps(function)
    def op(*arguments: Any, **options: Any) -> Any:
        floating = next(a for a in arguments if isinstance(a, Tensor) and a.is_floating_point())
        if floating.dtype != torch.float64:
            return function(*arguments, **options)
        return registry.attribute("torch", function.__name__)(*arguments, **options)

    return op
