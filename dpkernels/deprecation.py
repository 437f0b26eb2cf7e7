"""Old names of the public interface: each is still accepted, with a DeprecationWarning that gives the new name."""

import warnings
from typing import TypeVar

_T = TypeVar("_T")

OLD_STRATEGIES = {"keep_small": "mixed"}
"""Old names of strategies, each with its new name."""


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that `old`, which a caller used, is now called `new`.

    stacklevel: of the line that the warning names, as in `warnings.warn`; 3 is the caller of the function that calls
    this one.
    """
    warnings.warn(
        f"{old} is now called {new}; the old name is still accepted",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def renamed_argument(old: str, old_value: _T | None, new: str, new_value: _T | None) -> _T | None:
    """Return the value of argument `new`, or of its old name `old` with a warning; None means not given.

    Raises:
        TypeError: both are given.
    """
    if old_value is None:
        return new_value
    if new_value is not None:
        raise TypeError(
            f"{new}={new_value!r} and its old name {old}={old_value!r} are both given: leave {old} out"
        )
    warn_renamed(f"{old}=...", f"{new}=...", stacklevel=4)
    return old_value
