"""The README's code runs as written, and its plain-PyTorch equivalent is what a step computes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEN_LINES, EQUIVALENT = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("target", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_the_ten_lines_run(
    target: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As written, and with a target whose noise takes a second to find in place of six."""
    monkeypatch.chdir(tmp_path)
    assert TEN_LINES.count("target_epsilon=8,") == 1
    exec(
        compile(TEN_LINES.replace("target_epsilon=8,", f"target_epsilon={target},"), "README.md", "exec"), {}
    )
    assert 0.93 * target < float(capsys.readouterr().out.split()[-1]) <= target
    assert (tmp_path / "ledger.jsonl").read_text().count('"kind": "step"') == 20


def losses_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    return cross_entropy(model(batch[0]).mean(1), batch[1], reduction="none")


def step_sizes(code: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the README's plain loop puts into .grad, what a private step without noise does), flattened."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 5, 16), torch.randint(0, 4, (12,)))
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    parameters = list(model.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    names = {"torch": torch, "losses_of": losses_of, "model": model, "data": data, "sampled": [1, 4, 7]}
    names |= {"parameters": parameters, "sums": sums, "max_grad_norm": 0.5, "noise_multiplier": 0.0}
    exec(code, names | {"batch_size": 3, "optimizer": torch.optim.SGD(parameters, lr=0.0)})
    plain = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    with pytest.warns(UserWarning, match="nothing is private"):
        model, optimizer, _ = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(parameters, lr=0.0),
            data_loader=DataLoader(data, batch_size=3),
            noise_multiplier=0.0,
            max_grad_norm=0.5,
        )
    optimizer.keep_gradients = True
    optimizer.backward(losses_of(model, data[[1, 4, 7]]))
    optimizer.step()
    return plain, torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def test_the_equivalent_is_what_a_step_computes() -> None:
    plain, private = step_sizes(EQUIVALENT)
    torch.testing.assert_close(private, plain, rtol=1e-4, atol=1e-7)


def test_planted_clipping_of_the_sum_is_noticed() -> None:
    fault = EQUIVALENT.replace("(max_grad_norm / norm).clamp(max=1)", "1")
    plain, private = step_sizes(fault)
    assert not torch.allclose(private, plain, rtol=1e-4, atol=1e-7)


def pages() -> list[Path]:
    """Every markdown page of the repository; hidden folders, and those of builds and runs, are not of it."""
    skipped = ("build", "dist", "runs")
    tops = [top for top in ROOT.iterdir() if top.is_dir() and top.name not in skipped]
    within = [page for top in tops if not top.name.startswith(".") for page in top.rglob("*.md")]
    seen = [page for page in within if not any(part[0] == "." for part in page.relative_to(ROOT).parts)]
    generated = (
        ROOT / "docs" / "project",
        ROOT / "docs" / "reference",
    )  # by `make docs`, from pages that are seen
    return sorted([*ROOT.glob("*.md"), *(page for page in seen if page.parent not in generated)])


def test_it_is_short_and_in_the_order_of_a_reader() -> None:
    headings = re.findall(r"^## (.+)$", README, flags=re.MULTILINE)
    assert headings == ["Install", "Ten lines", "Your recordings", "What it costs", "Read on"]
    assert len(README.splitlines()) <= 150
    assert len(re.findall(r"!\[", README)) == 1
    assert all(command in README for command in ("make demo", "make test", "`pytest --benchmark`"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


SOURCES = (".py", ".md", ".cpp", ".cu", ".cuh", ".h", ".toml", ".svg", ".ipynb", "/")


def named_paths(text: str) -> list[str]:
    """What stands in backticks and is a path of the repository, by its suffix or its first folder.

    The text of a link is left out, since the link has its path, and so is code in a fence.
    """
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    names = re.findall(r"(?<!\[)`([\w.*/-]+)`", prose)
    folders = {folder.name for folder in ROOT.iterdir() if folder.is_dir()} - {
        "build",
        "dist",
        "runs",
        ".venv",
    }
    inside = {name for name in names if "/" in name and name.partition("/")[0] in folders}
    return [
        name
        for name in names
        if name in inside or (name.endswith(SOURCES) and not name.startswith((".", "/")))
    ]


def missing_paths(text: str) -> list[str]:
    """Those that are not there as seen from the root; `*` stands for any name."""
    return [name for name in named_paths(text) if not any(ROOT.glob(name))]


PROSE = [page for page in pages() if page.name == "CONTRIBUTING.md" or ROOT / "docs" in page.parents]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_in_backticks_exists(page: Path) -> None:
    assert not missing_paths(page.read_text(encoding="utf-8"))


def test_planted_paths_that_are_wrong_are_noticed() -> None:
    wrong = ["ops/layers.py", "tests/nn/test_norm.py", "bias.py", "csrc/gpu/*.cpp", "dpkernels/layers/"]
    right = ["dpkernels/ops/layers.py", "README.md", "csrc/cpu/*.cpp", "tests/ops"]
    text = (
        " ".join(f"`{name}`" for name in wrong + right)
        + " [`resume.py`](x) `a/b` `make docs`\n```\n`old.py`\n```\n"
    )
    assert named_paths(text) == wrong + right
    assert missing_paths(text) == wrong
