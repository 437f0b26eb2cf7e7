"""Whether the hub can be reached: asked once, where its clients repeat each request of theirs for half a minute."""

from __future__ import annotations

from typing import Literal

import huggingface_hub
from huggingface_hub import errors

_ASKED_FOR = {"model": "config.json", "dataset": "README.md"}


def hub_answers(name: str, revision: str | None = None, kind: Literal["model", "dataset"] = "model") -> bool:
    """Whether a request for a file of the repository is answered, be it with a refusal."""
    try:
        url = huggingface_hub.hf_hub_url(name, _ASKED_FOR[kind], repo_type=kind, revision=revision)
        huggingface_hub.get_hf_file_metadata(url)
    except (
        errors.HFValidationError,
        errors.HfHubHTTPError,
    ):  # no hub's id; an answer, if not the one hoped for
        return True
    except (OSError, errors.HTTPError):  # OSError: HF_HUB_OFFLINE
        return False
    return True


def unreachable() -> str:
    """What is said of a hub that does not answer, with its address."""
    return f"the hub ({huggingface_hub.constants.ENDPOINT}) cannot be reached"
