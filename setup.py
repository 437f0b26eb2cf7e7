"""Native build. What to build is decided here, how in CMakeLists.txt; metadata is in pyproject.toml.

DPKERNELS_BUILD=auto  (default) the CPU library where a C++ compiler is found, the CUDA library where nvcc is
DPKERNELS_BUILD=none  no library: a py3-none-any wheel, PyTorch code serves every op
DPKERNELS_BUILD=cpu   the CPU library; stops with the fix named if it cannot be built
DPKERNELS_BUILD=cuda  both libraries; stops likewise
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
    """Full path of the first program found beside this interpreter or on the PATH."""
    beside = os.path.dirname(sys.executable)
    path = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
    return next((found for name in names if name and (found := shutil.which(name, path=path))), None)


def missing_tool() -> str | None:
    """What a native build lacks on this machine, with the fix; None when it lacks nothing."""
    compiler = os.environ.get("CXX", "").split()
    if not find_program(*compiler[:1] or ("c++", "g++", "clang++")):
        if compiler:
            return f"the C++ compiler CXX={compiler[0]} was not found; fix: unset CXX or name another one"
        return (
            "no C++ compiler (c++, g++, clang++) was found on the PATH; fix: apt-get install g++ (Debian, "
            "Ubuntu), dnf install gcc-c++ (Fedora), or set CXX"
        )
    if not find_program("cmake"):
        return "cmake was not found; fix: pip install 'cmake>=3.24', or build without --no-build-isolation"
    return None


def chosen_build() -> str:
    """`DPKERNELS_BUILD`; auto becomes none where nothing can be compiled, other requests stop there."""
    choice = os.environ.get("DPKERNELS_BUILD", "auto")
    if choice not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"error: DPKERNELS_BUILD={choice!r}; fix: set it to auto, none, cpu or cuda")
    lack = None if choice == "none" else missing_tool()
    if lack and choice == "auto":
        rule = "*" * 100
        print(
            f"{rule}\nWARNING: dpkernels is built WITHOUT its native library (slower): {lack}\n{rule}",
            file=sys.stderr,
        )
        return "none"
    if lack:
        raise SystemExit(f"error: DPKERNELS_BUILD={choice}: {lack}")
    return choice


BUILD = chosen_build()


class CMakeBuild(build_ext):
    """Runs CMake once; the libraries go into the package, in the build tree or (editable) the source tree."""

    def run(self) -> None:
        """Configure and build."""
        output = (ROOT if self.editable_mode or self.inplace else Path(self.build_lib).resolve()) / LIBRARIES
        shutil.rmtree(output, ignore_errors=True)  # those of an earlier build with other settings
        cmake = find_program("cmake")
        ninja = find_program("ninja")
        cuda = {"auto": "AUTO", "cpu": "OFF", "cuda": "ON"}[BUILD]
        # --fresh: a cache from another folder stops CMake, and one from before nvcc came hides it
        configure = [cmake, "--fresh", "-S", str(ROOT), "-B", self.build_temp, f"-DDPK_CUDA={cuda}"]
        configure += [f"-DDPK_OUTPUT_DIR={output}", f"-DDPK_VERSION={self.distribution.get_version()}"]
        if ninja:  # named each time: the folder of an isolated build is gone at the next one
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = str(
            self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or len(os.sched_getaffinity(0))
        )
        for command in (configure, [cmake, "--build", self.build_temp, "--parallel", jobs]):
            if subprocess.run(command).returncode:
                raise SystemExit(
                    "error: the native build failed, the messages above say why; fix that, or set "
                    "DPKERNELS_BUILD=cpu (no CUDA library) or none (no library at all)"
                )

    def get_outputs(self) -> list[str]:
        """Name the libraries built."""
        return [str(path) for path in Path(self.build_lib, LIBRARIES).glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        """Name no file to copy: an editable build writes in place."""
        return {}


class PythonFiles(build_py):
    """Leaves libraries to CMakeBuild: those of an earlier in-place build are no part of a wheel."""

    def run(self) -> None:
        """Copy the Python files; an editable install without native code drops an older library."""
        if self.editable_mode and BUILD == "none":
            shutil.rmtree(ROOT / LIBRARIES, ignore_errors=True)
        super().run()

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        """Name the data files of a package, libraries left out."""
        return [path for path in super().find_data_files(package, src_dir) if not path.endswith(".so")]


class AnyPythonWheel(bdist_wheel):
    """The libraries have a C ABI and no Python in them: one wheel serves every Python 3 on the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Name the Python, ABI and platform that the wheel needs."""
        return ("py3", "none", "any" if BUILD == "none" else super().get_tag()[2])


setup(
    ext_modules=[] if BUILD == "none" else [Extension("dpkernels.lib", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": PythonFiles, "bdist_wheel": AnyPythonWheel},
)
