"""The ops composed from PyTorch, sound and reasonably fast on any device: the fallback without native code. Each family
has one file, and `samples` holds shared functions. An op can be imported from here by its name, which loads its file.
"""

from typing import Any

from dpkernels.backends import registry


def __getattr__(name: str) -> Any:
    return registry.attribute("torch", name)
