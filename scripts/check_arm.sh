#!/usr/bin/env bash
# The CPU kernels on 64-bit ARM, cross-compiled and run under an emulator: NEON gives the bits of AVX2 and AVX-512
# (csrc/tests/kernel_bits.txt) on 1, 2 and 3 threads, and the generic copy the same bits on each. No Python, no Torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake ninja; do
  command -v "$tool" >/dev/null || {
    echo "check_arm.sh: $tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user cmake ninja-build" >&2
    exit 1
  }
done
cmake -S . -B build/arm -G Ninja -DGRPO_ENGINE_WITHOUT_TORCH=ON -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ >build/arm.log 2>&1 ||
  { cat build/arm.log; exit 1; }
cmake --build build/arm --target kernel_bits >build/arm.log 2>&1 || { cat build/arm.log; exit 1; }

on_arm() { qemu-aarch64 -L /usr/aarch64-linux-gnu build/arm/kernel_bits "$@" >build/arm.log || { tail -n 3 build/arm.log; exit 1; }; }
on_arm --isa neon --threads 1,2,3 --expect csrc/tests/kernel_bits.txt
tail -n 1 build/arm.log
on_arm --isa generic --threads 1,3
tail -n 1 build/arm.log
