#!/usr/bin/env bash
# Builds and checks the CUDA half on a machine with a GPU, its own Python and torch, and no network (docs/gpu.md).
#
#   scripts/gpu_check.sh [--out DIR] [--wheels DIR] [--full] [--only NAME,NAME] [--within SECONDS] [--dry-run] [stage ...]
#   stages: build peers tests sanitize bench models (default: all, in this order)
#
#   GRPO_ENGINE_PYTHON   the interpreter that has torch (default python3)
set -euo pipefail
PYTHON=${GRPO_ENGINE_PYTHON:-python3}
command -v "$PYTHON" >/dev/null || { echo "grpo_engine: $PYTHON is missing; set GRPO_ENGINE_PYTHON" >&2; exit 2; }
exec "$PYTHON" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
