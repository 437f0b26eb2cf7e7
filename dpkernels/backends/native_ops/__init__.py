"""The ops by the native libraries (csrc/): a file a family, `calls` and `native` for what they share. Every op may be
imported from here by its name, which loads its file; `native` needs no torch.
"""

from typing import Any

from dpkernels.backends import registry


def __getattr__(name: str) -> Any:
    return registry.attribute("native", name)
