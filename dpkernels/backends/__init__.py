"""The implementations of the ops. `registry` chooses one, `native_ops`, `torch_ops` and `triton_ops` compute, and
`bounds` proves that no norm is too small. Other packages import `registry`, `layer` and, for the state of the native
libraries, `native`.

Only this module lists the backends. It registers them with `registry`, which they may import.
"""

from dpkernels.backends import registry
from dpkernels.backends.native_ops import native
from dpkernels.backends.triton_ops import availability

__all__ = ["native", "registry"]


registry.add_backend(
    "native", f"{__name__}.native_ops", lambda device, op: native.unavailable_reason(device, op)
)
registry.add_backend(
    "triton", f"{__name__}.triton_ops", lambda device, op: availability.unavailable_reason(device)
)
registry.add_backend("torch", f"{__name__}.torch_ops", lambda device, op: "")
