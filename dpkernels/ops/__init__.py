"""The ops: checked public functions over `torch.ops.dpkernels`, one name from schema to reference to backend.

Each `*_norm_sq` returns every sample's squared gradient norm, rounded up; each `*_weighted_sum` adds the
clipped gradients to a sum in place. Neither materialises per-sample gradients of a linear layer. `total_norm_sq` and
`weighted_sums` serve many layers in one call. `noise_sums` adds noise to finished sums; `noise_adamw` and `noise_sgd`
are the fused optimizer steps. `transducer_loss` is the loss of RNN-T and TDT recognisers, without the joint network's
logits in memory. `dpkernels.backends.registry.explain()` and `python -m dpkernels` report which implementation runs,
and why.
"""

from dpkernels import reference
from dpkernels.backends import registry
from dpkernels.ops.bias import bias_norm_sq, bias_weighted_sum
from dpkernels.ops.chacha20 import chacha20_keystream, chacha20_normal
from dpkernels.ops.clip import automatic_clip_factors, clip_factors
from dpkernels.ops.depthwise_conv1d import depthwise_conv1d_norm_sq, depthwise_conv1d_weighted_sum
from dpkernels.ops.embedding import embedding_norm_sq, embedding_weighted_sum
from dpkernels.ops.grouped import total_norm_sq, weighted_sums
from dpkernels.ops.layer_norm import layer_norm_norm_sq, layer_norm_weighted_sum
from dpkernels.ops.layers import GroupedLayer
from dpkernels.ops.linear import linear_norm_sq, linear_weighted_sum
from dpkernels.ops.lora import lora_gradients, lora_norm_sq, lora_weighted_sum
from dpkernels.ops.noise import clip_and_noise, noise_sums
from dpkernels.ops.optim import noise_adamw, noise_sgd
from dpkernels.ops.transducer import (
    transducer_cells,
    transducer_gradients,
    transducer_lattice,
    transducer_loss,
    transducer_scores,
)

registry.add_reference(reference.DEFINITIONS)

__all__ = [
    "GroupedLayer",
    "automatic_clip_factors",
    "bias_norm_sq",
    "bias_weighted_sum",
    "chacha20_keystream",
    "chacha20_normal",
    "clip_and_noise",
    "clip_factors",
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
    "noise_adamw",
    "noise_sgd",
    "noise_sums",
    "total_norm_sq",
    "transducer_cells",
    "transducer_gradients",
    "transducer_lattice",
    "transducer_loss",
    "transducer_scores",
    "weighted_sums",
]
