#!/usr/bin/env bash
# Compiles tests/packaging/check_abi.c for an architecture and runs it with a built libdpkernels_cpu.so on the oldest CPU
# of that architecture, under qemu: the library must choose its instruction set at run time.
#
#   scripts/check_abi.sh x86_64|aarch64 FOLDER      FOLDER has libdpkernels_cpu.so
#
# Needs (Debian, Ubuntu): apt-get install gcc qemu-user-static; for aarch64 also g++-aarch64-linux-gnu.
set -euo pipefail
architecture=${1:?an architecture: x86_64 or aarch64}
folder=$(realpath "${2:?the folder of libdpkernels_cpu.so}")
cd "$(dirname "$0")/.."
case $architecture in
  # qemu64 has SSE2 and no AVX; cortex-a53 is ARMv8.0
  x86_64) compiler=gcc cpu=qemu64 root=/ ;;
  aarch64) compiler=aarch64-linux-gnu-gcc cpu=cortex-a53 root=/usr/aarch64-linux-gnu ;;
  *) echo "error: architecture: given $architecture; fix: x86_64 or aarch64" >&2; exit 2 ;;
esac
for tool in "$compiler" "qemu-$architecture-static"; do
  command -v "$tool" >/dev/null || {
    echo "error: $tool was not found; fix: apt-get install gcc qemu-user-static g++-aarch64-linux-gnu" >&2
    exit 1
  }
done
program=$(mktemp -d)
trap 'rm -rf "$program"' EXIT
"$compiler" -std=c11 -Wall -Wextra -Werror -Icsrc tests/packaging/check_abi.c -L"$folder" -ldpkernels_cpu -lm \
  -o "$program/check_abi"
"qemu-$architecture-static" -cpu "$cpu" -L "$root" -E LD_LIBRARY_PATH="$folder" "$program/check_abi" | tee "$program/said"
grep -q "instruction set baseline" "$program/said" || {
  echo "error: on the oldest $architecture CPU the library did not choose the baseline instruction set" >&2
  exit 1
}
