#!/usr/bin/env bash
# The C++ tests under the address and undefined-behaviour sanitizers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
export PATH=$ROOT/.venv/bin:$PATH
cmake -S . -B build/sanitize -G Ninja -DPython_EXECUTABLE="$PYTHON" -DGRPO_ENGINE_TESTS=ON -DGRPO_ENGINE_SANITIZE=ON \
  -DCMAKE_PREFIX_PATH="$ROOT/.venv/googletest/usr"
cmake --build build/sanitize --target grpo_engine_tests
build/sanitize/grpo_engine_tests --gtest_brief=1
