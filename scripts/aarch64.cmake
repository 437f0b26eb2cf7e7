# CMake toolchain: cross-compiles the CPU library for aarch64 with Debian's g++-aarch64-linux-gnu.
# Used by `make dist` and scripts/check_aarch64.sh, as the environment variable CMAKE_TOOLCHAIN_FILE.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
