"""The ops as Triton kernels, for CUDA tensors: fused, without atomics, every sum in an order fixed by the shape.

| module | what |
|---|---|
| `device` | functions that kernels share: lengths, addresses, products, rounding up |
| `bounds` | what rounding can do on a GPU, tensor cores included; the constants that kernels take from it |
| `tensor_cores` | asks a GPU at its first use whether its tensor cores round as `bounds` assumes |
| `configs` | tiles, warps and stages by (kernel, dtype, architecture): a table, no autotuning |
| `launching` | how a kernel gets its arguments; float64 inputs go to the torch composition |
| `bias`, ... | one family each: kernels, then the op |
| `grouped` | many layers in one launch |
"""

from dpkernels.backends.triton_ops.bias import bias_norm_sq, bias_weighted_sum
from dpkernels.backends.triton_ops.depthwise_conv1d import (
    depthwise_conv1d_norm_sq,
    depthwise_conv1d_weighted_sum,
)
from dpkernels.backends.triton_ops.embedding import embedding_norm_sq, embedding_weighted_sum
from dpkernels.backends.triton_ops.grouped import clip_and_noise, total_norm_sq
from dpkernels.backends.triton_ops.layer_norm import layer_norm_norm_sq, layer_norm_weighted_sum
from dpkernels.backends.triton_ops.linear import linear_norm_sq, linear_weighted_sum
from dpkernels.backends.triton_ops.lora import lora_gradients, lora_norm_sq, lora_weighted_sum

__all__ = [
    "bias_norm_sq",
    "bias_weighted_sum",
    "clip_and_noise",
    "depthwise_conv1d_norm_sq",
    "depthwise_conv1d_weighted_sum",
    "embedding_norm_sq",
    "embedding_weighted_sum",
    "layer_norm_norm_sq",
    "layer_norm_weighted_sum",
    "linear_norm_sq",
    "linear_weighted_sum",
    "lora_gradients",
    "lora_norm_sq",
    "lora_weighted_sum",
    "total_norm_sq",
]
