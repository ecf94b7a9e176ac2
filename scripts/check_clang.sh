#!/usr/bin/env bash
# Clang compiles everything without a warning, and its kernels have the bits of GCC's (csrc/tests/kernel_bits.txt):
# kernels, C++ tests and the extension for this machine, and the kernels for 64-bit ARM where g++-aarch64-linux-gnu is
# (run under qemu-aarch64 where that is). The extension is built without OpenMP: Torch for Linux brings GCC's runtime.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
export PATH=$ROOT/.venv/bin:$PATH
command -v clang++ >/dev/null || need "clang is missing: apt-get install clang"
command -v cmake >/dev/null || need "cmake is missing: pip install cmake ninja"

build() {  # folder, targets, then options of cmake
  local folder=$1 targets=$2
  shift 2
  cmake -S . -B "build/$folder" -G Ninja -DCMAKE_CXX_COMPILER=clang++ "$@" >"build/$folder.log" 2>&1 &&
    cmake --build "build/$folder" --target $targets >"build/$folder.log" 2>&1 ||
    { grep -E "warning|error|Error" -A 6 "build/$folder.log" | head -n 60 || tail -n 30 "build/$folder.log"; exit 1; }
}
check() {  # kernel_bits of a build, and how to start it
  for isa in $("$@" --isas); do
    expect=(--expect csrc/tests/kernel_bits.txt)
    [ "$isa" = generic ] && expect=()
    "$@" --isa "$isa" --threads 1,3 "${expect[@]}" >build/clang_bits.log || { tail -n 3 build/clang_bits.log; exit 1; }
    tail -n 1 build/clang_bits.log
  done
}

mkdir -p build
build clang "kernel_bits grpo_engine_tests _C" -DPython_EXECUTABLE="$PYTHON" -DGRPO_ENGINE_TESTS=ON \
  -DGRPO_ENGINE_OPENMP=OFF -DCMAKE_PREFIX_PATH="$ROOT/.venv/googletest/usr"
build/clang/grpo_engine_tests --gtest_brief=1
check build/clang/kernel_bits

if [ -d /usr/aarch64-linux-gnu/include ]; then
  build clang_arm kernel_bits -DGRPO_ENGINE_WITHOUT_TORCH=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER_TARGET=aarch64-linux-gnu
  if command -v qemu-aarch64 >/dev/null; then
    check qemu-aarch64 -L /usr/aarch64-linux-gnu build/clang_arm/kernel_bits
  else
    echo "qemu-aarch64 is missing (apt-get install qemu-user): clang's kernels for ARM are compiled and not run"
  fi
else
  echo "g++-aarch64-linux-gnu is missing: clang compiles no kernels for ARM"
fi
