"""The ops as Triton kernels, for CUDA tensors: fused, without atomics, every sum in an order fixed by the shape; a file
a family. Every op may be imported from here by its name, which loads its file; `availability` imports no triton.

| module | what |
|---|---|
| `availability` | whether the kernels can run here |
| `device` | functions that kernels share: lengths, addresses, products, rounding up |
| `bounds` | what rounding can do on a GPU, tensor cores included; the constants that kernels take from it |
| `tensor_cores` | asks a GPU at its first use whether its tensor cores round as `bounds` assumes |
| `configs` | tiles, warps and stages by (kernel, dtype, architecture): a table, no autotuning |
| `launching` | how a kernel gets its arguments; float64 inputs go to the torch composition |
| `bias`, ... | one family each: kernels, then the op |
| `grouped` | many layers in one launch |
"""

from typing import Any

from dpkernels.backends import registry


def __getattr__(name: str) -> Any:
    return registry.attribute("triton", name)
