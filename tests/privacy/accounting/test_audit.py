"""Claims about a run are held against its ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels.privacy import ClaimError, LedgerError, PrivacyEngine, audit_ledger, read_ledger

CLAIMS: dict[str, Any] = {
    "steps": 2,
    "noise_multiplier": 4.0,
    "sample_rate": 0.25,
    "dataset_size": 40,
    "max_batch_size": None,
    "unit": "example",
    "delta": 1e-3,
    "accountant": "rdp",
}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "ledger.jsonl"
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(3, 1)
    engine = PrivacyEngine(accountant="rdp", ledger=path)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(40, 3)), batch_size=10),
        noise_multiplier=4.0,
        max_grad_norm=1.0,
        steps=2,
    )
    for logical_batch in loader:
        for (x,) in logical_batch:
            optimizer.backward(model(x).square().sum(1))
        optimizer.step()
        optimizer.zero_grad()
    engine.close()
    return path


def claims(ledger: Path, **changes: Any) -> dict[str, Any]:
    (run,) = read_ledger(ledger).runs
    return {**CLAIMS, "epsilon": 1e3, "sample_rate": run.mechanism.sample_rate, **changes}


def test_what_is_true_passes_and_epsilon_is_found_anew(ledger: Path) -> None:
    found = audit_ledger(ledger, claims(ledger))
    assert (found.steps, found.runs) == (2, 1)
    assert found.epsilon is not None
    assert audit_ledger(ledger, claims(ledger, epsilon=found.epsilon)).epsilon == found.epsilon
    with pytest.raises(ClaimError, match=r"run\.json says epsilon=.*, the ledger's steps spend"):
        audit_ledger(ledger, claims(ledger, epsilon=0.9 * found.epsilon), "run.json")


@pytest.mark.parametrize(
    "wrong", [{"steps": 1}, {"noise_multiplier": 5.0}, {"unit": "speaker"}, {"dataset_size": 41}]
)
def test_what_is_false_is_refused_by_name(ledger: Path, wrong: dict[str, Any]) -> None:
    (key,) = wrong
    with pytest.raises(ClaimError, match=f"the record says privacy.{key}="):
        audit_ledger(ledger, claims(ledger, **wrong))


def test_a_ledger_that_is_not_there_or_was_edited_is_refused(ledger: Path, tmp_path: Path) -> None:
    with pytest.raises(ClaimError, match="is missing"):
        audit_ledger(tmp_path / "none.jsonl", claims(ledger))
    edited = tmp_path / "edited.jsonl"
    edited.write_text(ledger.read_text().replace("4.0", "9.0"))
    with pytest.raises(LedgerError):
        audit_ledger(edited, claims(ledger, noise_multiplier=9.0))
