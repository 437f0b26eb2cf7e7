"""Ghost layers: torch's layers that record the tensors for ghost clipping, and the conversion of models to them."""

import warnings as _warnings
from typing import Any as _Any

from torch import nn as _nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as _OutProjection

from dpkernels.nn.batch.shared import SharedTensor
from dpkernels.nn.convert.attaching import Uncovered, attach, coverage, detach, uncovered
from dpkernels.nn.convert.coverage import Coverage, CoverageRow
from dpkernels.nn.convert.fix import Change, FixReport
from dpkernels.nn.convert.swapping import (
    ghost_subclass,
    register_child_swap,
    register_refusal,
    register_swap,
    swap,
    unswap,
)
from dpkernels.nn.copying import original_class
from dpkernels.nn.layers.attention import GhostMultiheadAttention, GhostOutProjection, attention_refusal
from dpkernels.nn.layers.attention_records import PackedLinearRecord
from dpkernels.nn.layers.batch_norm import (
    FrozenBatchNorm,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    FrozenOwnBatchNorm,
    batch_norms_in_training,
    freeze_batch_norm,
    mixes_samples,
)
from dpkernels.nn.layers.conv import (
    GhostConv1d,
    GhostConv2d,
    GhostConv3d,
    GhostConvTranspose1d,
    GhostConvTranspose2d,
    GhostConvTranspose3d,
)
from dpkernels.nn.layers.conv_records import (
    Conv1dRecord,
    Conv2dRecord,
    Conv3dRecord,
    ConvRecord,
    DepthwiseConv1dRecord,
)
from dpkernels.nn.layers.embedding import GhostEmbedding
from dpkernels.nn.layers.embedding_bag import GhostEmbeddingBag
from dpkernels.nn.layers.expanded import EXPANSION_LIMIT
from dpkernels.nn.layers.group_norm import (
    GhostGroupNorm,
    GhostInstanceNorm1d,
    GhostInstanceNorm2d,
    GhostInstanceNorm3d,
)
from dpkernels.nn.layers.joint_records import JointRecord
from dpkernels.nn.layers.linear import GhostLinear
from dpkernels.nn.layers.lora import GhostLoRALinear
from dpkernels.nn.layers.lora_records import LoRARecord
from dpkernels.nn.layers.norm import GhostLayerNorm, GhostRMSNorm
from dpkernels.nn.layers.recurrent import GhostGRU, GhostLSTM, GhostRNN
from dpkernels.nn.layers.recurrent_cells import GhostGRUCell, GhostLSTMCell, GhostRNNCell
from dpkernels.nn.layers.transformer import (
    GhostTransformerDecoder,
    GhostTransformerDecoderLayer,
    GhostTransformerEncoder,
    GhostTransformerEncoderLayer,
    transformer_refusal,
)
from dpkernels.nn.recording.choice import MEMORY_SHARE, Choice, Choices, Chosen, LayerSizes
from dpkernels.nn.recording.grouping import add_weighted_sums, norms_sq
from dpkernels.nn.recording.grouping import share as _share
from dpkernels.nn.recording.module import GhostModule, modules_of, named_modules
from dpkernels.nn.recording.records import (
    BiasRecord,
    EmbeddingRecord,
    ExpandedRecord,
    LinearRecord,
    NormRecord,
    Record,
)
from dpkernels.nn.recording.row_check import RowCheck, RowError
from dpkernels.nn.recording.sharing import sharing_inputs
from dpkernels.nn.recording.split import SplitRecord
from dpkernels.nn.recording.tape import Tape

