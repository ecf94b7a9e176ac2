"""One process at a time in a folder: a lock that the kernel releases with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = ".lock"
FOREVER = math.inf


_held: set[int] = set()  # descriptors


def _let_go_in_child() -> None:
    """A forked child would hold the lock for as long as it outlives its parent."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go_in_child)


class Locked(RuntimeError):
    """Another process holds the lock; the message names it."""


@contextlib.contextmanager
def locked(path: Path, message: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Holds a lock file while the block runs. The kernel frees it when the process ends, however it ends.

    Args:
        path: the file, made when absent; it stays.
        message: of the error, to which the number of the process that holds the lock is added.
        wait_s: seconds to wait for another process; `FOREVER` waits until it is gone.

    Raises:
        Locked: another process held it all that time.
        OSError: the file cannot be made.
    """
    deadline = time.monotonic() + wait_s
    with open(path, "a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.read().strip()
                    raise Locked(message + (f" (process {holder})" if holder else "")) from None
                time.sleep(0.05)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        _held.add(file.fileno())
        try:
            yield
        finally:
            _held.discard(file.fileno())


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock; a file that is not there is not held."""
    if not path.exists():
        return False
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
