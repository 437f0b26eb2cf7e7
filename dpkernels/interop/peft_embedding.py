"""PEFT's adapters of embeddings: LoRA and trainable tokens. Both are lookups, and record as embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn

from dpkernels.nn import GhostModule
from dpkernels.nn.batch.shared import SharedTensor
from dpkernels.nn.layers.embedding import ghost_embedding
from dpkernels.nn.layers.linear import ghost_linear


class GhostPeftLoRAEmbedding(GhostModule, LoraEmbedding):
    """`peft.tuners.lora.Embedding`: y = W[ids] + s·A[:, ids]ᵀ Bᵀ with A [r,V] and B [d,r].

    A is recorded as an embedding, by the ids of its columns and the gradient of A[:, ids], and B as a linear layer.
    """

    ghost_covers = ()
    ghost_asks_axes = True
    ghost_in_graph = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's. Raises NotImplementedError for `adapter_names` in a private forward."""
        active = [name for name in self.active_adapters if name in self.lora_embedding_A]
        pairs = [(self.lora_embedding_A[name], self.lora_embedding_B[name]) for name in active]
        plain = self.disable_adapters or self.merged
        if plain or not self._ghost_active(*(parameter for pair in pairs for parameter in pair)):
            return super().forward(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise NotImplementedError(
                f"{self.ghost_label()!r}: adapter_names mixes adapters within a batch, which has no norm rule; use "
                "set_adapter"
            )
        result = self.base_layer(x, *args, **kwargs)
        embedding: Any = self.get_base_layer()
        dtype, scale, padding = result.dtype, self._get_embed_scale(), embedding.padding_idx
        for name, (a, b) in zip(active, pairs, strict=True):
            if a.requires_grad:
                low = ghost_embedding(self, x, a, padding, transposed=True)
            else:
                low = F.embedding(x, a.t(), padding)
            update = self._up(low, b) * self.scaling[name]
            result = result + (update if scale is None else update * scale.to(update.dtype))
        return result.to(dtype)

    def _up(self, low: Any, b: nn.Parameter) -> Any:
        if not b.requires_grad:
            return F.linear(low, b)
        if isinstance(low, SharedTensor):  # the ids have no batch, so the looked-up rows have none either
            assert self.ghost_tape is not None
            return SharedTensor(
                ghost_linear(self, low.rows, b, None), self.ghost_label(), self.ghost_tape.axes
            )
        return ghost_linear(self, low, b, None)

    def ghost_fused_rules(self) -> dict[nn.Parameter, str]:
        """The rule of A and B."""
        held = [*self.lora_embedding_A.values(), *self.lora_embedding_B.values()]
        return dict.fromkeys(held, "LoRA on an embedding: ghost norm")


class GhostPeftTrainableTokens(GhostModule, TrainableTokensLayer):
    """`peft.tuners.trainable_tokens`: trains some rows of a frozen table, as a lookup in a table of these rows."""

    ghost_covers = ()
    ghost_asks_axes = True
    ghost_in_graph = True

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's."""
        deltas = [self.trainable_tokens_delta[name] for name in active_adapters]
        if self.disable_adapters or self.merged or not self._ghost_active(*deltas):
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        self._check_overlapping_tokens(active_adapters)
        base: Any = self.base_layer
        scale = self._get_embed_scale()
        result = F.embedding(x, base.weight, base.padding_idx)
        for name, rows in zip(active_adapters, deltas, strict=True):
            tokens = self.token_indices[name]
            places = torch.full((base.num_embeddings,), -1, device=x.device)
            places[tokens] = torch.arange(len(tokens), device=x.device)
            place = places[x]
            trained = (place >= 0).unsqueeze(-1)
            padding = tokens.index(base.padding_idx) if base.padding_idx in tokens else None
            # Ids that are not trained look up row 0. The result is not used, so its gradient is zero.
            looked_up = (
                ghost_embedding(self, place.clamp(min=0), rows, padding)
                if rows.requires_grad
                else F.embedding(place.clamp(min=0), rows)
            )
            result = torch.where(trained, looked_up.to(result.dtype), result)
        return result if scale is None else result * scale.to(result.dtype)

    def ghost_fused_rules(self) -> dict[nn.Parameter, str]:
        """The rule of the trained rows."""
        return dict.fromkeys(self.trainable_tokens_delta.values(), "trainable tokens: ghost norm")
