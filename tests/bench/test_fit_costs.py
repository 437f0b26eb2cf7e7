"""The fit of the cost model: known constants are found, none is negative, and every constant is measured."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from bench import fit_costs
from bench.fit_costs import Part, errors, fit, linear_parts, lora_parts
from dpkernels.ops.costs import Costs


def test_constants_are_found() -> None:
    factors = [{"a": 1.0, "b": 5.0}, {"a": 4.0, "b": 1.0}, {"a": 2.0, "b": -3.0}]
    parts = [Part(2.0 * f["a"] + 3.0 * f["b"], f, scale=10.0) for f in factors]
    assert fit(parts) == pytest.approx({"a": 2.0, "b": 3.0})
    assert errors(parts, fit(parts)) == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)
    assert errors(parts, {"a": 3.0, "b": 3.0}) == pytest.approx([0.1, 0.4, 0.2])


def test_no_constant_is_negative() -> None:
    """The least squares alone give a = −1."""
    parts = [
        Part(4.0, {"a": 1.0, "b": 1.0}),
        Part(3.0, {"a": 2.0, "b": 1.0}),
        Part(2.0, {"a": 3.0, "b": 1.0}),
    ]
    found = fit(parts)
    assert found["a"] == 0.0
    assert found["b"] > 0.0


def test_every_constant_of_the_model_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_costs, "CACHES", 1)
    formulas = [linear_parts(4, 6, 3, 1), linear_parts(4, 6, 30, 1), lora_parts(6, 4, 2, 5, 1)]
    parts = [part for found in formulas for some in found.values() for part in some]
    assert {name for part in parts for name in part.factors} == {field.name for field in fields(Costs)}
    assert all(part.unit > 0 for part in parts)


def test_the_constants_are_written_beside_other_backends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "costs.json"
    file.write_text('{"other": {"machine": "", "nanoseconds": {}}}')
    constants = {field.name: 1.0 for field in fields(Costs)}
    monkeypatch.setattr(fit_costs, "FILE", file)
    monkeypatch.setattr(fit_costs, "measure", lambda *_: {"all": [Part(1.0, constants)]})
    monkeypatch.setattr(fit_costs, "fit", lambda _: constants)
    assert fit_costs.main(["--write"]) == 0
    written = json.loads(file.read_text())
    assert len(written) == 2
    assert written[next(name for name in written if name != "other")]["nanoseconds"] == constants
    assert "materialised from" in capsys.readouterr().out
