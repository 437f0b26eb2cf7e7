"""Argument checks shared by the ops. Each message names the expected value, the given one, and the fix.

The public functions check shapes, dtypes and devices, also under fake tensors. The op itself checks values (lengths,
ids), and only on the CPU: on a GPU the check would wait for the device, so the kernels clamp instead.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

TRAINING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fail(name: str, tensor: Tensor, expected: str, hint: str, error: type[Exception] = ValueError) -> None:
    given = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    raise error(f"{name}: expected {expected}; given {given}; {hint}")


def floats(**tensors: Tensor) -> None:
    """Check that all tensors have the same floating dtype and device.

    Raises:
        TypeError: a dtype is not bfloat16, float16, float32 or float64, or the dtypes differ.
        ValueError: the devices differ.
    """
    (first, reference), *rest = tensors.items()
    if reference.dtype not in TRAINING_DTYPES:
        _fail(
            first,
            reference,
            "bfloat16, float16, float32 or float64",
            f"convert it: {first}.float()",
            TypeError,
        )
    dtype = reference.dtype
    for name, tensor in rest:
        if tensor.dtype != dtype:
            _fail(
                name,
                tensor,
                f"{reference.dtype}, as {first} has",
                f"convert it: {name}.to({first}.dtype)",
                TypeError,
            )
    same_device(**tensors)


def same_device(**tensors: Tensor | None) -> None:
    """Check that all tensors are on the device of the first.

    Raises:
        ValueError: the devices differ.
    """
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first, reference = given[0]
    device = reference.device
    for name, tensor in given[1:]:
        if tensor.device != device:
            _fail(
                name,
                tensor,
                f"device {reference.device}, as {first} has",
                f"move it: {name}.to({first}.device)",
            )


def shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], layout: str) -> None:
    """Check the number of dimensions, and each size that is not None.

    Raises:
        ValueError: the shape differs; the message quotes `layout`, such as "[B, T, d]".
    """
    given = tensor.shape
    if len(given) == len(expected):
        # a plain loop, because this line takes most of a check's time
        for size, required in zip(given, expected):  # noqa: B905 - the lengths are equal
            if required is not None and required != size:
                break
        else:
            return
    sizes = ", ".join("any" if size is None else str(size) for size in expected)
    _fail(name, tensor, f"{layout} = [{sizes}]", "pass a tensor of that shape")


def lengths_of(lengths: Tensor | None, x: Tensor) -> None:
    """Check that lengths is None or int64 [B] on x's device.

    Raises:
        TypeError: the dtype differs.
        ValueError: the shape or device differs.
    """
    if lengths is None:
        return
    if lengths.dtype != torch.int64:
        _fail("lengths", lengths, "int64 [B]", "convert it: lengths.long()", TypeError)
    shape("lengths", lengths, (x.shape[0],), "[B]")
    same_device(x=x, lengths=lengths)


def lengths_within(lengths: Tensor | None, frames: int) -> None:
    """Check that 0 ≤ L_i ≤ T, on the CPU only.

    Raises:
        ValueError: a length is outside that range.
    """
    if lengths is None or lengths.device.type != "cpu":
        return
    for i, n in enumerate(lengths.tolist()):
        if not 0 <= n <= frames:
            raise ValueError(f"lengths: given {n} for sample {i}, but T is {frames}; pass 0 ≤ lengths ≤ T")


def weighted_sum(factors: Tensor, x: Tensor, **outs: tuple[Tensor, tuple[int, ...], str]) -> None:
    """Check that factors is float32 [B], each out float32 or float64 of its shape, and all on x's device.

    Raises:
        TypeError: a dtype differs.
        ValueError: a shape or device differs.
    """
    if factors.dtype != torch.float32:
        _fail("factors", factors, "float32 [B]", "pass the result of clip_factors", TypeError)
    shape("factors", factors, (x.shape[0],), "[B]")
    device = x.device
    if factors.device != device:
        same_device(x=x, factors=factors)
    for name, (out, expected, layout) in outs.items():
        if out.dtype not in (torch.float32, torch.float64):
            _fail(name, out, "float32 or float64", "sum in float64, and convert the result", TypeError)
        shape(name, out, expected, layout)
        if out.device != device:
            same_device(x=x, **{name: out})


def sums(name: str, tensors: Sequence[Tensor], *, noised: bool) -> None:
    """Check that tensors are contiguous, disjoint, on one device and of one dtype (float64 if they are `noised`).

    Raises:
        TypeError: a dtype differs.
        ValueError: a tensor is strided, on another device, or overlaps another.
    """
    dtype, device = (tensors[0].dtype, tensors[0].device) if tensors else (None, None)
    for i, tensor in enumerate(tensors):
        label = f"{name}[{i}]"
        if not tensor.is_contiguous():
            _fail(label, tensor, f"a contiguous tensor, not strides {tensor.stride()}", "copy it")
        if tensor.dtype != dtype:
            _fail(label, tensor, f"{dtype}, as {name}[0] has", "convert it", TypeError)
        if noised and tensor.dtype != torch.float64:
            _fail(label, tensor, "float64, because noise is added", "convert it", TypeError)
        if tensor.device != device:
            same_device(**{f"{name}[0]": tensors[0], label: tensor})
    if not any(isinstance(tensor, torch._subclasses.FakeTensor) for tensor in tensors):
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
        if any(end > start for (_, end), (start, _) in pairwise(spans)):
            raise ValueError(
                f"{name}: expected disjoint tensors; given two that overlap; merge the layers' records"
            )


def finite(name: str, value: float) -> None:
    """Check that a number is finite.

    Raises:
        ValueError: the number is NaN or infinite.
    """
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number; given {value}; check how it was computed")


def positive(name: str, value: float) -> None:
    """Check that a number is finite and above 0.

    Raises:
        ValueError: the number is NaN, infinite, 0 or negative.
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0; given {value}; choose one such as 1.0")


def integer(name: str, value: int, least: int) -> None:
    """Check that an integer is ≥ least.

    Raises:
        ValueError: the integer is smaller.
    """
    if value < least:
        raise ValueError(f"{name}: expected an integer ≥ {least}; given {value}; pass the layer's {name}")
