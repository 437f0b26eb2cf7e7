"""privacy.md 5: each layer clipped on its own, and the sensitivity of their sum."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpkernels.privacy import setup
from dpkernels.privacy.step.clipping import PerLayerClipNorms, per_layer_clip_norms, rounding_slack
from tests.privacy.private_run import Net, Run, losses_of, private_run
from tests.privacy.strategy_models import (
    BOUND,
    INDICES,
    Exploding,
    backward_alone,
    excess,
    gradients_one_by_one,
    one,
)


def saturated() -> Run:
    """Every layer's norm far below every gradient's: an example adds all that it may."""
    return private_run(sigma=0, clip=1e-4, strategy="per_layer")


def check_sensitivity(run: Run) -> None:
    assert 0.5 < excess(run) <= 1.0


def test_layer_sensitivity_is_the_root_of_the_sum_of_squares() -> None:
    check_sensitivity(saturated())
    run = private_run(sigma=2.0, clip=0.5, strategy="per_layer")
    assert run.optimizer.sensitivity == 0.5 * (1 + rounding_slack(40))


def test_planted_largest_norm_for_sensitivity_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def largest(bound: Any, trained: dict) -> PerLayerClipNorms:
        norms = per_layer_clip_norms(bound, trained)
        return PerLayerClipNorms(max(norms.of.values()), norms.of, norms.given)

    monkeypatch.setattr(setup, "per_layer_clip_norms", largest)
    with pytest.raises(AssertionError):
        check_sensitivity(saturated())


@pytest.mark.parametrize("count", [1, 2, 3, 7, 601])
def test_layer_norms_keep_to_the_budget_exactly(count: int) -> None:
    """In exact arithmetic, however the parameters are grouped."""
    trained = {f"p{i}": nn.Parameter(torch.zeros(1)) for i in range(count)}
    generator = torch.Generator().manual_seed(count)
    given = dict(zip(trained, (torch.rand(count, generator=generator).double() + 1e-3).tolist(), strict=True))
    for norms in (
        per_layer_clip_norms(0.7, trained),
        per_layer_clip_norms(given, trained),
        per_layer_clip_norms(list(given.values()), trained),
    ):
        parameters = list(trained.values())
        for size in (1, 2, 5):
            groups = [parameters[i : i + size] for i in range(0, count, size)]
            spent = sum(Fraction(norms.together(group)) ** 2 for group in groups)
            assert spent <= Fraction(norms.total) ** 2 <= spent * Fraction(1 + 2**-40)


def test_layer_norms_can_be_given_by_name_and_in_order() -> None:
    names = [name for name, _ in Net().named_parameters()]
    norms = dict(zip(names, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), strict=True))
    by_name = private_run(sigma=0, clip=norms, strategy="per_layer", clipping="per_layer")
    in_order = private_run(sigma=0, clip=list(norms.values()), strategy="per_layer")
    assert by_name.optimizer.max_grad_norm == pytest.approx(math.sqrt(sum(n * n for n in norms.values())))
    rows = gradients_one_by_one(by_name.model, losses_of, [one(by_name, i) for i in INDICES])
    for run in (by_name, in_order):
        released = run.release(INDICES)
        for name, bound in norms.items():
            lengths = [float(row[name].norm()) for row in rows]
            expected = sum(
                row[name] * min(1.0, bound / max(n, 1e-30)) for row, n in zip(rows, lengths, strict=True)
            )
            torch.testing.assert_close(8 * released[name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ([1.0, 2.0], ValueError, r"has 2 norms for 8 trained parameters.*by name"),
        (
            {"last.weight": 1.0},
            ValueError,
            r"missing: 'first\.bias', 'first\.weight', .* and 2 more; not trained: none",
        ),
        (
            {**dict.fromkeys((n for n, _ in Net().named_parameters()), 1.0), "gone": 1.0},
            ValueError,
            "trained: 'gone'",
        ),
        ([1.0] * 7 + [0.0], ValueError, r"max_grad_norm\['last\.bias'\] must be finite and > 0, got 0"),
        ([1.0] * 7 + ["1"], TypeError, r"max_grad_norm\['last\.bias'\]='1'"),
        ("1.0", TypeError, "one number"),
        (-1.0, ValueError, "max_grad_norm must be finite and > 0, got -1"),
    ],
)
def test_wrong_layer_norms_are_refused_by_name(given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        private_run(clip=given, strategy="per_layer")


def test_a_parameter_unfrozen_later_has_no_norm() -> None:
    model = Net()
    model.last.bias.requires_grad_(False)
    run = private_run(model=model, strategy="per_layer")
    model.last.bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"\(3,\).*before make_private"):
        backward_alone(run)


def test_several_norms_without_per_layer_are_refused_with_the_mend() -> None:
    for strategy in ("bookkeeping", "two_pass"):
        with pytest.raises(TypeError, match="strategy='per_layer'"):
            private_run(clip=[1.0] * 8, strategy=strategy)
    with pytest.raises(ValueError, match="strategy='per_layer'"):
        private_run(clipping="per_layer", strategy="two_pass")


def test_the_ledger_says_how_it_was_clipped(tmp_path: Path) -> None:
    for name, clip, said in (
        ("a", 1.0, "uniform"),
        ("b", [0.5] * 8, dict.fromkeys(dict(Net().named_parameters()), 0.5)),
    ):
        private_run(strategy="per_layer", clip=clip, ledger=tmp_path / name).engine.close()
        text = (tmp_path / name).read_text()
        assert '"clipping": "per_layer"' in text
        assert json.dumps(said, sort_keys=True) in text


def test_a_layer_where_an_example_is_not_finite_gets_nothing_of_it() -> None:
    run = private_run(sigma=0, clip=BOUND, strategy="per_layer", model=Exploding())
    released = run.release(INDICES)
    stats = run.optimizer.last_step
    assert stats is not None
    assert (stats.examples, stats.non_finite) == (7, 1)
    run.model.on = False
    whole, without = run.release(INDICES), run.release((0, 2, 3, 4, 5, 6))
    for name in released:
        expected = whole if name.startswith("last") else without
        torch.testing.assert_close(released[name], expected[name], rtol=1e-5, atol=1e-9)


def test_layer_statistics_count_an_example_clipped_in_any_layer() -> None:
    names = [name for name, _ in Net().named_parameters()]
    norms = dict.fromkeys(names, 1e6) | {"norm.bias": 1e-9}
    run = private_run(sigma=0, clip=norms, strategy="per_layer")
    run.release(INDICES)
    assert run.optimizer.last_step.clip_rate == 1.0
    flat = private_run(sigma=0, clip=BOUND)
    flat.release(INDICES)
    assert run.optimizer.last_step.mean_norm == pytest.approx(flat.optimizer.last_step.mean_norm, rel=1e-4)
