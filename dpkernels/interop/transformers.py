"""transformers: rules for its own layer classes, and for torch layers that it uses in a special way.

A rule is registered only if the modelling file that defines the layer is imported already; this module imports no
modelling file.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpkernels.nn import GhostModule, register_child_swap, register_swap
from dpkernels.nn.layers.embedding import ghost_embedding
from dpkernels.nn.layers.linear import ghost_linear


class GhostConv1D(GhostModule, Conv1D):
    """GPT-2's Conv1D, a linear layer with weight [d,p]: y = x W + b."""

    ghost_in_graph = True

    def forward(self, x: Tensor) -> Tensor:
        """As Conv1D's."""
        if not self._ghost_active(self.weight, self.bias):
            return super().forward(x)
        return ghost_linear(self, x, self.weight, self.bias, transposed=True)


class RelativeKeys:
    """Represents Wav2Vec2-BERT's distance embeddings, table[ids] with ids [L,R] and so without a batch.

    The model only multiplies them with the queries: einsum("bhld,lrd->bhlr", query, table[ids]). This equals a
    linear layer, query · tableᵀ, followed by a gather at ids. The linear layer carries the batch, and costs R/n
    times less (n rows). Any other use raises NotImplementedError.
    """

    _EQUATION = "bhld,lrd->bhlr"

    def __init__(self, layer: GhostRelativeKeys, ids: Tensor) -> None:
        self._layer, self._ids = layer, ids

    def to(self, *args: Any, **kwargs: Any) -> RelativeKeys:
        """Return self: the product casts to the queries' dtype anyway."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        """Compute torch.einsum for the one equation; raise NotImplementedError for any other function."""
        if func is torch.einsum and len(args) == 3 and args[0] == cls._EQUATION and isinstance(args[2], cls):
            return args[2]._times(args[1])
        use = getattr(func, "__name__", func)
        raise NotImplementedError(
            f"'distance_embedding': {use} of relative keys has no norm rule; freeze 'distance_embedding'"
        )

    def _times(self, query: Tensor) -> Tensor:
        batch, heads, length, size = query.shape
        layer = self._layer
        rows = query.reshape(batch, heads * length, size)
        logits = ghost_linear(layer, rows, layer.weight, None, dtype=query.dtype)
        ids = self._ids.expand(batch, heads, *self._ids.shape)
        return logits.view(batch, heads, length, -1).gather(3, ids)


class GhostRelativeKeys(GhostModule, nn.Embedding):
    """The `distance_embedding` of Wav2Vec2-BERT's attention: see RelativeKeys."""

    ghost_covers = ("weight",)

    def forward(self, input: Tensor) -> Any:
        """ids [L,R] -> table[ids] [L,R,d], or privately the RelativeKeys that represent it."""
        if not self._ghost_active(self.weight):
            return super().forward(input)
        return RelativeKeys(self, input)


def _whisper_positions(original: type[nn.Module]) -> type[nn.Module]:
    class GhostWhisperPositionalEmbedding(GhostModule, original):  # type: ignore[valid-type,misc]
        """Whisper's trained decoder positions, which read rows of their table without a layer."""

        ghost_covers = ("weight",)

        def forward(
            self,
            input_ids: Tensor,
            cache_length: int = 0,
            position_ids: Tensor | None = None,
            past_key_values_length: int | None = None,
        ) -> Tensor:
            """As Whisper's, but returns [B,T,d] even if Whisper's returns [T,d].

            `cache_length` was called past_key_values_length until transformers 5.24.
            """
            first = cache_length if past_key_values_length is None else past_key_values_length
            if not self._ghost_active(self.weight):
                rows: Tensor = super().forward(input_ids, first, position_ids)
                return rows
            if position_ids is None:
                batch, length = input_ids.shape[:2]
                position_ids = torch.arange(first, first + length, device=input_ids.device).expand(batch, -1)
            return ghost_embedding(self, position_ids, self.weight)

    return GhostWhisperPositionalEmbedding


_registered: set[str] = set()


def register() -> None:
    """Register the rules for layers of the modelling files imported so far."""
    register_swap(Conv1D, GhostConv1D)
    for name in ("whisper", "wav2vec2_bert"):
        modelling = sys.modules.get(f"transformers.models.{name}.modeling_{name}")
        if modelling is None or name in _registered:
            continue
        _registered.add(name)
        if name == "whisper":
            positions = modelling.WhisperPositionalEmbedding
            register_swap(positions, _whisper_positions(positions))
        if name == "wav2vec2_bert":
            attention = modelling.Wav2Vec2BertSelfAttention
            register_child_swap(attention, "distance_embedding", nn.Embedding, GhostRelativeKeys)
