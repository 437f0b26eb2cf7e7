"""Whether the Triton kernels can run on this machine. This module imports neither triton nor torch when loaded."""

import importlib.util

OLDEST = (8, 0)
"""The lowest compute capability with the matrix instructions and float64 arithmetic that the kernels use."""


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 makes triton interpret kernels in Python, for tests on CPU tensors.

    Triton reads the variable when a kernel is defined, so it must be set before anything imports triton.
    """
    from triton import knobs

    return bool(knobs.runtime.interpret)


def unavailable_reason(device_type: str) -> str:
    """Return why Triton kernels cannot run on such a device; "" if they can."""
    if device_type not in ("cpu", "cuda"):
        return f"there are no Triton kernels for {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if device_type == "cpu":
        if interpreting():
            return ""
        return (
            "Triton kernels run on CUDA tensors (on CPU tensors in its interpreter only: TRITON_INTERPRET=1)"
        )
    if interpreting():
        return "TRITON_INTERPRET=1 would interpret the Triton kernels on the CPU; unset it"
    import torch

    if torch.version.hip is not None:
        return "the rounding bounds of the Triton kernels are for NVIDIA GPUs"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST:
        major, minor = torch.cuda.get_device_capability()
        return f"the Triton kernels need compute capability {OLDEST[0]}.{OLDEST[1]}, this GPU has {major}.{minor}"
    return ""
