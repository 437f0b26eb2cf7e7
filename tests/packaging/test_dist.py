"""`make dist` (scripts/dist.py) and the workflow: what is planned, and that a wrong wheel is not passed. The builds
themselves are `make dist`."""

import re
import zipfile
from pathlib import Path

import pytest
import yaml

from scripts.dist import Wheel, check_contents, planned

ROOT = Path(__file__).resolve().parents[2]
CPU = ["dpkernels/lib/libdpkernels_cpu.so"]
CUDA = [*CPU, "dpkernels/lib/libdpkernels_cuda.so"]


def by_name(wheels: list[Wheel]) -> dict[str, Wheel]:
    return {wheel.name: wheel for wheel in wheels}


def test_a_release_has_a_wheel_for_each_architecture_and_one_with_cuda() -> None:
    wheels = by_name(planned("x86_64", "13.0", cross_compiler=True))
    assert list(wheels) == ["CPU, x86_64", "CPU, aarch64", "CPU and CUDA, x86_64"]
    assert not any(wheel.missing for wheel in wheels.values())
    assert wheels["CPU and CUDA, x86_64"].options == ("--build-number=1cu130",)
    assert wheels["CPU, aarch64"].options == ("--plat-name=linux_aarch64",)
    toolchain = Path(wheels["CPU, aarch64"].environment["CMAKE_TOOLCHAIN_FILE"])
    assert "CMAKE_SYSTEM_PROCESSOR aarch64" in toolchain.read_text()


def test_what_the_machine_has_no_tool_for_is_named_with_the_fix() -> None:
    wheels = by_name(planned("x86_64", None, cross_compiler=False))
    assert wheels["CPU, x86_64"].missing == ""
    assert "apt-get install g++-aarch64-linux-gnu" in wheels["CPU, aarch64"].missing
    assert "put nvcc on the PATH" in wheels["CPU and CUDA, x86_64"].missing


def test_on_aarch64_nothing_is_cross_compiled() -> None:
    assert list(by_name(planned("aarch64", None, cross_compiler=False))) == [
        "CPU, aarch64",
        "CPU and CUDA, aarch64",
    ]


def wheel_file(folder: Path, name: str, libraries: list[str]) -> Path:
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        for library in libraries:
            archive.writestr(library, b"")
    return path


TAGGED = "dpkernels-0.1.0-py3-none-manylinux_2_28_x86_64.whl"


@pytest.mark.parametrize(
    ("name", "libraries", "build", "message"),
    [
        (TAGGED, [], "cpu", "has the libraries [], and should have ['libdpkernels_cpu.so']"),
        (TAGGED, CUDA, "cpu", "should have ['libdpkernels_cpu.so']"),
        (TAGGED, CPU, "cuda", "'libdpkernels_cuda.so']"),
        ("dpkernels-0.1.0-py3-none-linux_x86_64.whl", CPU, "cpu", "is not a manylinux wheel of x86_64"),
        (TAGGED.replace("x86_64", "aarch64"), CPU, "cpu", "is not a manylinux wheel of x86_64"),
        ("dpkernels-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl", CPU, "cpu", "is not a manylinux wheel"),
    ],
)
def test_a_wrong_wheel_stops_the_release(
    tmp_path: Path, name: str, libraries: list[str], build: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        check_contents(wheel_file(tmp_path, name, libraries), Wheel("a wheel", "x86_64", build=build))


@pytest.mark.parametrize(("build", "libraries"), [("cpu", CPU), ("cuda", CUDA)])
def test_a_right_wheel_passes(tmp_path: Path, build: str, libraries: list[str]) -> None:
    check_contents(wheel_file(tmp_path, TAGGED, libraries), Wheel("a wheel", "x86_64", build=build))


def test_the_workflow_runs_what_a_developer_runs() -> None:
    """Its steps are .ci/run and targets of the Makefile; nothing else is built there."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    commands = [step for step in steps if "apt-get" not in step]
    assert sorted(commands) == [".ci/run", "make dist", "make matrix"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"dist", "matrix"} <= set(targets)
    assert all(job["timeout-minutes"] for job in workflow["jobs"].values())
