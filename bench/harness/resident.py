"""Peak resident memory of this process, on Linux."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_RESET_PEAK = "5"  # proc(5), clear_refs


def resident_peak(step: Callable[[], None]) -> float:
    """Peak MiB of this process's resident memory during `step` beyond what it had before."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    step()
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
