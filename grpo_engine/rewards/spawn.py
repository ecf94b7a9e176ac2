"""Fresh worker processes that do not run the caller's main module. Imports no torch: the workers import it too."""

from __future__ import annotations

import multiprocessing.context
import multiprocessing.popen_spawn_posix
import sys
import threading
import types

_lock = threading.Lock()


class WorkerPopen(multiprocessing.popen_spawn_posix.Popen):
    """Starts the process."""

    def _launch(self, process_obj: WorkerProcess) -> None:
        # A spawned process runs the caller's main module again. That would import torch there, and a script without
        # a main guard would start itself over. Workers need nothing of it, so for the moment there is none to find.
        with _lock:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            try:
                super()._launch(process_obj)
            finally:
                sys.modules["__main__"] = main


class WorkerProcess(multiprocessing.context.SpawnProcess):
    """A spawned process."""

    @staticmethod
    def _Popen(process_obj: WorkerProcess) -> WorkerPopen:
        return WorkerPopen(process_obj)


class WorkerContext(multiprocessing.context.SpawnContext):
    """The `multiprocessing` context to give to a pool."""

    Process = WorkerProcess
