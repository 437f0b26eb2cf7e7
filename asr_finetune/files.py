"""Text and JSON written atomically, and the error about a missing file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpkernels.errors import UserError
from dpkernels.files import write_atomically


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


def write_text(path: Path, text: str, *, secret: bool = False) -> None:
    """Write UTF-8 text atomically; a secret file's mode is 0600."""
    write_atomically(path, lambda file: file.write(text.encode()), mode=0o600 if secret else None)


def write_json(path: Path, values: Any, *, secret: bool = False) -> None:
    """Write JSON atomically, as `write_text`. Raises ValueError for NaN and infinities, which JSON does not have."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text, secret=secret)
