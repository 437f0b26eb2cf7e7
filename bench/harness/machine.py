"""The machine and versions of a measurement: device, threads, versions, commit."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "opacus", "peft", "transformers", "numpy")


def device_name(device: str) -> str:
    """Return the processor's or GPU's name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return re.sub(r"\((R|TM)\)|\bCPU\b|@.*", "", names[0]).strip() if names else platform.machine()


def slug(name: str, threads: int | None = None) -> str:
    """A folder's name for a device: letters, digits and hyphens; a CPU's thread count belongs to it."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return words if threads is None else f"{words}-{threads}-threads"


def about(device: str) -> dict[str, Any]:
    """The header of a results file."""
    name, on_gpu = device_name(device), device.startswith("cuda")
    threads = torch.get_num_threads()
    return {
        "device": name,
        "slug": slug(name, None if on_gpu else threads),
        "threads": threads,
        "load": None if on_gpu else round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        **commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def path(about: Mapping[str, Any], name: str) -> Path:
    """<$OUT, or bench/results>/<slug>/<name>.json."""
    return Path(os.environ.get("OUT", ROOT / "bench" / "results")) / about["slug"] / f"{name}.json"


def save(document: Mapping[str, Any], name: str) -> None:
    """Write a result, whose machine is under "about", to its `path`."""
    target = path(document["about"], name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def commit() -> dict[str, Any]:
    """{"commit": short hash or None, "dirty": whether sources that are measured differ from it}.

    BENCH_COMMIT names the commit where the tree is a copy of it without its history.
    """
    named = os.environ.get("BENCH_COMMIT")
    if named:
        return {"commit": named, "dirty": False}
    sources = ["dpkernels", "csrc", "bench", ":!bench/results"]
    head = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", *sources)
    return {"commit": head, "dirty": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
