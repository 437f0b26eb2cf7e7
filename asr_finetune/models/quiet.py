"""Messages of transformers and PEFT that are not shown."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers

PEFT_ASKS_BY_AN_OLD_NAME = "`is_gradient_checkpointing` is deprecated"


def quiet_transformers() -> None:
    """Turn off transformers' progress bars for reading and writing weights, which break those of `Reporter`."""
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def without_warnings(*texts: str) -> Iterator[None]:
    """Within it, warnings and transformers' log lines that hold one of these texts are not shown.

    For what a user can do nothing about, at the call that causes it.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in texts)

    handlers = logging.getLogger("transformers").handlers
    with warnings.catch_warnings():
        for text in texts:
            warnings.filterwarnings("ignore", message=f".*{re.escape(text)}")
        for handler in handlers:
            handler.addFilter(keep)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(keep)
