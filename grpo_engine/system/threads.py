"""The threads that kernels really use.

`torch.get_num_threads()` says what was asked for. A kernel takes fewer where its work is small, and one alone where the
extension was built without OpenMP. Here is what was measured: a check of "the same bits on n threads" must count them, or
it may compare one thread with itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from grpo_engine import _C

_RUNTIME = re.compile(r"/lib(gomp|iomp5|omp)(-[0-9a-f]+)?\.so[.\d]*$")  # wheels put a hash into the name


@dataclass(slots=True)
class ThreadCount:
    """How many threads took part; None until the block of `count_threads` has ended."""

    number: int | None = None


@contextlib.contextmanager
def count_threads() -> Iterator[ThreadCount]:
    """Counts the distinct threads that take part in the CPU kernels of a block.

    Kernels on CUDA and those of torch itself are not counted. Counts do not nest.

    Returns:
        The count, whose number is there after the block.
    """
    count = ThreadCount()
    _C.start_counting_threads()
    try:
        yield count
    finally:
        count.number = _C.stop_counting_threads()


@contextlib.contextmanager
def num_threads(number: int) -> Iterator[None]:
    """Has kernels and torch compute on so many threads within a block, and on as many as before after it.

    Args:
        number: at least 1; it may exceed the cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def openmp_runtimes() -> list[str] | None:
    """The OpenMP runtimes that this process has loaded. More than one means more than one pool of threads on the same cores.

    Returns:
        Paths of their files, sorted; None where the system does not say (it is not Linux).
    """
    if not sys.platform.startswith("linux"):
        return None
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths = {os.path.realpath(line.split(maxsplit=5)[5].strip()) for line in maps if "/" in line}
    return sorted(path for path in paths if _RUNTIME.search(path))
