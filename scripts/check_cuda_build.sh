#!/usr/bin/env bash
# Builds the extension with its CUDA kernels against a CUDA torch, on a machine that may have no GPU, and runs the op
# tests with it: the CPU and Meta halves everywhere, the CUDA half where there is a device.
#
#   GRPO_ENGINE_TORCH   what to install as torch, a CUDA build (default torch==2.14.1)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
need() { echo "grpo_engine: $1" >&2; exit 1; }
command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] || need "nvcc is missing"

VENV=$PWD/build/cuda_venv
if ! "$VENV/bin/python" -c 'import torch; assert torch.version.cuda' 2>/dev/null; then
  mkdir -p build
  free=$(df --output=avail -BG build | tail -n 1 | tr -dc 0-9)
  [ "$free" -ge 12 ] || need "a CUDA torch needs 12 GB of disk, $free GB are free"
  python3 -m venv "$VENV"
  "$VENV/bin/pip" install --quiet --disable-pip-version-check "${GRPO_ENGINE_TORCH:-torch==2.14.1}"
fi
"$VENV/bin/pip" install --quiet --disable-pip-version-check "setuptools>=77" wheel cmake ninja numpy pytest pytest-timeout

PATH=$VENV/bin:$PATH GRPO_ENGINE_CUDA=1 GRPO_ENGINE_BUILD_DIR=build/cuda "$VENV/bin/python" setup.py -q build_ext \
  --build-lib build/cuda_lib
export GRPO_ENGINE_EXTENSION=$PWD/build/cuda_lib/grpo_engine
"$VENV/bin/python" - <<'END'
import os

import torch

import grpo_engine

grpo_engine.__path__.insert(0, os.environ["GRPO_ENGINE_EXTENSION"])
import grpo_engine.ops

ops = [n for n in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA") if n.startswith("grpo_engine::")]
assert ops, "no op is registered for CUDA"
print("registered for CUDA:", *sorted(ops))
END
"$VENV/bin/python" -m pytest python_tests/ops
