"""The memory of a private step: live bytes, fake tensors, and an estimate for a model, strategy and batch.

It imports `dpkernels.privacy` and `dpkernels.blocks`; nothing in `dpkernels` imports it.
"""

from dpkernels.memory.estimator import CUDA_WORKSPACE, Losses, MemoryEstimator, Peak
from dpkernels.memory.fake_tensors import FakeOps, Target, fake_model, fake_tensors
from dpkernels.memory.live_bytes import LiveMemory, cuda_size, held_bytes
from dpkernels.memory.measured import MeasuredStep, measure_step

__all__ = [
    "CUDA_WORKSPACE",
    "FakeOps",
    "LiveMemory",
    "Losses",
    "MeasuredStep",
    "MemoryEstimator",
    "Peak",
    "Target",
    "cuda_size",
    "fake_model",
    "fake_tensors",
    "held_bytes",
    "measure_step",
]
