"""The definition of every op: plain PyTorch, sample by sample in float64.

Nothing here is optimised. Each function defines the op of the same name, and every backend is tested against it. A norm
is returned in float32 and is never below its float64 value. The float64 computation itself has an error of about
T·2⁻⁵³·Σ_t‖x_t‖‖g_t‖, which is not added; `dpkernels.backends.bounds` derives the backends' bounds.
"""

from dpkernels.reference._definitions import DEFINITIONS
from dpkernels.reference.bias import bias_norm_sq, bias_weighted_sum
from dpkernels.reference.chacha20 import chacha20_keystream, chacha20_normal
from dpkernels.reference.clip import automatic_clip_factors, clip_factors
from dpkernels.reference.depthwise_conv1d import depthwise_conv1d_norm_sq, depthwise_conv1d_weighted_sum
from dpkernels.reference.embedding import embedding_norm_sq, embedding_weighted_sum
from dpkernels.reference.grouped import total_norm_sq, weighted_sums
from dpkernels.reference.layer_norm import layer_norm_norm_sq, layer_norm_weighted_sum
from dpkernels.reference.linear import linear_norm_sq, linear_weighted_sum
from dpkernels.reference.lora import lora_gradients, lora_norm_sq, lora_weighted_sum
from dpkernels.reference.noise import noise_sums
from dpkernels.reference.optim import noise_adamw, noise_sgd
from dpkernels.reference.transducer import (
    transducer_cells,
    transducer_gradients,
    transducer_lattice,
    transducer_scores,
)

__all__ = [
    "DEFINITIONS",
    "automatic_clip_factors",
    "bias_norm_sq",
    "bias_weighted_sum",
    "chacha20_keystream",
    "chacha20_normal",
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
    "transducer_scores",
    "weighted_sums",
]
