#!/usr/bin/env bash
# Cross-compiles the CPU library for aarch64 and runs tests/packaging/check_abi.c on it under qemu.
# Needs (Debian, Ubuntu): apt-get install g++-aarch64-linux-gnu qemu-user-static cmake ninja-build
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64-static cmake ninja; do
  command -v "$tool" >/dev/null || {
    echo "error: $tool was not found; mend: apt-get install g++-aarch64-linux-gnu qemu-user-static cmake ninja-build" >&2
    exit 1
  }
done
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cmake -S . -B "$build" -G Ninja -DDPK_CUDA=OFF -DDPK_OUTPUT_DIR="$build/lib" -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
cmake --build "$build"
aarch64-linux-gnu-gcc -std=c11 -Wall -Wextra -Werror -Icsrc tests/packaging/check_abi.c -L"$build/lib" -ldpkernels_cpu \
  -o "$build/check_abi"
qemu-aarch64-static -L /usr/aarch64-linux-gnu -E LD_LIBRARY_PATH="$build/lib" "$build/check_abi"
