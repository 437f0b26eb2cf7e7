"""What `DPKERNELS_BUILD` builds, and how it stops; all from copies of the source, without a network."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import dpkernels
from dpkernels.backends import native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    *("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"),
    *("csrc", "dpkernels", "asr_finetune"),
)
PLATFORM = re.sub(r"[-.]", "_", sysconfig.get_platform())
LIBRARY = "dpkernels/lib/libdpkernels_cpu.so"

for name in ("pip", "setuptools"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed for {sys.executable}", allow_module_level=True)


def copy_source(folder: Path) -> Path:
    """The sources, with a library that an earlier in-place build left."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("lib", "__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder)
    leave_library(folder / "dpkernels/lib")
    return folder


def leave_library(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "libdpkernels_old.so").write_bytes(b"from an earlier build")


def run(
    *command: str | Path, environment: dict[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs it in this environment, but for what would change a build."""
    ours = ("DPKERNELS_", "PYTHONPATH", "CXX", "CUDACXX")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"CMAKE_BUILD_PARALLEL_LEVEL": "2"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pip_wheel(
    source: Path, wheels: Path, python: str | Path = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--verbose")
    return run(python, "-m", "pip", "wheel", *options, "-w", wheels, source, environment=environment)


def built(
    source: Path, wheels: Path, python: str | Path = sys.executable, **environment: str
) -> tuple[Path, str]:
    """The wheel and what was printed."""
    done = pip_wheel(source, wheels, python, **environment)
    assert done.returncode == 0, done.stdout
    (wheel,) = wheels.iterdir()
    return wheel, done.stdout


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def libraries(wheel: Path) -> list[str]:
    return sorted(name for name in names(wheel) if ".so" in name)


def unpacked(wheel: Path) -> Path:
    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_source(tmp_path_factory.mktemp("source") / "dpkernels")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with pip and setuptools, and no cmake or compiler beside it."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    specs = [importlib.util.find_spec(name) for name in ("pip", "setuptools")]
    homes = {str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin}
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "homes.pth").write_text("\n".join(homes) + "\n")
    return folder / "bin/python"


@pytest.fixture(scope="module")
def none_wheel(source: Path, bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built where there is neither a compiler nor cmake."""
    wheels = tmp_path_factory.mktemp("none")
    wheel, printed = built(source, wheels, bare_python, DPKERNELS_BUILD="none", PATH=str(wheels))
    assert "WITHOUT" not in printed  # asked for, so nothing to warn about
    return wheel


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    done = run(sys.executable, "-c", code, environment={"DPKERNELS_BUILD": "none"}, cwd=source)
    assert done.returncode == 0, done.stdout
    (path,) = folder.iterdir()
    return path


# What compiles the native library anew; `test_abi.py` runs the installed one.
compiles = pytest.mark.slow


@pytest.fixture(scope="module")
def cpu_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, unpacked over what a build with other settings, elsewhere, left."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    suffix = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    leave_library(source / f"build/lib.{suffix}/dpkernels/lib")
    cache = source / f"build/temp.{suffix}/CMakeCache.txt"
    cache.parent.mkdir(parents=True)
    cache.write_text("CMAKE_CACHEFILE_DIR:INTERNAL=/elsewhere\nCMAKE_HOME_DIRECTORY:INTERNAL=/elsewhere\n")
    return built(source, tmp_path_factory.mktemp("cpu"), DPKERNELS_BUILD="cpu")[0]


@pytest.mark.slow
def test_none_gives_a_pure_wheel(none_wheel: Path) -> None:
    assert none_wheel.name == f"dpkernels-{dpkernels.__version__}-py3-none-any.whl"
    assert libraries(none_wheel) == []
    assert "dpkernels/py.typed" in names(none_wheel)


@compiles
def test_cpu_gives_one_library_for_every_python(cpu_wheel: Path, none_wheel: Path) -> None:
    assert cpu_wheel.name == f"dpkernels-{dpkernels.__version__}-py3-none-{PLATFORM}.whl"
    assert libraries(cpu_wheel) == [LIBRARY]
    assert names(cpu_wheel) == names(none_wheel) | {LIBRARY}


def test_the_sdist_has_the_native_sources_and_no_library(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert wanted | {"setup.py", "CMakeLists.txt", "LICENSE", "NOTICE"} <= inside
    assert not [name for name in inside if name.endswith(".so")]


def diagnostics(wheel: Path) -> str:
    """`python -m dpkernels` without site-packages, so without torch."""
    done = run(
        *(sys.executable, "-S", "-m", "dpkernels"),
        environment={"PYTHONPATH": str(unpacked(wheel))},
        cwd=wheel.parent,
    )
    assert done.returncode == 0, done.stdout
    assert "torch is not installed; fix: pip install torch" in done.stdout
    return done.stdout


@compiles
def test_the_wheels_load_without_torch(cpu_wheel: Path, none_wheel: Path) -> None:
    assert re.search(
        rf"libdpkernels_cpu\.so +version {re.escape(dpkernels.__version__)}, ABI {native.ABI_VERSION}",
        diagnostics(cpu_wheel),
    )
    assert (
        "libdpkernels_cpu.so is not in this installation; install a C++ compiler and reinstall with "
        "DPKERNELS_BUILD=cpu"
    ) in diagnostics(none_wheel)


def tool_lines(*command: str | Path) -> list[str]:
    if not shutil.which(str(command[0])):
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


@compiles
def test_the_library_exports_the_c_abi_and_nothing_else(cpu_wheel: Path) -> None:
    headers = "".join(path.read_text() for path in sorted((ROOT / "csrc").glob("*.h")))
    declared = set(re.findall(r"^DPK_API [^(]*?(\w+)\(", headers, re.M))
    lines = tool_lines("nm", "-D", "--defined-only", unpacked(cpu_wheel) / LIBRARY)
    assert {line.split()[-1] for line in lines} == {n for n in declared if not n.startswith("dpk_cuda_")}


@compiles
def test_the_library_needs_the_c_library_only(cpu_wheel: Path) -> None:
    """A conda environment may bring an older libstdc++ than the compiler's; torch is free to change its ABI."""
    lines = tool_lines("readelf", "--dynamic", unpacked(cpu_wheel) / LIBRARY)
    needed = [line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line]
    assert needed
    assert not [name for name in needed if not re.match(r"(libc|libm|libpthread|ld-linux.*)\.so\.", name)]
    assert not [line for line in lines if "RPATH" in line or "RUNPATH" in line]


@compiles
def test_the_library_is_the_one_of_this_version(cpu_wheel: Path) -> None:
    library = ctypes.CDLL(str(unpacked(cpu_wheel) / LIBRARY))
    library.dpk_version.restype = ctypes.c_char_p
    assert library.dpk_version().decode() == dpkernels.__version__
    assert library.dpk_abi_version() == native.ABI_VERSION


@pytest.mark.slow
def test_auto_without_a_compiler_warns_and_builds_none(
    source: Path, bare_python: Path, tmp_path: Path
) -> None:
    (tmp_path / "wheels").mkdir()
    wheel, printed = built(source, tmp_path / "wheels", bare_python, PATH=str(tmp_path))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries(wheel) == []
    assert (
        "WARNING: dpkernels is built WITHOUT its native library (slower): no C++ compiler (c++, g++, clang++) "
        "was found on the PATH; fix: apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora)"
    ) in printed


NO_COMPILER = (
    "DPKERNELS_BUILD={}: no C++ compiler (c++, g++, clang++) was found on the PATH; fix: apt-get install g++"
)
REQUESTS = [
    ({"DPKERNELS_BUILD": "gpu"}, [], "DPKERNELS_BUILD='gpu'; fix: set it to auto, none, cpu or cuda"),
    pytest.param({"DPKERNELS_BUILD": "cpu"}, [], NO_COMPILER.format("cpu"), marks=pytest.mark.slow),
    pytest.param({"DPKERNELS_BUILD": "cuda"}, [], NO_COMPILER.format("cuda"), marks=pytest.mark.slow),
    pytest.param(
        {"DPKERNELS_BUILD": "cpu", "CXX": "nonexistent -m64"},
        ["c++"],
        "DPKERNELS_BUILD=cpu: the C++ compiler CXX=nonexistent was not found; fix: unset CXX or set another one",
        marks=pytest.mark.slow,
    ),
    (
        {"DPKERNELS_BUILD": "cpu"},
        ["c++"],
        "DPKERNELS_BUILD=cpu: cmake was not found; fix: pip install 'cmake>=3.24', or build without "
        "--no-build-isolation",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "tools", "message"), REQUESTS, ids=["value", "cpu", "cuda", "CXX", "cmake"]
)
def test_what_cannot_be_built_stops_with_the_mend(
    source: Path,
    bare_python: Path,
    tmp_path: Path,
    environment: dict[str, str],
    tools: list[str],
    message: str,
) -> None:
    for name in tools:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    done = pip_wheel(source, tmp_path, bare_python, PATH=str(tmp_path), **environment)
    assert done.returncode != 0
    assert f"error: {message}" in done.stdout
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.slow
def test_cuda_without_nvcc_stops_with_the_mend(source: Path, tmp_path: Path) -> None:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    done = pip_wheel(source, tmp_path, DPKERNELS_BUILD="cuda", CUDACXX=str(tmp_path / "nvcc"))
    assert done.returncode != 0
    assert (
        "no working nvcc was found; fix: put nvcc on the PATH, or set CUDACXX to it, or set DPKERNELS_BUILD=cpu"
    ) in " ".join(done.stdout.split())
    assert not list(tmp_path.iterdir())


def test_an_editable_install_without_native_code_drops_an_older_library(tmp_path: Path) -> None:
    source = copy_source(tmp_path / "source")
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    done = run(sys.executable, "-c", code, environment={"DPKERNELS_BUILD": "none"}, cwd=source)
    assert done.returncode == 0, done.stdout
    assert [wheel.name.partition("-")[0] for wheel in tmp_path.glob("*.whl")] == ["dpkernels"]
    assert not (source / "dpkernels/lib").exists()
