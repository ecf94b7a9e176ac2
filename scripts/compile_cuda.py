"""Compiles one .cu with nvcc, and fails where a kernel keeps registers in local memory.

    python compile_cuda.py STEM -- NVCC ARGUMENTS...

A spill or a stack frame makes a kernel many times slower without a word, so it is an error unless it is listed here.
"""

import re
import subprocess
import sys

# op: why its kernels may have a stack frame. float64 is there for gradcheck and may always have one.
MAY_USE_LOCAL_MEMORY = {
    "rope": "sin and cos of float64 keep the reduction of huge angles on the stack",
}
FLOAT64 = re.compile(r"Id[EL]")  # in the mangled template arguments


def report(ptxas: str) -> list[tuple[str, str]]:
    """(kernel, its line about local memory) for each kernel and architecture of a -Xptxas -v report."""
    kernel, found = "", []
    for line in ptxas.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            kernel = match[1]
        elif "bytes stack frame" in line:
            found.append((kernel, line.strip()))
    return found


def main() -> int:
    stem, dashes, *nvcc = sys.argv[1:]
    assert dashes == "--", sys.argv
    result = subprocess.run([*nvcc, "-Xptxas", "-v"], stderr=subprocess.PIPE, text=True)
    kernels = report(result.stderr)
    if result.returncode != 0 or not kernels:
        sys.stderr.write(result.stderr)
        return result.returncode or 1
    bad = [
        f"{stem}: {kernel}: {line}"
        for kernel, line in kernels
        if any(int(n) for n in re.findall(r"(\d+) bytes", line))
        and not (stem in MAY_USE_LOCAL_MEMORY or FLOAT64.search(kernel))
    ]
    print(*bad, sep="\n", end="\n" if bad else "", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
