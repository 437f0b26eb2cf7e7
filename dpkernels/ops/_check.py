"""Argument checks shared by the ops: what was expected, what was given, and the fix.

Shapes, dtypes and devices are checked by the public functions, also under fake tensors. Values (lengths, ids)
are checked in the op itself, and only on the CPU: on a GPU the check would wait for the device, so kernels
clamp there.
"""

import math

import torch
from torch import Tensor

TRAINING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fail(name: str, tensor: Tensor, expected: str, hint: str, error: type[Exception] = ValueError) -> None:
    given = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    raise error(f"{name}: expected {expected}; given {given}; {hint}")


def floats(**tensors: Tensor) -> None:
    """All of one floating dtype and one device.

    Raises:
        TypeError: a dtype other than bfloat16, float16, float32, float64, or dtypes that differ.
        ValueError: devices that differ.
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
    """All on the first one's device.

    Raises:
        ValueError: devices that differ.
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
    """The given number of dimensions, and these sizes where not None.

    Raises:
        ValueError: another shape; `layout` says what it should be, as in "[B, T, d]".
    """
    given = tensor.shape
    if len(given) == len(expected):
        # in a loop: this is most of a check's time
        for size, want in zip(given, expected):  # noqa: B905 - of one length
            if want is not None and want != size:
                break
        else:
            return
    sizes = ", ".join("any" if size is None else str(size) for size in expected)
    _fail(name, tensor, f"{layout} = [{sizes}]", "pass a tensor of that shape")


def lengths_of(lengths: Tensor | None, x: Tensor) -> None:
    """lengths is None or int64 [B] on x's device.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device.
    """
    if lengths is None:
        return
    if lengths.dtype != torch.int64:
        _fail("lengths", lengths, "int64 [B]", "convert it: lengths.long()", TypeError)
    shape("lengths", lengths, (x.shape[0],), "[B]")
    same_device(x=x, lengths=lengths)


def lengths_within(lengths: Tensor | None, frames: int) -> None:
    """0 ≤ L_i ≤ T, looked at where looking is free.

    Raises:
        ValueError: a length outside that range.
    """
    if lengths is None or lengths.device.type != "cpu":
        return
    for i, n in enumerate(lengths.tolist()):
        if not 0 <= n <= frames:
            raise ValueError(f"lengths: sample {i} has {n}, but T is {frames}; pass 0 ≤ lengths ≤ T")


def weighted_sum(factors: Tensor, x: Tensor, **outs: tuple[Tensor, tuple[int, ...], str]) -> None:
    """factors is float32 [B]; every out, given with its shape and layout, is float32 or float64; one device.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device.
    """
    if factors.dtype != torch.float32:
        _fail("factors", factors, "float32 [B]", "pass what clip_factors returns", TypeError)
    shape("factors", factors, (x.shape[0],), "[B]")
    device = x.device
    if factors.device != device:
        same_device(x=x, factors=factors)
    for name, (out, expected, layout) in outs.items():
        if out.dtype not in (torch.float32, torch.float64):
            _fail(name, out, "float32 or float64", "sum in float64 and convert afterwards", TypeError)
        shape(name, out, expected, layout)
        if out.device != device:
            same_device(x=x, **{name: out})


def finite(name: str, value: float) -> None:
    """A finite number.

    Raises:
        ValueError: NaN or infinite.
    """
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number; given {value}; check how it was computed")


def positive(name: str, value: float) -> None:
    """A finite number above 0.

    Raises:
        ValueError: NaN, infinite, 0 or negative.
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0; given {value}; choose one such as 1.0")


def whole(name: str, value: int, least: int) -> None:
    """An integer ≥ least.

    Raises:
        ValueError: a smaller one.
    """
    if value < least:
        raise ValueError(f"{name}: expected an integer ≥ {least}; given {value}; pass the layer's own {name}")
