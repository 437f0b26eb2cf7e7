"""`python -m dpkernels`: versions, native libraries, and which backend serves each op and why."""

import importlib
import importlib.metadata
import platform
from collections.abc import Sequence

import dpkernels
from dpkernels.backends import native, registry


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [f"  {line.rstrip()}" for line in lines]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> list[str]:
    rows = [("dpkernels", dpkernels.__version__), ("python", platform.python_version())]
    rows += [(name, _version(name)) for name in ("torch", "triton", "numpy")]
    if _version("torch") != "not installed":
        rows.append(("gpu", _gpu()))
    return ["Versions", *_table(rows)]


def _gpu() -> str:
    """Return the GPU's name, or in one line why there is none."""
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    cuda = torch.version.cuda
    why = (
        "this torch is built without CUDA" if cuda is None else f"torch's CUDA {cuda} finds no GPU or driver"
    )
    return f"none: {why}; everything runs on the CPU; the cuda rows below show what a GPU would use"


def _libraries() -> list[str]:
    rows = []
    for row in native.status().values():
        if row["loaded"]:
            state = f"version {row['version']}, ABI {row['abi']}"
            state += f", instruction set {row['isa']}" if "isa" in row else ""
        else:
            state = f"none: {row['reason']}"
        rows.append((row["file"], state))
    return ["Native libraries", *_table(rows)]


def _backends() -> list[str]:
    if _version("torch") == "not installed":
        return ["Backends", "  none: torch is not installed; fix: pip install torch"]
    importlib.import_module("dpkernels.ops")  # registers its definitions
    try:
        forced = registry.forced()
    except ValueError as error:
        return ["Backends", f"  none: {error}"]
    notes: dict[str, int] = {}
    rows = [("op", "device", "backend", "note")]
    for row in registry.explain():
        note = f"({notes.setdefault(row.reason, len(notes) + 1)})" if row.reason else ""
        rows.append((row.op, row.device, row.backend, note))
    hint = "" if forced == "auto" else " forces this; unset it to use native code where it serves an op"
    lines = [f"Backends ({registry.ENVIRONMENT_VARIABLE}={forced}{hint})", *_table(rows)]
    if notes:
        lines += ["", *(f"  ({number}) {reason}" for reason, number in notes.items())]
    return lines


def main() -> None:
    """Print the diagnostics."""
    print("\n\n".join("\n".join(section()) for section in (_versions, _libraries, _backends)))


if __name__ == "__main__":
    main()
