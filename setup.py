"""Native build. This file decides which libraries to build, CMakeLists.txt how; metadata is in pyproject.toml.

DPKERNELS_BUILD=auto  (default) the CPU library if a C++ compiler is found, and the CUDA library if nvcc is found
DPKERNELS_BUILD=none  no library: a py3-none-any wheel, in which PyTorch code serves every op
DPKERNELS_BUILD=cpu   the CPU library; the build stops with a fix if it cannot be built
DPKERNELS_BUILD=cuda  both libraries; the build stops with a fix if one cannot be built
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
LIBRARIES = "dpkernels/lib"


def find_program(*names: str) -> str | None:
    """Return the full path of the first program found beside this interpreter or on the PATH."""
    beside = os.path.dirname(sys.executable)
    path = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
    return next((program for name in names if name and (program := shutil.which(name, path=path))), None)


def missing_tool() -> str | None:
    """Return what a native build lacks on this machine, with the fix; None if it lacks nothing."""
    compiler = os.environ.get("CXX", "").split()
    if not find_program(*compiler[:1] or ("c++", "g++", "clang++")):
        if compiler:
            return f"the C++ compiler CXX={compiler[0]} was not found; fix: unset CXX or set another one"
        return (
            "no C++ compiler (c++, g++, clang++) was found on the PATH; fix: apt-get install g++ (Debian, "
            "Ubuntu), dnf install gcc-c++ (Fedora), or set CXX"
        )
    if not find_program("cmake"):
        return "cmake was not found; fix: pip install 'cmake>=3.24', or build without --no-build-isolation"
    return None


def chosen_build() -> str:
    """Return `DPKERNELS_BUILD`. Without a compiler, auto becomes none, and cpu and cuda stop the build."""
    choice = os.environ.get("DPKERNELS_BUILD", "auto")
    if choice not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"error: DPKERNELS_BUILD={choice!r}; fix: set it to auto, none, cpu or cuda")
    missing = None if choice == "none" else missing_tool()
    if missing and choice == "auto":
        rule = "*" * 100
        print(
            f"{rule}\nWARNING: dpkernels is built WITHOUT its native library (slower): {missing}\n{rule}",
            file=sys.stderr,
        )
        return "none"
    if missing:
        raise SystemExit(f"error: DPKERNELS_BUILD={choice}: {missing}")
    return choice


BUILD = chosen_build()


class CMakeBuild(build_ext):
    """Run CMake once, and put the libraries into the package in the build tree or (editable) the source tree."""

    def run(self) -> None:
        """Configure and build."""
        output = (ROOT if self.editable_mode or self.inplace else Path(self.build_lib).resolve()) / LIBRARIES
        shutil.rmtree(output, ignore_errors=True)  # libraries of an earlier build with other settings
        cmake = find_program("cmake")
        ninja = find_program("ninja")
        cuda = {"auto": "AUTO", "cpu": "OFF", "cuda": "ON"}[BUILD]
        # --fresh: a cache of another folder stops CMake, and a cache older than nvcc hides nvcc
        configure = [cmake, "--fresh", "-S", str(ROOT), "-B", self.build_temp, f"-DDPK_CUDA={cuda}"]
        configure += [f"-DDPK_OUTPUT_DIR={output}", f"-DDPK_VERSION={self.distribution.get_version()}"]
        if ninja:  # passed each time, because pip deletes the folder of an isolated build
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = str(
            self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or len(os.sched_getaffinity(0))
        )
        for command in (configure, [cmake, "--build", self.build_temp, "--parallel", jobs]):
            if subprocess.run(command).returncode:
                raise SystemExit(
                    "error: the native build failed; fix the error reported above, or set "
                    "DPKERNELS_BUILD=cpu (no CUDA library) or none (no library at all)"
                )

    def get_outputs(self) -> list[str]:
        """Return the paths of the built libraries."""
        return [str(path) for path in Path(self.build_lib, LIBRARIES).glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        """Return no file to copy, because an editable build writes in place."""
        return {}


class PythonFiles(build_py):
    """Leave libraries to CMakeBuild: a wheel does not contain those of an earlier in-place build."""

    def run(self) -> None:
        """Copy the Python files; an editable install without native code removes an older library."""
        if self.editable_mode and BUILD == "none":
            shutil.rmtree(ROOT / LIBRARIES, ignore_errors=True)
        super().run()

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        """Return the data files of a package, without libraries."""
        return [path for path in super().find_data_files(package, src_dir) if not path.endswith(".so")]


class AnyPythonWheel(bdist_wheel):
    """One wheel serves every Python 3 on the platform, because the libraries have a C ABI and do not use Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the Python, ABI and platform that the wheel needs."""
        return ("py3", "none", "any" if BUILD == "none" else super().get_tag()[2])


setup(
    ext_modules=[] if BUILD == "none" else [Extension("dpkernels.lib", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": PythonFiles, "bdist_wheel": AnyPythonWheel},
)
