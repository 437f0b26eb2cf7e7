"""What computes the ops: `registry` chooses, `native_ops`, `torch_ops` and `triton_ops` compute, `bounds` says why no
norm is short. From outside, import `registry`, `layer` and, for the state of the native libraries, `native`.

This is the one place that knows all backends: `registry` is handed them, and they may import it.
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
