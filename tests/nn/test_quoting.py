"""A name of a module or parameter stands in quotes in every message, so that one sees where it ends."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("nn", "privacy", "interop")
# What holds such a name, as it is written in these folders.
NAMES = re.compile(r"(\.|^)(ghost_label\(\)|_?label|layer|first_module|parameter)$|^(item|self)\.name$")
ALLOWED = {
    ("leaf_calls.py", "label"),  # a key, shown to nobody
    ("opacus.py", "layer"),  # a class of the user's list
}


def bare(source: str, file: str) -> list[str]:
    """Names that an f-string, part of a message of more than one word, embeds without quotes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        words = "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
        if " " not in words.strip():
            continue  # a qualified name that is put together
        for part in node.values:
            if isinstance(part, ast.FormattedValue) and part.conversion == -1:
                name = ast.unparse(part.value)
                if NAMES.search(name) and (file, name) not in ALLOWED:
                    found.append(f"{file}:{part.lineno}: {name}")
    return found


def test_messages_quote_names() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / "dpkernels" / folder).rglob("*.py")]
    found = [line for path in paths for line in bare(path.read_text(encoding="utf-8"), path.name)]
    assert not found, "\n".join(found)


def test_a_bare_name_is_found() -> None:
    assert bare('f"{self.ghost_label()}: got nested tensors"', "x.py")
    assert bare('f"{record.layer}: its input has"', "x.py")
    assert not bare('f"{record.layer!r}: its input has"', "x.py")
    assert not bare('f"{self.ghost_label()}.{name}"', "x.py")
