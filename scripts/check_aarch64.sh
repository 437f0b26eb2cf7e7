#!/usr/bin/env bash
# Cross-compiles the CPU library for aarch64 and runs tests/packaging/check_abi.c on it under qemu.
# Needs (Debian, Ubuntu): apt-get install g++-aarch64-linux-gnu qemu-user-static cmake ninja-build
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64-static cmake ninja; do
  command -v "$tool" >/dev/null || {
    echo "error: $tool was not found; fix: apt-get install g++-aarch64-linux-gnu qemu-user-static cmake ninja-build" >&2
    exit 1
  }
done
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cmake -S . -B "$build" -G Ninja -DDPK_CUDA=OFF -DDPK_OUTPUT_DIR="$build/lib" \
  -DCMAKE_TOOLCHAIN_FILE="$PWD/scripts/aarch64.cmake"
cmake --build "$build"
scripts/check_abi.sh aarch64 "$build/lib"
