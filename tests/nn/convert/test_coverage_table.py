"""dpkernels.coverage: what make_private would do with each trained parameter, of a model that stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dpkernels
import dpkernels.nn
from dpkernels.nn import attach, detach, swap
from tests.nn.convert.test_copying import Gain, OwnConv


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


class Holder(nn.Module):
    """It only holds the weight beside the layer that uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(300, 300)
        self.alias = self.layer.weight


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(300, 300))


def with_a_frozen_part() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), Wide())
    model[1].requires_grad_(False)
    return model


ZOO: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 2, 3), nn.LayerNorm(4), nn.PReLU()),
    "raw": Gain,
    "own": lambda: nn.Sequential(OwnConv(4, 4, 3)),
    "tied": Tied,
    "held": Holder,
    "wide": lambda: nn.Sequential(nn.Linear(4, 4), Wide()),
    "frozen": with_a_frozen_part,
    "attention": lambda: nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval()),
    "embedding": lambda: nn.Sequential(nn.Embedding(9, 4, max_norm=1.0)),
    "list": lambda: nn.Sequential(nn.ParameterList([nn.Parameter(torch.ones(2))])),
    "on meta": lambda: nn.Sequential(nn.Linear(4096, 4096, device="meta")),
}


@pytest.mark.parametrize("kind", ZOO)
def test_it_says_what_attach_does_and_leaves_the_model_as_it_is(kind: str) -> None:
    model = ZOO[kind]()
    before = [(m, type(m), dict(vars(m)), dict(m._parameters)) for m in model.modules()]
    table = dpkernels.coverage(model)
    for module, was, state, parameters in before:
        assert type(module) is was
        assert vars(module) == state
        assert all(module._parameters[name] is p for name, p in parameters.items())
    assert [row.name for row in table.rows] == [n for n, p in model.named_parameters() if p.requires_grad]
    assert sum(row.entries for row in table.rows) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert all((row.rule is None) != (row.refusal is None) for row in table.rows)
    swap(model)
    if table.complete:
        attach(model)
        assert dpkernels.coverage(model) == table  # of a private model, too
        assert any(
            m.ghost_tape is not None for m in model.modules() if isinstance(m, dpkernels.nn.GhostModule)
        )
        detach(model)
    else:
        with pytest.raises(ValueError, match="no per-sample norm rule") as raised:
            attach(model)
        for row in table.refused:
            assert f"\n  {row.name!r} (" in str(raised.value)
            assert f"{row.module_type}): {row.refusal}" in str(raised.value)
            assert row.refusal in str(table)
        refused = {row.name for row in table.refused}
        assert refused <= {item.name for item in dpkernels.nn.uncovered(model)}
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and name not in refused)
        assert not dpkernels.nn.uncovered(model)


def test_the_table() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), Gain(), Wide(), nn.BatchNorm1d(8))
    model[4].requires_grad_(False)
    assert str(dpkernels.coverage(model)).splitlines() == [
        "trained parameter  entries  rule",
        "0.weight             2,048  Linear: ghost norm",
        "0.bias                  32  Linear: per-sample gradient (B × 32 entries)",
        "1.weight                32  LayerNorm: per-sample gradient (B × 32 entries)",
        "1.bias                  32  LayerNorm: per-sample gradient (B × 32 entries)",
        "2.gain                   4  Gain: per-sample expansion (B × 4 entries)",
        "2.layer.weight          16  Linear: ghost norm",
        "2.layer.bias             4  Linear: per-sample gradient (B × 4 entries)",
        "3.table             90,000  REFUSED: it has no rule, and its 90,000 elements exceed the limit of 65,536 for "
        "per-sample expansion; freeze it, or write a rule (dpkernels.nn.register_swap)",
        "7 of 8 trained parameters have a rule; 90,000 of 92,168 entries are refused",
        "4: batch norm in training mode mixes the samples of a batch",
        "dpkernels.fix(model) freezes the batch norms' statistics, or replaces them",
    ]
    assert not dpkernels.coverage(model).complete
    assert not dpkernels.coverage(nn.Sequential(model[0], model[4])).complete
    assert dpkernels.coverage(model[0]).complete
    nothing = dpkernels.coverage(model[4])
    assert not nothing.complete
    assert "no parameter is trained" in str(nothing)


def test_tied_parameters_are_one_row_with_both_rules() -> None:
    rows = {row.name: str(row) for row in dpkernels.coverage(Tied()).rows}
    assert rows["embed.weight"] == "Embedding: ghost norm + Linear: ghost norm"
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "norm": nn.Embedding(4, 4, max_norm=1.0)})
    model["norm"].weight = model["layer"].weight
    refused = dpkernels.coverage(model).refused
    assert [row.name for row in refused] == ["layer.weight"]
    assert refused[0].module_type == "Embedding"
    assert str(refused[0]).startswith("REFUSED: as norm.weight: max_norm=1.0")


def test_what_is_said_of_gradients_is_what_is_recorded() -> None:
    """ "per-sample gradient" where the record is one, of that many entries; "ghost norm" where it is none."""
    model = nn.Sequential(
        nn.Linear(64, 64), nn.LayerNorm(64), nn.RMSNorm(64), nn.BatchNorm1d(64).eval(), nn.PReLU()
    )
    swap(dpkernels.nn.freeze_batch_norm(model))
    table = {row.name: str(row) for row in dpkernels.coverage(model).rows}
    names = {p: n for n, p in model.named_parameters()}
    tape = attach(model)
    losses = model(torch.randn(3, 64)).sum(1)
    tape.open(3)
    losses.sum().backward()
    records = tape.close()
    assert {names[p] for record in records for p in record.parameters} == set(table)
    for record in records:
        for parameter in record.parameters:
            materialised = isinstance(record, dpkernels.nn.ExpandedRecord)
            assert materialised == (f"(B × {parameter.numel()} entries)" in table[names[parameter]]), names[
                parameter
            ]


def test_the_older_name_of_uncovered_is_accepted() -> None:
    model = swap(nn.Sequential(Wide()))
    with pytest.warns(DeprecationWarning, match="uncovered"):
        assert dpkernels.nn.coverage(model) == dpkernels.nn.uncovered(model)
    with pytest.raises(TypeError, match=r"coverage: .*got int"):
        dpkernels.coverage(3)  # type: ignore[arg-type]
