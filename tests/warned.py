"""Warnings as errors, for tests that ask for silence."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_warnings(*allowed: str) -> Iterator[None]:
    """Every warning within is an error, but those whose message begins as `allowed` says.

    A ResourceWarning is none: the collector may close the ledger of an earlier test at any line.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)
        for message in allowed:
            warnings.filterwarnings("ignore", message=message)
        yield
