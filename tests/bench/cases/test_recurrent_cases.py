"""The recurrent cases: Opacus's own layers stand in for torch's with the same weights, and every contender is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.cases.models import CASES, trained
from bench.contenders import opacus, registry
from bench.harness.checker import OK, WRONG, check
from bench.names import NON_PRIVATE, OPACUS_GHOST, OPACUS_HOOKS, ours

NAMES = (NON_PRIVATE, ours(), OPACUS_HOOKS, OPACUS_GHOST)


@pytest.mark.parametrize("name", ["lstm-layer", "gru-layer"])
def test_every_contender_is_right(name: str) -> None:
    case = replace(CASES[name], width=8)
    factories = {key: factory for key, factory in registry().items() if key in NAMES}
    found = check(factories, case, case.model(6), case.batch(3, 6))
    assert {key: verdict.status for key, verdict in found.items()} == dict.fromkeys(NAMES, OK)


def test_opacus_layers_hold_the_same_parameters() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True), "b": nn.Linear(3, 3)})
    x, names = torch.randn(2, 5, 3), set(trained(model))
    want = model["a"](x)[0]
    replaced = opacus.with_opacus_layers(model)
    assert type(replaced["a"]).__name__ == "DPLSTM"
    assert set(trained(replaced)) == names
    torch.testing.assert_close(replaced["a"](x)[0], want)


def test_planted_other_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opacus.DPGRU, "load_state_dict", lambda self, state: None)
    case = replace(CASES["gru-layer"], width=8)
    factories = {OPACUS_HOOKS: registry()[OPACUS_HOOKS]}
    found = check(factories, case, case.model(6), case.batch(3, 6))
    assert found[OPACUS_HOOKS].status == WRONG
