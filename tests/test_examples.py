"""Every example runs from top to bottom, as its first lines say, and shows what it promises."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.slow import slow_cases

FOLDER = Path(__file__).resolve().parents[1] / "examples"
# What each prints: figures that come of the run.
SHOWN = {
    # 33 % and 93.8 % were seen; the noise is secret
    "adaptive_clipping": r"C = 0\.01: accuracy [0-5]\d\.\d%; adaptive: [89]\d\.\d%, C = 0\.[1-9]",
    "custom_layer": r"with its rule: at most \d\.\de-\d+ from the gradients taken one by one",
    "gpt2_lora": r"step 4: loss \d\.\d+ \(NOT PRIVATE.*\)\nepsilon = [78]\.\d+ at delta = 2\.5e-04",
    "image_classifier": r"after 4 private steps: accuracy \d+\.\d%\nepsilon = [78]\.\d+",
    "opacus_after": r"accuracy \d+\.\d%, epsilon = [78]\.\d+",
    "opacus_before": r"accuracy \d+\.\d%, epsilon = [78]\.\d+",
    "opacus_bert": r"epoch 1: epsilon = 7\.\d+ at delta = 1e-4",
    "opacus_char_lstm": r"epoch 2: epsilon = 7\.\d+ at delta = 1e-4",
    "opacus_cifar10": r"epoch 1: epsilon = 7\.\d+ at delta = 1e-5",
    "opacus_imdb": r"epoch 2: epsilon = 9\.\d+ at delta = 1e-4",
    "opacus_mnist": r"epoch 1: epsilon = 3\.\d+ at delta = 1e-4",
    "resume": r"checkpoint of step 5; the ledger holds 7 steps\n12 steps are spent.*\n.*: 12 steps in 2 runs",
    "several_processes": r"1 process, the same parameters in each\n.*\nepsilon = \d+\.\d+ at delta = 1\.0e-05",
    "speech": r"nothing was written or spent; a run would start[\s\S]*epsilon 7\.\d+ at delta 0\.01[\s\S]*report\.html",
    "strategies": r"the same update with every strategy",
    # the noise is secret, so the accuracy differs from run to run: 77.8 % was seen, where a guess has 50 %
    "trainer": r"accuracy .*\(NOT PRIVATE\): (100\.0|[6-9]\d\.\d)%\nepsilon = [78]\.\d+ at delta = 1\.4e-04",
    "trl_sft": r"'epsilon': '[78]\.\d+'[\s\S]*epsilon = [78]\.\d+ at delta = 2\.5e-04",
}
# The others take seconds. What they use has tests of its own; see also `test_names_of_this_project_are_there`.
QUICK = ("custom_layer", "resume", "several_processes", "strategies")
FLAGS = {"image_classifier": ["--steps", "4"], "gpt2_lora": ["--steps", "4"]}
NEEDS = {
    "gpt2_lora": "peft",
    "opacus_before": "opacus",
    "opacus_bert": "transformers",
    "speech": "espeakng_loader",
    "trainer": "accelerate",
    "trl_sft": "trl",
}


def test_every_example_has_a_line_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SHOWN)


@pytest.mark.parametrize("name", [name for name in SHOWN if name not in (*QUICK, "opacus_before")])
def test_names_of_this_project_are_there(name: str) -> None:
    """In each example that is slow, but the one that is of Opacus alone."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    used = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(("dpkernels", "asr_finetune")):
            used += [(str(node.module), alias.name) for alias in node.names]
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "dpkernels"
        ):
            used.append(("dpkernels", node.attr))
    assert used
    assert [name for name in used if not hasattr(importlib.import_module(name[0]), name[1])] == []


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", [*QUICK, *slow_cases(*(name for name in SHOWN if name not in QUICK))])
def test_runs_from_top_to_bottom(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    path = FOLDER / f"{name}.py"
    assert f"\n    python examples/{name}.py\n" in path.read_text(encoding="utf-8") or name.startswith(
        "opacus"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), *FLAGS.get(name, [])])
    with warnings.catch_warnings():
        # Nothing that a first reader would have to ask about.
        warnings.filterwarnings("error", category=UserWarning, module="dpkernels")
        warnings.filterwarnings("default", message="noise_multiplier=0")
        runpy.run_path(str(path), run_name="__main__")
    assert re.search(SHOWN[name], capsys.readouterr().out), name
    assert not list(tmp_path.iterdir()), "a run by default leaves nothing behind"


@pytest.mark.slow
def test_several_processes_run_it_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, FOLDER / "several_processes.py", "--ledger", "ledger.jsonl", "--save", "model.pt"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = SHOWN["several_processes"].replace("1 process,", "2 processes,")
    assert re.search(shown, done.stdout), done.stdout
    assert (tmp_path / "ledger.jsonl").read_text().count('"kind": "step"') == 20
    saved = torch.load(tmp_path / "model.pt")
    states = saved["optimizer"]["state"]
    assert [tuple(state["exp_avg"].shape) for state in states.values()] == [(64, 20), (64,), (2, 64), (2,)]


@pytest.fixture
def notebook() -> Any:
    nbformat = pytest.importorskip("nbformat")
    (path,) = FOLDER.glob("*.ipynb")
    return nbformat.read(path, as_version=4)


def test_the_notebook_is_valid_and_holds_no_outputs(notebook: Any) -> None:
    pytest.importorskip("nbformat").validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    for number, cell in enumerate(code):
        assert cell.outputs == []
        assert cell.execution_count is None
        compile(cell.source, f"code cell {number}", "exec")


@pytest.mark.slow
def test_the_notebook_runs_cell_by_cell(notebook: Any, capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    names: dict[str, Any] = {}
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        exec(compile(cell.source, f"code cell {number}", "exec"), names)
    assert re.search(r"epsilon = (2\.9\d|3\.00) after 20 steps", capsys.readouterr().out)
    assert names["plain"][-1] > 0.6
    spent = names["spent"]
    assert spent == sorted(spent)
    assert len(names["figure"].axes) == 2
