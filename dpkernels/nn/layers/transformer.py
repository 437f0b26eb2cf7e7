"""The ghosts of nn.TransformerEncoderLayer, TransformerDecoderLayer, TransformerEncoder and TransformerDecoder.

Their children (attention, linear layers, norms) record, and what they compute is torch's own forward. What the ghosts
add is where the batch is: torch's default layout is [T,B,d], and children record with the batch first. A layer swaps
the two at its boundary, and back around its attention, which knows `batch_first` itself. So whatever stands in a
child's place (an adapter, another norm, an activation with parameters) sees the batch first.
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
        """[B,T,d] -> [T,B,d] or [T,d], contiguous as torch's: the caller may view it."""
        return t.squeeze(0) if self._single else t.transpose(0, 1).contiguous()


class _GhostLayer(GhostModule):
    """What the encoder's and the decoder's layer share. They hold no parameters themselves."""

    ghost_covers = ()
    ghost_container = True
    self_attn: nn.MultiheadAttention

    def _change(self, x: Tensor) -> _BatchFirst | None:
        """How a private forward's sequences come to be batch first; None where they are, or it is not private."""
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
        """torch's attention block, which wants the layer's own layout."""
        assert isinstance(self, nn.Module)
        if not self._is_time_first() or not self._ghost_trained(*self.parameters()):
            return attention(*sequences, *rest)
        return attention(*(t.transpose(0, 1) for t in sequences), *rest).transpose(0, 1)


class GhostTransformerEncoderLayer(_GhostLayer, nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer: same constructor, same state_dict, same results, in both layouts.

    src [B,T,d] (batch_first) or [T,B,d], or [T,d], which is one example. torch takes its fused fast path only where
    none of the layer's own parameters is trained. Dropout's masks are drawn in the order of [B,T,d].
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
    """nn.TransformerDecoderLayer: same constructor, same state_dict, same results; layouts as the encoder layer's."""

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
    """What encoder and decoder share: the norm behind the layers gets the batch first, too."""

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
    """nn.TransformerEncoder: same constructor, same state_dict, same results; layouts as its layers'."""

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
    """nn.TransformerDecoder: same constructor, same state_dict, same results; layouts as its layers'."""

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
    """Why nothing of a Transformer layer or stack can be trained: a subclass whose children see [T,B,d]."""
    if not isinstance(module, (*_LAYERS, *_STACKS)) or isinstance(module, _GhostLayer | _GhostStack):
        return None
    if type(module) in (*_LAYERS, *_STACKS) or _is_batch_first(module):
        return None
    own = type(module).__name__
    torch_class = next(c for c in (*_LAYERS, *_STACKS) if isinstance(module, c)).__name__
    return (
        f"{own} is a subclass of nn.{torch_class} and batch_first=False: its layers see the batch as their second "
        f"dimension; build it with batch_first=True, or where its forward calls super().forward, "
        f"dpkernels.nn.register_swap({own}, dpkernels.nn.ghost_subclass({own}, dpkernels.nn.Ghost{torch_class}))"
    )


def _is_batch_first(module: nn.Module) -> bool:
    """Of a layer, or of a stack's first layer, as torch's own stacks ask."""
    layers: Any = module.layers if isinstance(module, _STACKS) else [module]
    return bool(layers[0].self_attn.batch_first)


@contextmanager
def _without(module: nn.Module, name: str) -> Iterator[None]:
    """Within it the child `name` of `module` is None."""
    child = module._modules[name]
    module._modules[name] = None
    try:
        yield
    finally:
        module._modules[name] = child
