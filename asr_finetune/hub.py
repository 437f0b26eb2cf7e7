"""The hub: one request that shows whether it can be reached, since its own clients retry every request for half a
minute, and the files of a data set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import errors

_REQUESTED_FILE = {"model": "config.json", "dataset": "README.md"}


def hub_answers(name: str, revision: str | None = None, kind: Literal["model", "dataset"] = "model") -> bool:
    """Whether the hub responds to a request for a file of the repository; a refusal counts as a response."""
    try:
        url = huggingface_hub.hf_hub_url(name, _REQUESTED_FILE[kind], repo_type=kind, revision=revision)
        huggingface_hub.get_hf_file_metadata(url)
    except (
        errors.HFValidationError,
        errors.HfHubHTTPError,
    ):  # not a hub id; or the hub responded with an error
        return True
    except (OSError, errors.HTTPError):  # OSError: HF_HUB_OFFLINE
        return False
    return True


def downloaded(name: str) -> Path | None:
    """The folder of a data set's files in the hub's cache, downloaded if need be; None if it does not give them."""
    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type="dataset"))
    except (OSError, errors.HTTPError, errors.HFValidationError):
        return None


def unreachable() -> str:
    """The error message about a hub that does not respond, with its address."""
    return f"the hub ({huggingface_hub.constants.ENDPOINT}) cannot be reached"