register_swap(_nn.Linear, GhostLinear)
register_swap(_nn.Conv1d, GhostConv1d)
register_swap(_nn.Conv2d, GhostConv2d)
register_swap(_nn.Conv3d, GhostConv3d)
register_swap(_nn.ConvTranspose1d, GhostConvTranspose1d)
register_swap(_nn.ConvTranspose2d, GhostConvTranspose2d)
register_swap(_nn.ConvTranspose3d, GhostConvTranspose3d)
register_swap(_nn.Embedding, GhostEmbedding)
register_swap(_nn.EmbeddingBag, GhostEmbeddingBag)
register_swap(_nn.LayerNorm, GhostLayerNorm)
register_swap(_nn.RMSNorm, GhostRMSNorm)
register_swap(_nn.LSTM, GhostLSTM)
register_swap(_nn.GRU, GhostGRU)
register_swap(_nn.RNN, GhostRNN)
register_swap(_nn.LSTMCell, GhostLSTMCell)
register_swap(_nn.GRUCell, GhostGRUCell)
register_swap(_nn.RNNCell, GhostRNNCell)
register_swap(_nn.GroupNorm, GhostGroupNorm)
register_swap(_nn.InstanceNorm1d, GhostInstanceNorm1d)
register_swap(_nn.InstanceNorm2d, GhostInstanceNorm2d)
register_swap(_nn.InstanceNorm3d, GhostInstanceNorm3d)
register_swap(_nn.MultiheadAttention, GhostMultiheadAttention)
register_swap(_OutProjection, GhostOutProjection)
register_refusal(attention_refusal)
register_swap(_nn.TransformerEncoderLayer, GhostTransformerEncoderLayer)
register_swap(_nn.TransformerDecoderLayer, GhostTransformerDecoderLayer)
register_swap(_nn.TransformerEncoder, GhostTransformerEncoder)
register_swap(_nn.TransformerDecoder, GhostTransformerDecoder)
register_refusal(transformer_refusal)

__all__ = [
    "EXPANSION_LIMIT",
    "MEMORY_SHARE",
    "BiasRecord",
    "Change",
    "Choice",
    "Choices",
    "Chosen",
    "Conv1dRecord",
    "Conv2dRecord",
    "Conv3dRecord",
    "ConvRecord",
    "Coverage",
    "CoverageRow",
    "DepthwiseConv1dRecord",
    "EmbeddingRecord",
    "ExpandedRecord",
    "FixReport",
    "FrozenBatchNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "FrozenOwnBatchNorm",
    "GhostConv1d",
    "GhostConv2d",
    "GhostConv3d",
    "GhostConvTranspose1d",
    "GhostConvTranspose2d",
    "GhostConvTranspose3d",
    "GhostEmbedding",
    "GhostEmbeddingBag",
    "GhostGRU",
    "GhostGRUCell",
    "GhostGroupNorm",
    "GhostInstanceNorm1d",
    "GhostInstanceNorm2d",
    "GhostInstanceNorm3d",
    "GhostLSTM",
    "GhostLSTMCell",
    "GhostLayerNorm",
    "GhostLinear",
    "GhostLoRALinear",
    "GhostModule",
    "GhostMultiheadAttention",
    "GhostOutProjection",
    "GhostRMSNorm",
    "GhostRNN",
    "GhostRNNCell",
    "GhostTransformerDecoder",
    "GhostTransformerDecoderLayer",
    "GhostTransformerEncoder",
    "GhostTransformerEncoderLayer",
    "JointRecord",
    "LayerSizes",
    "LinearRecord",
    "LoRARecord",
    "NormRecord",
    "PackedLinearRecord",
    "Record",
    "RowCheck",
    "RowError",
    "SharedTensor",
    "SplitRecord",
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
    "original_class",
    "register_child_swap",
    "register_refusal",
    "register_swap",
    "sharing_inputs",
    "swap",
    "uncovered",
    "unswap",
]


def __getattr__(name: str) -> _Any:
    if name == "Share":
        _warnings.warn(
            "dpkernels.nn.Share is now dpkernels.ops.GroupedLayer, which takes the tensors of the kind's own ops",
            DeprecationWarning,
            stacklevel=2,
        )
        return _share
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
