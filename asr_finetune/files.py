"""Text and JSON written atomically, and the error about a missing file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpkernels.errors import UserError
from dpkernels.files import write_atomically


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically. Raises ValueError for NaN and infinities, which JSON does not have."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
