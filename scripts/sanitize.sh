#!/usr/bin/env bash
# The C++ tests, and every kernel on several threads, under the address and undefined-behaviour sanitizers and then under
# the thread sanitizer. No Python, no Torch: kernel_bits runs the kernels.
#
#   scripts/sanitize.sh [address,undefined | thread]     one of the two
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
export PATH=$ROOT/.venv/bin:$PATH
# a request for too much memory must fail as it does without a sanitizer
export ASAN_OPTIONS=allocator_may_return_null=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:allocator_may_return_null=1
for tool in cmake ninja; do
  command -v "$tool" >/dev/null || { echo "sanitize.sh: $tool is missing: apt-get install cmake ninja-build" >&2; exit 1; }
done

for sanitizers in ${1:-address,undefined thread}; do
  build=build/sanitize_${sanitizers%%,*}
  cmake -S . -B "$build" -G Ninja -DGRPO_ENGINE_WITHOUT_TORCH=ON -DGRPO_ENGINE_TESTS=ON \
    -DGRPO_ENGINE_SANITIZE="$sanitizers" -DCMAKE_PREFIX_PATH="$ROOT/.venv/googletest/usr"
  cmake --build "$build" --target grpo_engine_tests kernel_bits
  "$build/grpo_engine_tests" --gtest_brief=1
  for isa in $("$build/kernel_bits" --isas); do
    "$build/kernel_bits" --isa "$isa" --threads 3,8 | tail -n 1
  done
done
