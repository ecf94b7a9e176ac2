#!/usr/bin/env bash
# Makes .venv and builds the engine into it. Runs what is missing and nothing else: a second call with unchanged
# sources takes a second. Sourced by quickstart.sh and test.sh; leaves $PYTHON set.
#
#   GRPO_ENGINE_TORCH   what to install as torch (default torch==2.13.0), for instance a CUDA build's version
#   MAX_JOBS            compile jobs (default: one a core)
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$ROOT/.venv/bin/python

need() { echo "grpo_engine: $1" >&2; exit 1; }

command -v python3 >/dev/null || need "python3 is missing: apt-get install python3 python3-venv python3-dev"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  need "Python 3.10 or later is needed, found $(python3 --version): apt-get install python3"
python3 -c 'import venv, ensurepip' 2>/dev/null || need "Python's venv is missing: apt-get install python3-venv"
python3 -c 'import os, sysconfig; open(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2>/dev/null ||
  need "Python's headers are missing: apt-get install python3-dev"
CXX=${CXX:-c++}
command -v "$CXX" >/dev/null || need "a C++ compiler is missing: apt-get install g++"
echo '#include <span>
int main() { return static_cast<int>(std::span<int>{}.size()); }' | "$CXX" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null ||
  need "a C++20 compiler is needed, found $("$CXX" --version | head -n 1): apt-get install g++"

[ -x "$PYTHON" ] || python3 -m venv "$ROOT/.venv"

# what the installed build was made from
sources() {
  cd "$ROOT" && find csrc CMakeLists.txt setup.py pyproject.toml -type f ! -path 'csrc/tests/*' -print0 |
    sort -z | xargs -0 sha256sum | sha256sum
}
STAMP=$ROOT/.venv/.grpo_engine_built
if [ "$(cat "$STAMP" 2>/dev/null)" != "$(sources)" ]; then
  echo "grpo_engine: installing into $ROOT/.venv (a few minutes the first time)"
  PIP=("$PYTHON" -m pip install --quiet --disable-pip-version-check)
  "${PIP[@]}" "${GRPO_ENGINE_TORCH:-torch==2.13.0}" "setuptools>=77" wheel cmake ninja
  "${PIP[@]}" --no-build-isolation --editable "$ROOT[test,trl]"
  sources >"$STAMP"
fi
