"""The ops by the native libraries (csrc/): one file a family, with `calls` and `native` for shared functions. An op
can be imported from here by its name, which loads its file; `native` needs no torch.
"""

from typing import Any

from dpkernels.backends import registry


def __getattr__(name: str) -> Any:
    return registry.attribute("native", name)
