"""The attention case: Opacus's own layer stands in for torch's with the same weights, and every contender is right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.cases.models import CASES
from bench.contenders import opacus, registry
from bench.harness.checker import OK, WRONG, check
from bench.names import NON_PRIVATE, OPACUS_GHOST, OPACUS_HOOKS, ours

NAMES = (NON_PRIVATE, ours(), OPACUS_HOOKS, OPACUS_GHOST)


def statuses(*names: str) -> dict[str, str]:
    case = replace(CASES["attention-layer"], width=16)
    factories = {name: factory for name, factory in registry().items() if name in names}
    return {
        name: verdict.status
        for name, verdict in check(factories, case, case.model(6), case.batch(3, 6)).items()
    }


def test_every_contender_is_right() -> None:
    assert statuses(*NAMES) == dict.fromkeys(NAMES, OK)


def test_opacus_layer_has_torchs_weights_and_values() -> None:
    case = replace(CASES["attention-layer"], width=16)
    model: Any = case.model(6)
    x = torch.randn(3, 6, 16)
    want = model(x).logits
    replaced = opacus.with_opacus_layers(model)
    assert type(replaced.layer).__name__ == "DPMultiheadAttention"
    torch.testing.assert_close(replaced(x).logits, want)


def test_planted_other_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opacus.DPMultiheadAttention, "load_state_dict", lambda self, state: None)
    assert statuses(OPACUS_HOOKS) == {OPACUS_HOOKS: WRONG}
