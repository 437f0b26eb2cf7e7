"""The documentation site: every page can be reached, every public name is described. `make docs` builds it."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GENERATED = ("reference", "project")  # written when the site is built, from what the other folders hold
PUBLIC = (
    *("dpkernels", "dpkernels.nn", "dpkernels.ops", "dpkernels.privacy", "dpkernels.losses"),
    "dpkernels.auditing",
    "dpkernels.interop.trainer",
)

pytest.importorskip("sphinx", reason="Sphinx (the docs extra) is not installed")
sys.path.insert(0, str(DOCS / "_ext"))
reference_pages: Any = importlib.import_module("reference_pages")
repository_pages: Any = importlib.import_module("repository_pages")
sys.path.remove(str(DOCS / "_ext"))


def in_toctrees(docs: Path) -> set[str]:
    """Pages that a table of contents names, as paths below docs without a suffix; those of GENERATED left out."""
    named = set()
    for page in docs.rglob("*.md"):
        for tree in re.findall(
            r"```\{toctree\}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL
        ):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
            named |= {(page.parent / entry).relative_to(docs).as_posix() for entry in entries}
    return {name for name in named if name.partition("/")[0] not in GENERATED}


def written(docs: Path) -> set[str]:
    """The pages that somebody wrote, but for the first one."""
    pages = [page.relative_to(docs).with_suffix("") for page in docs.rglob("*.md")]
    return {page.as_posix() for page in pages if page.parts[0] not in GENERATED} - {"index"}


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    assert in_toctrees(DOCS) == written(DOCS)


def test_a_page_that_was_forgotten_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "index.md").write_text("```{toctree}\n:hidden:\n\none\nproject/two\n```\n")
    (tmp_path / "one.md").write_text("# One")
    assert in_toctrees(tmp_path) == written(tmp_path) == {"one"}
    (tmp_path / "forgotten.md").write_text("# Forgotten")
    assert written(tmp_path) - in_toctrees(tmp_path) == {"forgotten"}


def described() -> set[int]:
    """The objects that the reference describes, by identity: a name may be public in two packages."""
    pages = reference_pages.pages()
    return {
        id(getattr(importlib.import_module(module), name))
        for page in pages
        for module, names in page.modules.items()
        for name in names
    }


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_described(package: str) -> None:
    module, known = importlib.import_module(package), described()
    values = {name: getattr(module, name) for name in module.__all__ if not name.startswith("__")}
    missing = [
        name for name, value in values.items() if not hasattr(value, "__path__") and id(value) not in known
    ]
    assert not missing


def test_a_name_that_no_page_describes_is_a_warning_of_the_build() -> None:
    names = {name for page in reference_pages.pages() for name in page.names}
    assert reference_pages.missing(names) == []
    assert reference_pages.missing(names - {"dpkernels.nn.swap"}) == ["dpkernels.nn.swap"]


def test_a_package_without_all_has_its_modules_described() -> None:
    pages = {page.package: page for page in reference_pages.pages()}
    assert "asr_finetune.cli.train" in pages["asr_finetune"].names
    assert not [
        name for page in pages.values() for name in page.names if name.rpartition(".")[2].startswith("_")
    ]


def test_every_name_is_described_once() -> None:
    """A package with a page of its own may lie within another one."""
    names = [name for page in reference_pages.pages() for name in page.names]
    assert "dpkernels.interop.trainer.PrivateTrainer" in names
    assert sorted(names) == sorted(set(names))


def test_links_that_leave_the_folder_lead_to_pages_downloads_or_text() -> None:
    source = page = DOCS / "guide.md"
    text = "[a](../CHANGELOG.md#x) [b](../Makefile) [c](../csrc) [d](memory.md) [e](https://example.org)"
    assert repository_pages.rewritten(text, source, page) == (
        "[a](project/changelog.md#x) [b](../Makefile) c [d](memory.md) [e](https://example.org)"
    )
    (moved,) = re.findall(r"\((.*)\)", repository_pages.rewritten("[a](docs/memory.md)", ROOT / "R.md", page))
    assert moved == "memory.md"


def test_every_example_and_experiment_is_a_page() -> None:
    assert {"examples/resume.py", "examples/speech.py", "experiments/fsdd/README.md"} <= set(
        repository_pages.PAGES
    )
    for name, page in repository_pages.PAGES.items():
        assert repository_pages.content(ROOT / name, DOCS / page).lstrip().startswith("# "), name


@pytest.mark.parametrize("name", ["design", "distributed"])
def test_each_diagram_is_what_its_script_draws(name: str) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / f"{name}_diagram.py"))
    assert script["OUT"] == DOCS / f"{name}.svg"
    assert script["OUT"].read_text(encoding="utf-8") == script["drawing"]()
    assert [path for path in script.get("BOXES", ()) if not (ROOT / path).exists()] == []


def overview() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "overview_page.py"))


def test_the_overview_is_what_its_script_writes() -> None:
    script = overview()
    assert script["OUT"] == DOCS / "overview.md"
    assert script["OUT"].read_text(encoding="utf-8") == script["page"](), (
        "run python scripts/overview_page.py"
    )


# Wrappers, base classes, and a loss that reads the weight of a layer of its own, which the first backward refuses.
NO_LAYERS = {
    "Container",
    "DataParallel",
    "LinearCrossEntropyLoss",
    "Module",
    "RNNBase",
    "RNNCellBase",
    "Unflatten",
}


def test_every_layer_of_torch_with_parameters_is_in_the_overview() -> None:
    """Lazy layers become the class that they are named after."""
    listed = {name for names in overview()["LAYERS"] for name in names.split(", ")}
    for name, kind in vars(nn).items():
        if not (inspect.isclass(kind) and issubclass(kind, nn.Module)) or name in listed | NO_LAYERS:
            continue
        if name.startswith("Lazy"):
            assert name.removeprefix("Lazy") in listed
            continue
        made = next((made for count in range(5) if (made := tried(kind, (2,) * count)) is not None), None)
        assert made is not None, f"torch.nn.{name}: list it in scripts/overview_page.py, or here"
        assert not list(made.parameters()), f"torch.nn.{name} is not in the overview"


def tried(kind: type[nn.Module], arguments: tuple[int, ...]) -> nn.Module | None:
    try:
        return kind(*arguments)
    except (TypeError, ValueError):
        return None
