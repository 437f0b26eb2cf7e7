"""Old names of the public interface: each still works, and says where it is used what it is called now."""

import warnings


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that `old`, which a caller used, is called `new` now.

    stacklevel: of the line to be named, as `warnings.warn` counts it; 3 is the caller of the function that calls this.
    """
    warnings.warn(
        f"{old} is now called {new}; the old name is still accepted",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
