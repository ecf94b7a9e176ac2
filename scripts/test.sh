#!/usr/bin/env bash
# Sets up, then runs the C++ tests and the Python tests; the op tests once more for each instruction set of this CPU,
# and those of CUDA kernels on the emulator. Compares the bits of every kernel with those kept, on each instruction set
# and, emulated, on ARM. Compiles the CUDA kernels where nvcc is.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
export PATH=$ROOT/.venv/bin:$PATH

# GoogleTest: the system's, or Debian's package unpacked into .venv (no root needed where apt has its lists)
GTEST=$ROOT/.venv/googletest
has_gtest() { [ -e /usr/include/gtest/gtest.h ] || [ -e "$GTEST/usr/include/gtest/gtest.h" ]; }
if ! has_gtest; then
  mkdir -p "$GTEST"
  (cd "$GTEST" && { [ "$(id -u)" != 0 ] || apt-get update -qq; } && apt-get download -qq libgtest-dev &&
    dpkg -x libgtest-dev_*.deb .) >/dev/null 2>&1 || true
  has_gtest || need "GoogleTest is missing: apt-get install libgtest-dev"
fi
cmake -S . -B build/tests -G Ninja -DPython_EXECUTABLE="$PYTHON" -DGRPO_ENGINE_TESTS=ON \
  -DCMAKE_PREFIX_PATH="$GTEST/usr" >build/tests.log 2>&1 || { cat build/tests.log; exit 1; }
cmake --build build/tests --target grpo_engine_tests >build/tests.log 2>&1 || { cat build/tests.log; exit 1; }
build/tests/grpo_engine_tests --gtest_brief=1
if command -v nvcc >/dev/null; then
  cmake --build build/tests --target cuda_kernels_check
else
  echo "nvcc is missing: the CUDA kernels are not compiled"
fi

# of the kernels that the extension holds
cmake --build build/native --target kernel_bits >build/kernel_bits.log 2>&1 || { cat build/kernel_bits.log; exit 1; }
for isa in $(build/native/kernel_bits --isas); do
  expect=(--expect csrc/tests/kernel_bits.txt)
  [ "$isa" = generic ] && expect=()
  build/native/kernel_bits --isa "$isa" --threads 1,2,3,5,8 "${expect[@]}" >build/kernel_bits.log ||
    { tail -n 3 build/kernel_bits.log; exit 1; }
  tail -n 1 build/kernel_bits.log
done
if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
  bash scripts/check_arm.sh
else
  echo "g++-aarch64-linux-gnu or qemu-user is missing: the kernels do not run on an emulated ARM CPU"
fi

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | sort | xargs clang-format --dry-run -Werror

# the CUDA emulator is slow and has one thread: of the op tests one in three, or all if GRPO_ENGINE_ONE_OP_TEST_IN=1
cmake --build build/native --target emulated >build/emulated.log 2>&1 || { cat build/emulated.log; exit 1; }
for half in csrc/ops/*_cuda.*; do
  name=$(basename "$half")
  tests+=("python_tests/ops/test_${name%_cuda.*}.py")
done
tests+=(python_tests/model/test_model.py python_tests/rollout/test_rollout.py python_tests/train/test_grpo_step.py python_tests/train/test_optimizer.py)
beside() {  # what runs beside the Python tests, on a core of its own; ends at the first failure
  echo "op, model and rollout tests on the CUDA emulator"
  GRPO_ENGINE_ONE_OP_TEST_IN=${GRPO_ENGINE_ONE_OP_TEST_IN:-3} GRPO_ENGINE_EXTENSION=build/native/emulated \
    "$PYTHON" -m pytest "${tests[@]}" || return 1
  local best isa op_tests
  best=$("$PYTHON" -c 'from grpo_engine import ops, _C; print(_C.cpu_isa())')
  for isa in $("$PYTHON" -c 'from grpo_engine import ops, _C; print(*_C.cpu_isas())'); do
    [ "$isa" = "$best" ] && continue
    op_tests=(python_tests/ops)
    if [ "$best/$isa" = avx512_bf16/avx512 ]; then  # all but the matmuls are the same kernels
      op_tests=(python_tests/ops/test_{linear,token_logprob,decoder_layer}.py)
    fi
    echo "op tests on $isa"
    GRPO_ENGINE_ISA=$isa "$PYTHON" -m pytest "${op_tests[@]}" || return 1
  done
}
beside >build/beside.log 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null || true' EXIT

"$PYTHON" -m pytest

wait "$beside" || { cat build/beside.log; exit 1; }
grep -E '^op|passed' build/beside.log
