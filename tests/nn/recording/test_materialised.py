"""Per-sample gradients materialised in the backward: the same norms and sums, when they are smaller and only then."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import (
    BiasRecord,
    Conv1dRecord,
    Conv2dRecord,
    DepthwiseConv1dRecord,
    EmbeddingRecord,
    ExpandedRecord,
    GhostLoRALinear,
    LinearRecord,
    LoRARecord,
    Record,
    Tape,
    attach,
    detach,
    swap,
)
from tests.nn.layers.test_conv import CONV1D, CONV2D, squares
from tests.nn.per_sample import check_private

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture
def always_materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tape, "_materialises", lambda _, record: record.entries() is not None)


def only_materialised(records: list[Record]) -> bool:
    rest = {type(r) for r in records} - {ExpandedRecord, BiasRecord, DepthwiseConv1dRecord, EmbeddingRecord}
    return not rest and any(type(r) is ExpandedRecord for r in records)


@pytest.mark.thinned(5)
@pytest.mark.usefixtures("always_materialised")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("args", "kwargs", "kind"), CONV1D + CONV2D)
def test_convolutions(args: Any, kwargs: Any, kind: type, dtype: torch.dtype) -> None:
    two_d = (args, kwargs, kind) in CONV2D
    layer = (nn.Conv2d if two_d else nn.Conv1d)(*args, **kwargs, dtype=dtype)
    x = torch.randn(3, args[0], *((7, 8) if two_d else (9,))).to(dtype)
    private = check_private(nn.Sequential(nn.Tanh(), layer, nn.Tanh()), squares, (x,))
    assert kind is DepthwiseConv1dRecord or only_materialised(private.records)


@pytest.mark.usefixtures("always_materialised")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (1, 5, 6), (4, 2, 3, 6)])
def test_linear_and_lora(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    adapted = GhostLoRALinear(5, 6, r=2, alpha=3, dtype=dtype)
    nn.init.normal_(adapted.lora_B)
    model = nn.Sequential(nn.Linear(6, 5, dtype=dtype), nn.Tanh(), adapted)
    private = check_private(model, squares, (torch.randn(shape).to(dtype),))
    assert only_materialised(private.records)
    assert len(private.records) == 4  # weight, bias, A, B


@pytest.mark.parametrize("materialised_first", [True, False])
def test_materialised_and_kept_records_of_one_weight_add_up(materialised_first: bool) -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    kept = LinearRecord("layer", weight, torch.randn(2, 5, 4), torch.randn(2, 5, 3))
    (materialised,) = kept.materialised()
    both = materialised.merge(kept) if materialised_first else kept.merge(materialised)
    exact = 4 * torch.einsum("btp,btd->bpd", kept.g, kept.x).double().square().sum((1, 2))
    assert ((both.norm_sq().double() / exact - 1).abs() < 5e-5).all()  # rounded up as a sum of any length is


def test_an_embedding_does_not_form() -> None:
    weight = nn.Parameter(torch.randn(7, 4))
    table = EmbeddingRecord("table", weight, torch.zeros(2, 5, dtype=torch.int64), torch.randn(2, 5, 4))
    (materialised,) = LinearRecord("head", weight, torch.randn(2, 5, 4), torch.randn(2, 5, 7)).materialised()
    with pytest.raises(TypeError, match=r"'table' .* and 'head' .* cannot be combined"):
        table.merge(materialised)
    with pytest.raises(NotImplementedError, match="EmbeddingRecord"):
        table.materialised()


def test_a_weight_used_twice_is_not_materialised() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    private = check_private(Twice(), squares, (torch.randn(3, 2, 60),))
    assert [type(r) for r in private.records if not isinstance(r, BiasRecord)] == [LinearRecord]


CHOICES: list[tuple[nn.Module, tuple[int, ...], bool, type]] = [
    # (layer, x, mixed, what is kept): materialised where 2 · 4 B · entries ≤ bytes of x and g; by default also where a
    # convolution has no more outputs p/groups than positions T'.
    (nn.Conv1d(2, 3, 3, bias=False), (4, 2, 50), False, ExpandedRecord),
    (nn.Conv1d(8, 8, 3, bias=False), (4, 8, 9), False, Conv1dRecord),
    (nn.Conv2d(2, 3, 3, bias=False), (4, 2, 9, 9), False, ExpandedRecord),
    (nn.Conv2d(2, 3, 3, bias=False), (4, 2, 3, 3), False, Conv2dRecord),
    (nn.Conv2d(2, 3, 3, bias=False), (4, 2, 4, 4), False, ExpandedRecord),
    (nn.Conv2d(2, 3, 3, bias=False), (4, 2, 4, 4), True, Conv2dRecord),
    (nn.Conv1d(8, 8, 3, groups=2, bias=False), (4, 8, 6), False, ExpandedRecord),
    (nn.Conv1d(8, 8, 3, groups=2, bias=False), (4, 8, 5), False, Conv1dRecord),
    (nn.Conv1d(2, 3, 1, bias=False), (4, 2, 50), False, LinearRecord),
    (nn.Conv1d(2, 3, 1, bias=False), (4, 2, 50), True, ExpandedRecord),
    (nn.Linear(6, 6, bias=False), (4, 50, 6), False, LinearRecord),
    (nn.Linear(6, 6, bias=False), (4, 50, 6), True, ExpandedRecord),
    (nn.Linear(6, 6, bias=False), (4, 6, 6), True, ExpandedRecord),
    (nn.Linear(6, 6, bias=False), (4, 5, 6), True, LinearRecord),
    (GhostLoRALinear(6, 6, r=2), (4, 50, 6), False, LoRARecord),
    (GhostLoRALinear(6, 6, r=2), (4, 50, 6), True, ExpandedRecord),
    (GhostLoRALinear(6, 6, r=2), (4, 2, 6), True, LoRARecord),
]


@pytest.mark.parametrize(("layer", "shape", "mixed", "kind"), CHOICES)
def test_materialised_when_that_is_worth_it(
    layer: nn.Module, shape: tuple[int, ...], mixed: bool, kind: type
) -> None:
    model = swap(nn.Sequential(copy.deepcopy(layer)))
    tape = attach(model, mixed=mixed)
    loss = model(torch.randn(shape)).square().sum()
    tape.open(shape[0])
    loss.backward()
    assert {type(r) for r in tape.close()} == {kind}
    detach(model)


def test_a_materialised_record_holds_less() -> None:
    layer = GhostLoRALinear(64, 64, r=4)
    held = {}
    for mixed in (False, True):
        tape = attach(layer, mixed=mixed)
        loss = layer(torch.randn(2, 100, 64)).square().sum()
        tape.open(2)
        loss.backward()
        held[mixed] = sum(r.held_bytes() for r in tape.close())
        detach(layer)
    assert held[True] == 4 * 2 * 4 * (64 + 64)
    assert held[False] == 4 * 2 * 100 * (64 + 64 + 4 + 4)


def test_catches_a_materialised_gradient_without_its_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tape, "_materialises", lambda _, record: record.entries() is not None)
    honest = LoRARecord.materialised

    def faulty(self: LoRARecord) -> tuple[ExpandedRecord, ...]:
        self.scaling = 1.0
        return honest(self)

    monkeypatch.setattr(LoRARecord, "materialised", faulty)
    layer = GhostLoRALinear(6, 5, r=2, alpha=3)
    nn.init.normal_(layer.lora_B)
    with pytest.raises(AssertionError):
        check_private(nn.Sequential(layer), squares, (torch.randn(4, 3, 6),))
