"""The ghosts of torch's Transformer layers: both layouts, values as torch's, each example's own gradient."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import (
    GhostTransformerEncoderLayer,
    attach,
    detach,
    ghost_subclass,
    register_swap,
    swap,
    uncovered,
    unswap,
)
from dpkernels.nn.convert.swapping import _ORIGINALS, _SWAPS
from tests.nn.per_sample import assert_same_module, check_private

T, S, D = 4, 5, 8
OPTIONS: dict[str, Any] = {"d_model": D, "nhead": 2, "dim_feedforward": 6, "dropout": 0.0}


def encoder_layer(**more: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(**OPTIONS, **more)


def decoder_layer(**more: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(**OPTIONS, **more)


def encoder(norm: nn.Module | None = None, **more: Any) -> nn.Module:
    layer: Any = encoder_layer(**more)
    return nn.TransformerEncoder(layer, 2, norm=norm or nn.LayerNorm(D), enable_nested_tensor=False)


def decoder(**more: Any) -> nn.Module:
    layer: Any = decoder_layer(**more)
    return nn.TransformerDecoder(layer, 2, norm=nn.RMSNorm(D))


def transformer(**more: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that it makes no nested tensors of [T,B,d]
        return nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **OPTIONS, **more)


def randomised(module: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module.to(dtype)


class Batched(nn.Module):
    """Batches [B,T,d] through a module of either layout, with a causal mask and padding."""

    def __init__(self, module: Any, batch_first: bool, masked: bool = True) -> None:
        super().__init__()
        self.module, self.batch_first, self.masked = module, batch_first, masked

    def forward(self, *sequences: Tensor) -> Tensor:
        x = sequences[0]
        masks: dict[str, Any] = {}
        if self.masked:
            causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            padding = (torch.arange(x.shape[1]) >= x.shape[1] - 1).to(x.dtype).mul(-3).expand(len(x), -1)
            if isinstance(self.module, nn.TransformerEncoder):
                masks = {"mask": causal, "src_key_padding_mask": padding}
            elif isinstance(self.module, nn.TransformerEncoderLayer):
                masks = {"src_mask": causal, "src_key_padding_mask": padding, "is_causal": True}
            elif isinstance(self.module, nn.Transformer):
                masks = {
                    "src_mask": causal,
                    "src_key_padding_mask": padding,
                    "memory_key_padding_mask": padding,
                }
            else:
                masks = {"tgt_mask": causal, "tgt_is_causal": True, "tgt_key_padding_mask": padding}
        given = [torch.tanh(t) if self.batch_first else torch.tanh(t).transpose(0, 1) for t in sequences]
        y = self.module(*given, **masks)
        return y if self.batch_first else y.transpose(0, 1)


def loss(model: nn.Module, *batch: Tensor) -> Tensor:
    y = model(*batch)
    y = y if y.dtype is torch.float64 else y.float()
    return (torch.tanh(y) + 0.3 * y**2).flatten(1).sum(1)


MODULES: dict[str, tuple[Any, int]] = {
    "encoder layer": (encoder_layer, 1),
    "encoder layer, norm first": (
        lambda **more: encoder_layer(norm_first=True, activation="gelu", **more),
        1,
    ),
    "encoder layer, no bias": (lambda **more: encoder_layer(bias=False, **more), 1),
    "decoder layer": (decoder_layer, 2),
    "decoder layer, norm first": (lambda **more: decoder_layer(norm_first=True, **more), 2),
    "encoder": (encoder, 1),
    "decoder": (decoder, 2),
    "transformer": (transformer, 2),
}


def inputs(count: int, batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, n, D, dtype=dtype) for n in (T, S)[:count])


@pytest.mark.thinned(5)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_each_examples_own(name: str, batch_first: bool) -> None:
    make, count = MODULES[name]
    module = randomised(make(batch_first=batch_first))
    check_private(Batched(module, batch_first), loss, inputs(count, 3))


@pytest.mark.parametrize("name", ["encoder", "decoder", "transformer"])
@pytest.mark.parametrize("batch", [T, S])
def test_a_batch_as_large_as_the_sequences(name: str, batch: int) -> None:
    """The layout is known, not read off sizes: B = T and B = S are as any other."""
    make, count = MODULES[name]
    check_private(Batched(randomised(make(batch_first=False)), False), loss, inputs(count, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_other_dtypes(dtype: torch.dtype) -> None:
    for make, count in (MODULES["encoder"], MODULES["decoder layer"]):
        module = randomised(make(batch_first=False), dtype)
        check_private(Batched(module, False, masked=False), loss, inputs(count, 3, dtype))


@pytest.mark.thinned(5)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_values_are_torchs(name: str, batch_first: bool, training: bool) -> None:
    make, count = MODULES[name]
    module = randomised(make(batch_first=batch_first))
    plain = Batched(module, batch_first).train(training)
    ghost = swap(copy.deepcopy(plain))
    assert_same_module(plain, ghost)
    batch = inputs(count, 3)
    attach(ghost)
    torch.testing.assert_close(ghost(*batch), plain(*batch), rtol=1e-11, atol=1e-12)
    with torch.no_grad():  # torch's fast path where it has one
        assert torch.equal(ghost(*batch), plain(*batch))
    y = ghost.module(*(t if batch_first else t.transpose(0, 1) for t in batch))
    assert y.is_contiguous()  # as torch's
    detach(ghost)
    assert [type(m) for m in unswap(ghost).modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ["encoder layer", "decoder layer", "encoder", "decoder"])
def test_a_sequence_without_a_batch_is_one_example(name: str, batch_first: bool) -> None:
    make, count = MODULES[name]
    plain = randomised(make(batch_first=batch_first))
    ghost = swap(copy.deepcopy(plain))
    tape = attach(ghost)
    sequences = [torch.randn(n, D, dtype=torch.float64) for n in (T, S)[:count]]
    key = "tgt_key_padding_mask" if count == 2 else "src_key_padding_mask"
    padding = {key: torch.arange(T) >= T - 1}
    y = ghost(*sequences, **padding)
    torch.testing.assert_close(y, plain(*sequences, **padding), rtol=1e-11, atol=1e-12)
    tape.open(1)
    y.sum().backward()
    assert {r.batch_size for r in tape.close()} == {1}


@pytest.mark.parametrize("trained", ["norm", "linear1", "self_attn.in_proj", "layers.1"])
@pytest.mark.parametrize("training", [True, False])
def test_partly_frozen(trained: str, training: bool) -> None:
    module = randomised(encoder(batch_first=False)).train(training)
    for name, p in module.named_parameters():
        p.requires_grad_(name.startswith(trained) if trained in ("norm", "layers.1") else trained in name)
    check_private(Batched(module, False), loss, inputs(1, 3))


def test_what_stands_in_a_childs_place_sees_the_batch_first() -> None:
    """Parameters that are expanded per sample (PReLU), and a norm of another kind."""
    module: Any = encoder_layer(batch_first=False)
    module.activation, module.norm1 = nn.PReLU(), nn.RMSNorm(D)
    check_private(Batched(randomised(module), False), loss, inputs(1, T))


def test_dropout_is_torchs_rate_and_is_off_in_evaluation() -> None:
    module = swap(randomised(nn.TransformerEncoderLayer(D, 2, 6, dropout=0.5)))
    attach(module)
    x = torch.randn(T, 3, D, dtype=torch.float64)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_do_not_reach_a_trained_layer() -> None:
    """torch makes them in evaluation where its first layer is frozen; its own trained layers fail on them, too."""
    layer: Any = encoder_layer(batch_first=True)
    module = nn.Sequential(nn.TransformerEncoder(layer, 2)).eval()
    module[0].layers[0].requires_grad_(False)
    x, padding = torch.randn(2, T, D), torch.tensor([[False] * T, [False] * (T - 1) + [True]])
    with pytest.raises(AssertionError, match="NestedTensor"):
        module[0](x, src_key_padding_mask=padding)
    attach(swap(module))
    with pytest.raises(
        TypeError, match=r"'0\.layers\.1\.self_attn': got nested tensors.*enable_nested_tensor=False"
    ):
        module[0](x, src_key_padding_mask=padding)
    module[0].use_nested_tensor = False
    assert module[0](x, src_key_padding_mask=padding).shape == x.shape


class OwnLayer(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(self.twice(src), *args, **kwargs)

    def twice(self, src: Tensor) -> Tensor:
        return 2 * src


def test_a_subclass_with_the_batch_second_is_refused_until_it_has_a_rule() -> None:
    assert uncovered(swap(OwnLayer(**OPTIONS, batch_first=True))) == []
    own = OwnLayer(**OPTIONS)
    found = uncovered(swap(own))
    assert {u.name for u in found} == {name for name, _ in own.named_parameters()}
    assert all("batch_first=True" in u.reason and "GhostTransformerEncoderLayer" in u.reason for u in found)
    own.requires_grad_(False)
    assert uncovered(own) == []
    ghost = ghost_subclass(OwnLayer, GhostTransformerEncoderLayer)
    register_swap(OwnLayer, ghost)
    try:
        check_private(Batched(randomised(OwnLayer(**OPTIONS)), False), loss, inputs(1, 3))
    finally:
        del _SWAPS[OwnLayer], _ORIGINALS[ghost]
