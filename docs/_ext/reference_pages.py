"""Writes the pages of the API reference: one for each public package, every public name on the page of its package.

A package's public names are its `__all__`; where it has none, they are what its modules define without a leading
underscore. Pages are written into docs/reference/ when a build begins, and are not committed. When it ends, a public
name that the reference does not describe is a warning, and so an error of `make docs`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

FOLDER = Path(__file__).resolve().parents[1] / "reference"
# Packages with an `__all__` of their own come first: a name is described where it is public first.
PACKAGES = (
    "dpkernels.privacy",
    "dpkernels.nn",
    "dpkernels.ops",
    "dpkernels.losses",
    "dpkernels.memory",
    "dpkernels.auditing",
    "dpkernels.blocks",
    "dpkernels.precision",
    "dpkernels.plain",
    "dpkernels.checkpoint",
    "dpkernels.errors",
    "dpkernels.rounding",
    "dpkernels.interop.trainer",
    "dpkernels.interop",
    "dpkernels",
    "asr_finetune",
)


@dataclass(frozen=True)
class Page:
    """One page: `modules` maps each module or package to the public names that are described on this page."""

    package: str
    modules: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        """Qualified names of what this page describes."""
        return [f"{module}.{name}" for module, names in self.modules.items() for name in names]


def public_names(module: ModuleType) -> list[str]:
    """The module's `__all__`, or the functions and classes without an underscore that the module itself defines."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("__")]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def public_modules(package: ModuleType) -> Iterator[ModuleType]:
    """The package, and its modules where the package itself exports nothing by `__all__`; none of other PACKAGES."""
    yield package
    if hasattr(package, "__all__") or not hasattr(package, "__path__"):
        return
    others = [f"{name}." for name in PACKAGES if name.startswith(f"{package.__name__}.")]
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        elsewhere = any(f"{found.name}.".startswith(other) for other in others)
        if not elsewhere and not any(part.startswith("_") for part in found.name.split(".")):
            yield importlib.import_module(found.name)


def pages() -> list[Page]:
    """The pages, in the order of PACKAGES; `asr_finetune` has one page for each of its packages."""
    described: dict[int, str] = {}
    made: dict[str, Page] = {}
    for package in PACKAGES:
        for module in public_modules(importlib.import_module(package)):
            home = package_of(module, package)
            page = made.setdefault(home, Page(home, {}))
            names = page.modules.setdefault(module.__name__, [])
            for name in public_names(module):
                value = getattr(module, name)
                if inspect.ismodule(value):
                    continue
                if described.setdefault(id(value), module.__name__) == module.__name__:
                    names.append(name)
    return list(made.values())


def package_of(module: ModuleType, top: str) -> str:
    """The package on whose page a module belongs."""
    if module.__name__ == top or hasattr(module, "__path__"):
        return module.__name__
    return module.__name__.rpartition(".")[0]


def text(page: Page) -> str:
    """The page in reStructuredText: docstring, summary table, then each name in full; module by module."""
    parts = [heading(page.package, "=")]
    for module, names in page.modules.items():
        if module != page.package:
            parts.append(heading(module.removeprefix(f"{page.package}."), "-"))
        parts.append(f".. automodule:: {module}\n   :no-members:\n")
        if names:
            table = "\n".join(f"   {name}" for name in names)
            parts.append(f".. currentmodule:: {module}\n\n.. autosummary::\n   :nosignatures:\n\n{table}\n")
        parts += [directive(module, name) for name in names]
    return "\n".join(parts)


def heading(title: str, line: str) -> str:
    """A heading, underlined."""
    return f"{title}\n{line * len(title)}\n"


def directive(module: str, name: str) -> str:
    """The directive that describes one name."""
    value: Any = getattr(importlib.import_module(module), name)
    if inspect.isclass(value):
        kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
        # The docstring describes a named tuple's fields; autodoc would describe them a second time.
        fields = getattr(value, "_fields", ()) if issubclass(value, tuple) else ()
        excluded = f"   :exclude-members: {', '.join(fields)}\n" if fields else ""
        return f".. {kind}:: {module}.{name}\n   :members:\n{excluded}   :show-inheritance:\n"
    return f".. {'autofunction' if callable(value) else 'autodata'}:: {module}.{name}\n"


def write(app: Sphinx) -> None:
    """Write what has changed, and remove pages of packages that are gone."""
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    toctree = "\n".join(f"   {page.package}" for page in made)
    texts = {f"{page.package}.rst": text(page) for page in made}
    texts["index.rst"] = f"{heading('API reference', '=')}\n.. toctree::\n   :maxdepth: 1\n\n{toctree}\n"
    for stale in {path.name for path in FOLDER.iterdir()} - set(texts):
        (FOLDER / stale).unlink()
    for name, content in texts.items():
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")


def missing(described: set[str]) -> list[str]:
    """Public names that are not in the reference."""
    return [name for page in pages() for name in page.names if name not in described]


def check(app: Sphinx, error: Exception | None) -> None:
    """Warn of each public name that no page describes."""
    if error is None:
        described = {name for name, *_ in app.env.domains["py"].get_objects()}
        for name in missing(described):
            logging.getLogger(__name__).warning("%r is public, and the reference does not describe it", name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", write)
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
