"""Recurrent layers in an engine: packed sequences with dropout, in every strategy, and the self-check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

import dpkernels
from dpkernels.nn import attach, swap
from dpkernels.privacy.keywords import STRATEGIES
from tests.nn.layers.test_recurrent import arguments
from tests.slow import covering


class Classifier(nn.Module):
    """The last states of two packed layers, batch second, in the order of the examples."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.layers = kind(6, 6, 2, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.table(ids).transpose(0, 1)
        _, hidden = self.layers(pack_padded_sequence(x, lengths, enforce_sorted=False))
        last = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(torch.cat((last[-2], last[-1]), 1))


def losses(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return F.cross_entropy(model(*batch[:2]), batch[2], reduction="none")


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("strategy", "kind"), covering(STRATEGIES, [nn.LSTM, nn.GRU, nn.RNN], together=1))
def test_packed_layers_train_and_pass_the_self_check(kind: type[nn.RNNBase], strategy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ids, lengths, labels = (
        torch.randint(low, high, shape, generator=generator)
        for low, high, shape in ((0, 20, (12, 5)), (1, 6, (12,)), (0, 3, (12,)))
    )
    engine, model = dpkernels.PrivacyEngine(), Classifier(kind)
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(ids, lengths, labels), batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        strategy=strategy,
        physical_batch_size=4,
    )
    before = [p.detach().clone() for p in private.parameters()]
    engine.self_check(losses, (ids[:4], lengths[:4], labels[:4]))
    for logical_batch in loader:
        optimizer.zero_grad()
        for batch in logical_batch:
            optimizer.backward(losses(private, batch))
        optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(private.parameters(), before, strict=True))


@pytest.mark.parametrize("packed", ["sorted", "any order"])
def test_dropout_masks_of_a_packed_example_do_not_know_the_rest_of_its_batch(packed: str) -> None:
    layer: Any = swap(nn.GRU(3, 4, 2, dropout=0.5, batch_first=True))
    attach(layer)
    x, outs = torch.randn(3, 6, 3), []
    for lengths in ([6, 4, 2], [6, 4, 3]) if packed == "sorted" else ([2, 4, 6], [5, 4, 1], [1, 4, 5]):
        torch.manual_seed(5)
        sequence, _ = layer(*arguments(layer, packed, x, torch.tensor(lengths), ()))
        outs.append(pad_packed_sequence(sequence, batch_first=True)[0][1, :4])
    assert all(torch.allclose(out, outs[0], atol=1e-6) for out in outs)
    torch.manual_seed(6)
    other, _ = layer(*arguments(layer, packed, x, torch.tensor(lengths), ()))
    assert not torch.allclose(pad_packed_sequence(other, batch_first=True)[0][1, :4], outs[0])
    many: Any = swap(nn.RNN(1, 50, 2, dropout=0.5, nonlinearity="relu", bias=False))
    for weight in many.parameters():
        nn.init.eye_(weight) if weight.shape[0] == weight.shape[1] else nn.init.ones_(weight)
    attach(many)
    kept = many(pack_padded_sequence(torch.ones(1, 40, 1), torch.ones(40)))[0].data
    assert 0.45 < float((kept == 2).float().mean()) < 0.55
    assert bool(((kept == 0) | (kept == 2)).all()), "a kept entry is scaled by 1/(1 - p)"
