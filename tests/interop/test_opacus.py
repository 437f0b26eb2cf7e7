"""dpkernels.opacus: what registering changes, undoing it, and an Opacus that is absent or another one."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("opacus", reason="opacus is installed with the [bench] extra only")

import opacus.grad_sample
from opacus.grad_sample import GradSampleModuleFastGradientClipping

import dpkernels.opacus
from dpkernels.interop.opacus import SAMPLERS
from tests.interop.ghost import ghost_norms

TABLE: dict[Any, Any] = GradSampleModuleFastGradientClipping.NORM_SAMPLERS


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = dict(TABLE)
    yield
    dpkernels.opacus.unregister()
    assert before == TABLE


def test_the_documented_scripts_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/opacus.md").read_text(encoding="utf-8")
    table, loop = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(table, "docs/opacus.md", "exec"), {})
    assert "1: BatchNorm1d -> FrozenBatchNorm1d" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus's and torch's of its hooks
        exec(compile(loop, "docs/opacus.md", "exec"), {})
    assert "Linear: instead of" in capsys.readouterr().out


def test_register_installs_and_unregister_puts_back() -> None:
    before = dict(TABLE)
    made = dpkernels.opacus.register()
    assert {layer: TABLE[layer] for layer in SAMPLERS} == dict(SAMPLERS)
    made.unregister()
    assert before == TABLE
    made.unregister()  # again: nothing, but for a warning
    assert before == TABLE


def test_it_tells_what_it_replaced() -> None:
    text = str(dpkernels.opacus.register())
    assert "Linear: instead of the norms of opacus.grad_sample.linear.compute_linear_norm_sample" in text
    assert "LayerNorm: instead of per-sample gradients, computed by opacus.grad_sample.layer_norm." in text


def test_a_second_call_changes_nothing_and_undoes_nothing() -> None:
    with dpkernels.opacus.register() as first:
        with dpkernels.opacus.register() as second:
            assert not second.replaced
            assert "already" in str(second)
        assert TABLE[nn.Linear] is SAMPLERS[nn.Linear]
        assert set(first.replaced) == set(SAMPLERS)
    assert TABLE[nn.Linear] is not SAMPLERS[nn.Linear]


def test_only_the_layers_asked_for() -> None:
    with dpkernels.opacus.register([nn.LayerNorm]) as made:
        assert list(made.replaced) == [nn.LayerNorm]
        assert TABLE[nn.Linear] is not SAMPLERS[nn.Linear]
    with pytest.raises(ValueError, match=r"layers: given .*Bilinear.*exactly Linear, Embedding"):
        dpkernels.opacus.register([nn.Bilinear])


def test_unregister_leaves_what_another_put_over_ours(caplog: pytest.LogCaptureFixture) -> None:
    def theirs(layer: Any, activations: Any, backprops: Any) -> dict[Any, Any]:
        return {}

    made, before = dpkernels.opacus.register([nn.Linear]), TABLE[nn.Linear]
    TABLE[nn.Linear] = theirs
    made.unregister()
    assert TABLE[nn.Linear] is theirs
    assert "Linear is not from dpkernels any more" in caplog.text
    TABLE[nn.Linear] = before
    dpkernels.opacus.register([nn.Linear])  # ours again: what is put back is Opacus's
    TABLE[nn.Linear] = made._before[nn.Linear]


def test_models_made_before_are_served_too() -> None:
    layer, x, g = nn.Linear(3, 2), torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    model = GradSampleModuleFastGradientClipping(layer, loss_reduction="sum")
    with dpkernels.opacus.register():
        model(x.requires_grad_()).backward(g)
    assert layer.weight._norm_sample.dtype == torch.float64  # type: ignore[attr-defined]


class Twice(nn.Module):
    """The same layer norm called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x))


def test_a_layer_called_twice_is_refused_unless_its_type_is_left_out() -> None:
    x, g = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    with dpkernels.opacus.register(), pytest.raises(NotImplementedError, match="tying is not supported"):
        ghost_norms(Twice(), x, g)
    with dpkernels.opacus.register(layer for layer in SAMPLERS if layer is not nn.LayerNorm):
        assert ghost_norms(Twice(), x, g)["norm.weight"].shape == (2,)


@pytest.mark.slow
def test_importing_it_does_not_import_opacus() -> None:
    code = "import sys, dpkernels; dpkernels.opacus.register; print('opacus' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_opacus_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ImportError, match=r"Opacus is not installed; pip install 'opacus>=1\.5\.4', or"):
        dpkernels.opacus.register()


def _changed(monkeypatch: pytest.MonkeyPatch, holder: Any) -> None:
    other = ModuleType("opacus.grad_sample")
    if holder is not None:
        other.GradSampleModuleFastGradientClipping = holder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", other)


@pytest.mark.parametrize(
    ("holder", "problem"),
    [
        (None, "has no GradSampleModuleFastGradientClipping"),
        (SimpleNamespace(GRAD_SAMPLERS={}), "not both dicts"),
        (SimpleNamespace(NORM_SAMPLERS={}, GRAD_SAMPLERS={}), "has no nn.Linear"),
        (
            SimpleNamespace(NORM_SAMPLERS={nn.Linear: lambda layer, inputs: {}}, GRAD_SAMPLERS={}),
            r"take \(layer, inputs\), not \(layer, activations, backprops\)",
        ),
    ],
)
def test_another_opacus_is_refused_by_version(
    monkeypatch: pytest.MonkeyPatch, holder: Any, problem: str
) -> None:
    _changed(monkeypatch, holder)
    with pytest.raises(
        RuntimeError, match=f"given Opacus {opacus.__version__}: .*{problem}.*pip install 'opacus=="
    ):
        dpkernels.opacus.register()
