"""Brings what lives outside docs/ into the site as pages, and makes links lead to them.

Every page keeps the links that GitHub needs. When a build begins, the files of PAGES are made pages in
docs/project/ (not committed): Markdown with its links rewritten, examples and notebooks with their text and
code. The links of pages in docs/ are rewritten as they are read. A link to another file of the repository
becomes a download, a link to a folder becomes plain text.
"""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
FOLDER = DOCS / "project"
EXAMPLES = [path for path in sorted((ROOT / "examples").iterdir()) if path.suffix in (".py", ".ipynb")]
# file of the repository -> its page in docs/
PAGES = {
    "README.md": "index.md",  # the site's own first page stands for it
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "tests/privacy/README.md": "project/tests-of-privacy.md",
    **{
        page.relative_to(ROOT).as_posix(): f"project/experiment-{page.parent.name}.md"
        for page in sorted(ROOT.glob("experiments/*/README.md"))
    },
    **{f"examples/{path.name}": f"project/example-{path.stem}.md" for path in EXAMPLES},
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def rewritten(text: str, source: Path, page: Path) -> str:
    """The text of `source` with links that work on `page`, a file in docs/."""

    def link(match: re.Match[str]) -> str:
        picture, words, target, anchor = match.groups()
        path = Path(os.path.normpath(source.parent / target))
        if path.is_dir():
            return words
        if path.is_relative_to(ROOT):
            name = path.relative_to(ROOT).as_posix()
            path = DOCS / PAGES[name] if name in PAGES else path
        return f"{picture}[{words}]({os.path.relpath(path, page.parent)}{anchor or ''})"

    return _LINK.sub(link, text)


def content(source: Path, page: Path) -> str:
    """What the page of a file says, in Markdown."""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".py":
        text = program(source.name, text)
    elif source.suffix == ".ipynb":
        text = notebook(text)
    return rewritten(text, source, page)


def program(name: str, text: str) -> str:
    """A program: its docstring as the heading and text, then its code."""
    body = ast.parse(text).body
    title, _, rest = (ast.get_docstring(ast.parse(text)) or name).partition("\n")
    code = "\n".join(text.split("\n")[body[0].end_lineno :]).strip()
    return f"# {title.rstrip('.')}\n\n`examples/{name}`\n{rest}\n\n```python\n{code}\n```\n"


def notebook(text: str) -> str:
    """A notebook: its text and code cells, without outputs."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(
        source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells
    )


def write(app: Sphinx) -> None:
    """Write the pages that have changed, and remove those whose source is gone."""
    FOLDER.mkdir(exist_ok=True)
    made = {DOCS / page: ROOT / source for source, page in PAGES.items() if page.startswith("project/")}
    for stale in set(FOLDER.iterdir()) - set(made):
        stale.unlink()
    for page, source in made.items():
        text = content(source, page)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def read(app: Sphinx, docname: str, text: list[str]) -> None:
    """Rewrite the links of a page of docs/ that leave the folder."""
    path = DOCS / f"{docname}.md"
    if path.exists() and path.parent != FOLDER:
        text[0] = rewritten(text[0], path, path)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", write)
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
