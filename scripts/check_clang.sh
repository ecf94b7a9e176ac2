#!/usr/bin/env bash
# Clang compiles everything without a warning, and its kernels have the bits of GCC's (csrc/tests/kernel_bits.txt):
# kernels, C++ tests and the extension for this machine, and the kernels for 64-bit ARM where g++-aarch64-linux-gnu is
# (run under qemu-aarch64 where that is). The extension is built without OpenMP: Torch for Linux brings GCC's runtime.
#
#   PYTHON   an interpreter that has Torch (default: that of .venv, which scripts/setup.sh makes)
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
export PATH=$ROOT/.venv/bin:$PATH
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
for tool in clang++ cmake ninja; do
  command -v "$tool" >/dev/null || { echo "check_clang.sh: $tool is missing: apt-get install clang cmake ninja-build" >&2; exit 1; }
done
mkdir -p build

build() {  # folder, targets, then options of cmake
  local folder=$1 targets=$2
  shift 2
  # shellcheck disable=SC2086
  { cmake -S . -B "build/$folder" -G Ninja -DCMAKE_CXX_COMPILER=clang++ "$@" &&
    cmake --build "build/$folder" --target $targets; } >"build/$folder.log" 2>&1 || { tail -n 60 "build/$folder.log"; exit 1; }
}
check() {  # how to start a kernel_bits
  local isa expect
  for isa in $("$@" --isas); do
    expect=(--expect csrc/tests/kernel_bits.txt)
    [ "$isa" = generic ] && expect=()
    "$@" --isa "$isa" --threads 1,3 "${expect[@]}" >build/clang_bits.log || { tail -n 3 build/clang_bits.log; exit 1; }
    tail -n 1 build/clang_bits.log
  done
}

if "$PYTHON" -c 'import torch' 2>/dev/null; then
  extension=("_C _corpus" -DGRPO_ENGINE_OPENMP=OFF "-DPython_EXECUTABLE=$PYTHON")
else
  echo "$PYTHON has no Torch: clang does not compile the extension (bash scripts/setup.sh makes .venv)"
  extension=("" -DGRPO_ENGINE_WITHOUT_TORCH=ON)
fi
build clang "kernel_bits grpo_engine_tests ${extension[0]}" "${extension[@]:1}" -DGRPO_ENGINE_TESTS=ON \
  -DCMAKE_PREFIX_PATH="$ROOT/.venv/googletest/usr"
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
