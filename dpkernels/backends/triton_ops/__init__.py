"""The ops as Triton kernels, for CUDA tensors: fused, without atomics, every sum in an order fixed by the shape. Each
family has one file. An op can be imported from here by its name, which loads its file. `availability` does not import
triton.

| module | content |
|---|---|
| `availability` | whether the kernels can run here |
| `device` | functions that kernels share: lengths, addresses, products, rounding up |
| `bounds` | rounding errors on a GPU, tensor cores included, and the constants that kernels take from them |
| `tensor_cores` | the test, at a GPU's first use, whether its tensor cores round as `bounds` assumes |
| `configs` | tiles, warps and stages by (kernel, dtype, architecture): a table, no autotuning |
| `launching` | kernel arguments and launches; float64 inputs go to the torch composition |
| `bias`, ... | one family each: kernels, then the op |
| `grouped` | many layers in one launch |
"""

from typing import Any

from dpkernels.backends import registry


def __getattr__(name: str) -> Any:
    return registry.attribute("triton", name)
