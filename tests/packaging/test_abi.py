"""The C ABI from plain C: check_abi.c is compiled against the headers and run with the installed library."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from dpkernels.backends import native
from dpkernels.backends.native_ops import grouped
from dpkernels.ops.layers import KINDS

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


def c_kinds(header: str) -> dict[str, tuple[int, list[str]]]:
    """By kind, the number and the fields (of its tensors, its options, its outs) that grouped_kernels.h gives it."""
    rows = re.findall(r"DPK_LAYER_(\w+) = (\d+), +// (.*)", header)
    return {
        name.lower(): (int(number), re.sub(r" \(.*?\)", "", fields).split(", "))
        for name, number, fields in rows
    }


def check_kinds(header: str) -> None:
    found = c_kinds(header)
    assert [number for number, _ in found.values()] == list(range(len(found)))
    # A kind that is only in the table is summed by its own op.
    assert list(found) == [kind for kind in KINDS if kind in grouped.KINDS]
    fields_of_dpk_layer = {name for name, _ in grouped._Layer._fields_}
    for kind, (number, fields) in found.items():
        own_number, tensors, sizes = grouped.KINDS[kind]
        row = KINDS[kind]
        outs = grouped._OUTS[: len(row.outs)]
        assert own_number == number, kind
        assert sorted(fields) == sorted([*tensors, *row.options, *sizes, *outs]), kind
        assert len(tensors) == len(row.tensors), kind
        assert fields_of_dpk_layer >= set(fields), kind


HEADER = (ROOT / "csrc/grouped_kernels.h").read_text()


def test_the_kinds_of_the_header_are_those_of_the_table() -> None:
    check_kinds(HEADER)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("DPK_LAYER_LORA = 2", "DPK_LAYER_LORA = 3"),
        ("// x, h, g, dh, scaling", "// x, h, g, scaling"),
        ("DPK_LAYER_BIAS", "DPK_LAYER_VECTOR"),
    ],
)
def test_catches_a_header_that_differs(right: str, wrong: str) -> None:
    assert right in HEADER
    with pytest.raises(AssertionError):
        check_kinds(HEADER.replace(right, wrong))


def test_the_header_is_the_whole_of_the_abi() -> None:
    """dpkernels.h includes every header of the ABI, and together they declare every function that is defined."""
    headers = {path.name: path.read_text() for path in (ROOT / "csrc").glob("*.h")}
    included, waiting = set(), ["dpkernels.h"]
    while waiting:
        name = waiting.pop()
        included.add(name)
        waiting += set(re.findall(r'#include "(\w+\.h)"', headers[name])) - included
    assert included == set(headers)
    declared = set(re.findall(r"DPK_API [\w* ]+?(dpk_\w+)\(", "".join(headers.values())))
    sources = [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]
    defined = {
        name
        for path in sources
        for name in re.findall(r"^[a-z][\w* ]+?(dpk_\w+)\([^;]*?\) \{", path.read_text(), re.MULTILINE)
    }
    assert defined == declared
