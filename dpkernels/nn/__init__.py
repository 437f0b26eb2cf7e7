"""Ghost layers: torch's layers that record what ghost clipping needs, and what makes a model of them."""

from torch import nn as _nn

from dpkernels.nn.attaching import Uncovered, attach, coverage, detach
from dpkernels.nn.conv import GhostConv1d, GhostConv2d
from dpkernels.nn.conv_records import Conv1dRecord, Conv2dRecord, ConvRecord, DepthwiseConv1dRecord
from dpkernels.nn.embedding import GhostEmbedding
from dpkernels.nn.expanded import EXPANSION_LIMIT
from dpkernels.nn.grouping import add_weighted_sums, norms_sq
from dpkernels.nn.linear import GhostLinear
from dpkernels.nn.lora import GhostLoRALinear
from dpkernels.nn.lora_records import LoRARecord
from dpkernels.nn.module import GhostModule, modules_of, named_modules
from dpkernels.nn.norm import (
    FrozenBatchNorm,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    GhostLayerNorm,
    GhostRMSNorm,
    batch_norms_in_training,
    freeze_batch_norm,
    mixes_samples,
)
from dpkernels.nn.records import (
    BiasRecord,
    EmbeddingRecord,
    ExpandedRecord,
    LinearRecord,
    NormRecord,
    Record,
    Share,
)
from dpkernels.nn.recurrent import GhostGRU, GhostLSTM, GhostRNN
from dpkernels.nn.recurrent_cells import GhostGRUCell, GhostLSTMCell, GhostRNNCell
from dpkernels.nn.row_check import RowCheck, RowError
from dpkernels.nn.shared import SharedTensor
from dpkernels.nn.sharing import sharing_inputs
from dpkernels.nn.swapping import (
    ghost_subclass,
    register_child_swap,
    register_refusal,
    register_swap,
    swap,
    unswap,
)
from dpkernels.nn.tape import Tape

register_swap(_nn.Linear, GhostLinear)
register_swap(_nn.Conv1d, GhostConv1d)
register_swap(_nn.Conv2d, GhostConv2d)
register_swap(_nn.Embedding, GhostEmbedding)
register_swap(_nn.LayerNorm, GhostLayerNorm)
register_swap(_nn.RMSNorm, GhostRMSNorm)
register_swap(_nn.LSTM, GhostLSTM)
register_swap(_nn.GRU, GhostGRU)
register_swap(_nn.RNN, GhostRNN)
register_swap(_nn.LSTMCell, GhostLSTMCell)
register_swap(_nn.GRUCell, GhostGRUCell)
register_swap(_nn.RNNCell, GhostRNNCell)

__all__ = [
    "EXPANSION_LIMIT",
    "BiasRecord",
    "Conv1dRecord",
    "Conv2dRecord",
    "ConvRecord",
    "DepthwiseConv1dRecord",
    "EmbeddingRecord",
    "ExpandedRecord",
    "FrozenBatchNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostConv1d",
    "GhostConv2d",
    "GhostEmbedding",
    "GhostGRU",
    "GhostGRUCell",
    "GhostLSTM",
    "GhostLSTMCell",
    "GhostLayerNorm",
    "GhostLinear",
    "GhostLoRALinear",
    "GhostModule",
    "GhostRMSNorm",
    "GhostRNN",
    "GhostRNNCell",
    "LinearRecord",
    "LoRARecord",
    "NormRecord",
    "Record",
    "RowCheck",
    "RowError",
    "Share",
    "SharedTensor",
    "Tape",
    "Uncovered",
    "add_weighted_sums",
    "attach",
    "batch_norms_in_training",
    "coverage",
    "detach",
    "freeze_batch_norm",
    "ghost_subclass",
    "mixes_samples",
    "modules_of",
    "named_modules",
    "norms_sq",
    "register_child_swap",
    "register_refusal",
    "register_swap",
    "sharing_inputs",
    "swap",
    "unswap",
]
