"""Opacus's ghost clipping with this package's norm kernels: `dpkernels.opacus.register()`, with no change to the loop.

The import of this module does not import Opacus; `register` does. See `dpkernels.interop.opacus` and docs/opacus.md.
"""

from dpkernels.interop.opacus import Registration, register, unregister

__all__ = ["Registration", "register", "unregister"]
