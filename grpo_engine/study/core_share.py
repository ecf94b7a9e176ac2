"""The cores of this machine, divided among the jobs of a study that are running.

The bits of an op do not depend on the number of threads, so a job may change it at any moment: when others end it takes
their cores, and when one starts it gives some back. The number lies in memory that the study and its jobs map, without a
file: nothing is left behind when they are killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.sharedctypes
import signal
from collections.abc import Iterator

_LOOK_S = 0.1  # of CPU time, between a job's looks at its number


class CoreShare:
    """How many threads each running job computes on. Give it to a job as an argument of its process.

    Args:
        cores: to divide.
    """

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._threads = multiprocessing.sharedctypes.RawValue(ctypes.c_int, cores)

    def divide(self, jobs: int) -> None:
        """Gives each job an equal part of the cores, at least one.

        Args:
            jobs: how many are running.
        """
        self._threads.value = max(1, self._cores // max(1, jobs))

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Has torch in this process compute on the number of threads as it is now and whenever it changes.

        For the main thread of a job: torch keeps the number for each thread, and a signal's handler runs in that one. It
        runs between two ops, never within one. The timer counts the job's CPU time, so it wakes no job that waits.
        """
        import torch

        def follow(*_: object) -> None:
            wanted = self._threads.value
            if torch.get_num_threads() != wanted:
                torch.set_num_threads(wanted)

        follow()
        before = signal.signal(signal.SIGVTALRM, follow)
        signal.siginterrupt(signal.SIGVTALRM, False)  # system calls of native code go on
        signal.setitimer(signal.ITIMER_VIRTUAL, _LOOK_S, _LOOK_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
            signal.signal(signal.SIGVTALRM, before)
