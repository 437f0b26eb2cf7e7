"""The coins of an audit on disk, readable by their owner alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from dpkernels.auditing.one_run import AuditError
from dpkernels.files import write_atomically

SECRET = 0o600
"""The mode of a file that only its owner may read."""


def write_coins(path: str | os.PathLike[str], coins: Any) -> None:
    """Write the coins of an audit, for a run that resumes and for the attack's evaluation. The file's mode is 0600.

    The coins say which canaries the run was trained on. Who gets the run's model must not get them, unless every canary
    is public; and nobody may have them before the attacker's scores are fixed.

    Args:
        path: of the file.
        coins: [m] bool, from `draw_coins`.

    Raises:
        AuditError: the file exists: a run has one set of coins.
        dpkernels.files.WriteError: it cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise AuditError(
            f"{path} exists: other coins than those that a run was trained with would show nothing. Read them with "
            "read_coins, or give another path"
        )
    text = json.dumps({"coins": "".join("1" if coin else "0" for coin in np.asarray(coins))}) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()), mode=SECRET)


def read_coins(path: str | os.PathLike[str]) -> np.ndarray:
    """The coins that `write_coins` wrote: [m] bool.

    Raises:
        AuditError: the file does not exist, or holds something else.
    """
    path = Path(path)
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["coins"]
    except FileNotFoundError as error:
        raise AuditError(f"{path}: no such file; write_coins makes it when the coins are drawn") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AuditError(f"{path} does not hold the coins of an audit ({error})") from error
    if not isinstance(text, str) or set(text) - {"0", "1"}:
        raise AuditError(f"{path} does not hold the coins of an audit: expected 0s and 1s")
    return np.array([coin == "1" for coin in text])
