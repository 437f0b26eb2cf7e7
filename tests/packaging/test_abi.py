"""The C ABI from plain C: check_abi.c is compiled against the headers and run with the installed library."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from dpkernels.backends import native

ROOT = Path(__file__).resolve().parents[2]


def test_a_c_program_gets_known_values(tmp_path: Path) -> None:
    found = native.library("cpu")
    if found.handle is None:
        pytest.skip(found.reason)
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if not shutil.which(compiler[0]):
        pytest.skip(f"no C compiler {compiler[0]}")
    program, folder = tmp_path / "check_abi", str(found.path.parent)
    command = [*compiler, "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{ROOT / 'csrc'}"]
    command += [str(ROOT / "tests/packaging/check_abi.c"), "-o", str(program)]
    command += [f"-L{folder}", "-ldpkernels_cpu", "-lm", f"-Wl,-rpath,{folder}"]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == "0 failed"
    assert f"ABI {native.ABI_VERSION}, instruction set {native.isa()}" in ran.stdout
