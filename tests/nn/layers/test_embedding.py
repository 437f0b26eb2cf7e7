from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import EmbeddingRecord, GhostEmbedding, LinearRecord, attach, swap, uncovered
from tests.nn.per_sample import assert_same_module, check_private


def squares(model: nn.Module, ids: Tensor) -> Tensor:
    y = model(ids)
    y = y if y.dtype is torch.float64 else y.float()
    return (torch.tanh(y) ** 2).flatten(1).sum(1)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 2, 3)])
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_records_give_the_per_sample_gradients(
    dtype: torch.dtype, shape: tuple[int, ...], padding_idx: int | None
) -> None:
    plain = nn.Embedding(5, 3, padding_idx=padding_idx, dtype=dtype)
    nn.init.normal_(plain.weight)
    ghost = swap(copy.deepcopy(plain))
    assert type(ghost) is GhostEmbedding
    assert_same_module(plain, ghost)
    for index in (torch.int64, torch.int32):
        ids = torch.randint(0, 5, shape).to(index)
        assert torch.equal(plain(ids), ghost(ids))
        check_private(plain, squares, (ids,))


def test_a_padding_idx_set_from_the_end_is_read_as_torch_reads_it() -> None:
    plain = nn.Embedding(5, 3)
    plain.padding_idx = -1  # past the constructor, which would count it from the front
    check_private(plain, squares, (torch.tensor([[4, 1, 4], [0, 4, 2]]),))


@pytest.mark.parametrize("shape", [(), (4,), (0,), (4, 6), (4, 2, 3), (0, 2, 3)])
@pytest.mark.parametrize("strided", [False, True])
def test_ids_and_gradients_are_recorded_as_tokens(shape: tuple[int, ...], strided: bool) -> None:
    table = swap(nn.Embedding(5, 3))
    tape, batch = attach(table), shape[0] if shape else 1
    ids = (
        torch.randint(0, 5, (*shape, 2), dtype=torch.int32)[..., 0] if strided else torch.randint(0, 5, shape)
    )
    tape.open(batch)
    table(ids).sum().backward()
    (record,) = tape.close()
    assert isinstance(record, EmbeddingRecord)
    frames = math.prod(shape[1:])
    assert torch.equal(record.ids, ids.long().reshape(batch, frames))
    assert record.g.shape == (batch, frames, 3)


@pytest.mark.parametrize("keyword", ["max_norm", "sparse", "scale_grad_by_freq"])
def test_what_has_no_rule_is_named(keyword: str) -> None:
    (found,) = uncovered(swap(nn.Sequential(nn.Embedding(5, 3, **{keyword: True}))))
    assert found.name == "0.weight"
    assert keyword in found.reason


class Tied(nn.Module):
    """A language model's head: one matrix is the embedding and the output layer."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=padding_idx)
        self.head = nn.Linear(4, 7, bias=False)
        nn.init.normal_(self.embed.weight)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_tied_embedding_and_output_layer(padding_idx: int | None) -> None:
    private = check_private(Tied(padding_idx), squares, (torch.randint(0, 7, (4, 5)),))
    (record,) = private.records
    assert isinstance(record, LinearRecord)
    assert {"embed", "head"} <= set(record.layer.replace(" ", "").split("+"))


def test_tied_without_the_cross_terms_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a sum of squares over the two uses."""
    monkeypatch.setattr("dpkernels.nn.recording.tape.merge_records", list)
    with pytest.raises(AssertionError, match="norm"):
        check_private(Tied(), squares, (torch.randint(0, 7, (4, 5)),))


@pytest.mark.parametrize(("first", "second"), [(1, None), (None, 1), (1, 2), (1, 1)])
def test_two_embeddings_of_one_table(first: int | None, second: int | None) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(5, 3, padding_idx=first), nn.Embedding(5, 3, padding_idx=second)
            nn.init.normal_(self.a.weight)
            self.b.weight = self.a.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.a(ids) * self.b(ids.flip(1))

    check_private(Two(), squares, (torch.randint(0, 5, (4, 6)),))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).unsqueeze(0)
        return self.words(ids) * self.places(places)


def test_position_table_of_batch_one_is_looked_up_per_sample() -> None:
    private = check_private(Positions(), squares, (torch.randint(0, 7, (4, 6)),))
    assert all(isinstance(r, EmbeddingRecord) and r.batch_size == 4 for r in private.records)


SHARED: dict[str, Any] = {
    "[T]": lambda p, ids: p(torch.arange(ids.shape[1])),
    "row of [1,T]": lambda p, ids: p(torch.arange(ids.shape[1])[None])[0],
    "repeated": lambda p, ids: p(torch.arange(ids.shape[1])[None]).repeat(len(ids), 1, 1),
    "joined": lambda p, ids: torch.cat([p(torch.arange(ids.shape[1])[None])] * len(ids)),
    "expanded": lambda p, ids: p(torch.arange(ids.shape[1])[None]).expand(len(ids), -1, -1),
    "relative": lambda p, ids: p((torch.arange(6)[:, None] - torch.arange(6)) % 6).mean(1)[: ids.shape[1]],
}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("batch", range(1, 8))
@pytest.mark.parametrize("use", SHARED.values(), ids=SHARED.keys())
def test_ids_that_examples_share_at_every_batch_size(use: Any, batch: int) -> None:
    class Shared(Positions):
        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids) * use(self.places, ids)

    check_private(Shared().double(), squares, (torch.randint(0, 7, (batch, 6)),))
