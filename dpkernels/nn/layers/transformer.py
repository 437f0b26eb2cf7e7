"""The ghost classes of nn.TransformerEncoderLayer, TransformerDecoderLayer, TransformerEncoder and TransformerDecoder.

They run torch's own forward, and their children (attention, linear layers, norms) record. The ghost classes only move
the batch to the front, since torch's default layout is [T,B,d] and children record with the batch first. A layer
transposes its sequences at its boundary, and transposes them back around its attention, which handles `batch_first`
itself. So every other child (an adapter, another norm, an activation with parameters) gets the batch first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dpkernels.nn.recording.module import GhostModule


class _BatchFirst:
    """Sequences [T,B,d] (or [T,d], which is one example) as [B,T,d], and back."""

    def __init__(self, single: bool) -> None:
        self._single = single

    def sequence(self, t: Tensor) -> Tensor:
        """[T,B,d] or [T,d] -> [B,T,d]."""
        return t.unsqueeze(0) if self._single else t.transpose(0, 1)

    def padding(self, mask: Tensor | None) -> Tensor | None:
        """A key padding mask [B,T] or [T] -> [B,T]."""
        return mask.unsqueeze(0) if self._single and mask is not None else mask

    def back(self, t: Tensor) -> Tensor:
        """[B,T,d] -> [T,B,d] or [T,d], contiguous like torch's output, so that the caller can view it."""
        return t.squeeze(0) if self._single else t.transpose(0, 1).contiguous()


class _GhostLayer(GhostModule):
    """Base of the encoder layer and the decoder layer, which hold no parameters themselves."""

    ghost_covers = ()
    ghost_container = True
    self_attn: nn.MultiheadAttention

    def _change(self, x: Tensor) -> _BatchFirst | None:
        """The change of layout for a private forward; None if the sequences are batch first or it is not private."""
        assert isinstance(self, nn.Module)
        single = x.dim() == 2
        if not (single or self._is_time_first()) or not self._ghost_trained(*self.parameters()):
            return None
        return _BatchFirst(single)

    def _is_time_first(self) -> bool:
        return not self.self_attn.batch_first

    def _around(
        self, attention: Callable[..., Tensor], sequences: tuple[Tensor, ...], *rest: object
    ) -> Tensor:
        """Call torch's attention block, which takes the layer's own layout."""
        assert isinstance(self, nn.Module)
        if not self._is_time_first() or not self._ghost_trained(*self.parameters()):
            return attention(*sequences, *rest)
        return attention(*(t.transpose(0, 1) for t in sequences), *rest).transpose(0, 1)


class GhostTransformerEncoderLayer(_GhostLayer, nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer: same constructor, same state_dict, same results, in both layouts.

    src [B,T,d] (batch_first) or [T,B,d], or [T,d], which is one example. torch takes its fused fast path only if no
    parameter of the layer is trained. Dropout masks are drawn in the order of [B,T,d].
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As nn.TransformerEncoderLayer's."""
        change = self._change(src)
        if change is None:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        padding = change.padding(src_key_padding_mask)
        return change.back(super().forward(change.sequence(src), src_mask, padding, is_causal))

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        return self._around(super()._sa_block, (x,), attn_mask, key_padding_mask, is_causal)


class GhostTransformerDecoderLayer(_GhostLayer, nn.TransformerDecoderLayer):
    """nn.TransformerDecoderLayer: same constructor, same state_dict, same results; layouts as the encoder layer."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As nn.TransformerDecoderLayer's."""
        change = self._change(tgt)
        forward: Callable[..., Tensor] = super().forward
        masks, paddings = (tgt_mask, memory_mask), (tgt_key_padding_mask, memory_key_padding_mask)
        causal = (tgt_is_causal, memory_is_causal)
        if change is None:
            return forward(tgt, memory, *masks, *paddings, *causal)
        sequences = (change.sequence(tgt), change.sequence(memory))
        return change.back(forward(*sequences, *masks, *map(change.padding, paddings), *causal))

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        return self._around(super()._sa_block, (x,), attn_mask, key_padding_mask, is_causal)

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
    ) -> Tensor:
        return self._around(super()._mha_block, (x, mem), attn_mask, key_padding_mask, is_causal)


class _GhostStack(GhostModule):
    """Base of encoder and decoder: it passes the batch first to the norm after the layers."""

    ghost_covers = ()
    ghost_container = True
    norm: nn.Module | None

    def _then_norm(self, forward: Callable[..., Tensor], *args: object) -> Tensor:
        assert isinstance(self, nn.Module)
        norm = self.norm
        if norm is None or not self._ghost_trained(*norm.parameters()):
            return forward(*args)
        with _without(self, "norm"):
            y = forward(*args)
        single = y.dim() == 2
        if not single and _is_batch_first(self):
            normalised: Tensor = norm(y)
            return normalised
        change = _BatchFirst(single)
        return change.back(norm(change.sequence(y)))


class GhostTransformerEncoder(_GhostStack, nn.TransformerEncoder):
    """nn.TransformerEncoder: same constructor, same state_dict, same results; same layouts as its layers."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As nn.TransformerEncoder's."""
        return self._then_norm(super().forward, src, mask, src_key_padding_mask, is_causal)


class GhostTransformerDecoder(_GhostStack, nn.TransformerDecoder):
    """nn.TransformerDecoder: same constructor, same state_dict, same results; same layouts as its layers."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As nn.TransformerDecoder's."""
        paddings = (tgt_key_padding_mask, memory_key_padding_mask)
        masks = (tgt_mask, memory_mask, *paddings)
        return self._then_norm(super().forward, tgt, memory, *masks, tgt_is_causal, memory_is_causal)


_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)


def transformer_refusal(module: nn.Module) -> str | None:
    """Why no part of a Transformer layer or stack can be trained: it is a subclass whose children get [T,B,d]."""
    if not isinstance(module, (*_LAYERS, *_STACKS)) or isinstance(module, _GhostLayer | _GhostStack):
        return None
    if type(module) in (*_LAYERS, *_STACKS) or _is_batch_first(module):
        return None
    name = type(module).__name__
    torch_class = next(c for c in (*_LAYERS, *_STACKS) if isinstance(module, c)).__name__
    return (
        f"{name} is a subclass of nn.{torch_class} with batch_first=False, so its layers get the batch as their second "
        f"dimension; build it with batch_first=True, or if its forward calls super().forward, call "
        f"dpkernels.nn.register_swap({name}, dpkernels.nn.ghost_subclass({name}, dpkernels.nn.Ghost{torch_class}))"
    )


def _is_batch_first(module: nn.Module) -> bool:
    """Whether a layer, or the first layer of a stack, is batch_first; torch's stacks check the same."""
    layers: Any = module.layers if isinstance(module, _STACKS) else [module]
    return bool(layers[0].self_attn.batch_first)


@contextmanager
def _without(module: nn.Module, name: str) -> Iterator[None]:
    """Set the child `name` of `module` to None within this context."""
    child = module._modules[name]
    module._modules[name] = None
    try:
        yield
    finally:
        module._modules[name] = child
