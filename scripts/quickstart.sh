#!/usr/bin/env bash
# From a clone to a fitted scaling law: sets up, runs the smoke study, prints its law and where the report lies.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
started=$SECONDS
"$ROOT/.venv/bin/grpo-engine" study run smoke --out runs/smoke
echo "study: $((SECONDS - started)) s after set-up"
