"""Processes that do not run the caller's main module: fresh ones, and forks of one that has imported everything.

Imports no torch: reward workers import this module too.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.popen_forkserver
import multiprocessing.popen_spawn_posix
import multiprocessing.process
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator, Sequence

_lock = threading.Lock()
_SERVER_ENVIRONMENT = {
    # OpenBLAS starts its threads when numpy is imported, and nothing here multiplies with it
    "OPENBLAS_NUM_THREADS": "1",
    # A thread that waits sleeps. By default it spins, and where other processes want the cores it takes them from the
    # thread that it waits for: small models were 10 to 50 times slower on two threads than on one.
    "OMP_WAIT_POLICY": "passive",
}
_USERS_CHOICE = ("OMP_WAIT_POLICY",)
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    # multiprocessing has a new process run the caller's main module again. That would import torch there, and a script
    # without a main guard would start itself over. Our processes need nothing of it, so there is none to find.
    with _lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


class _NoMainModule:
    def _launch(self, process_obj: multiprocessing.process.BaseProcess) -> None:
        with _no_main_module():
            super()._launch(process_obj)  # type: ignore[misc]  # of the Popen beside it


class _SpawnPopen(_NoMainModule, multiprocessing.popen_spawn_posix.Popen):
    pass


class _ForkPopen(_NoMainModule, multiprocessing.popen_forkserver.Popen):
    def _launch(self, process_obj: multiprocessing.process.BaseProcess) -> None:
        with _environment(_SERVER_ENVIRONMENT):  # a server that was killed is started again here
            super()._launch(process_obj)


class SpawnedProcess(multiprocessing.context.SpawnProcess):
    """A fresh process."""

    @staticmethod
    def _Popen(process_obj: multiprocessing.process.BaseProcess) -> _SpawnPopen:
        return _SpawnPopen(process_obj)


class SpawnContext(multiprocessing.context.SpawnContext):
    """The `multiprocessing` context of fresh processes, to give to a pool."""

    Process = SpawnedProcess


class ForkedProcess(multiprocessing.context.ForkServerProcess):
    """A fork of the server that `start_fork_server` has started."""

    @staticmethod
    def _Popen(process_obj: multiprocessing.process.BaseProcess) -> _ForkPopen:
        return _ForkPopen(process_obj)


def start_fork_server(modules: Sequence[str]) -> None:
    """Starts the process that imports modules, while this one goes on; `ForkedProcess` then starts in milliseconds.

    Importing torch costs a second of CPU time. The server ends with this process, and one that was killed is
    started again with the next process.

    Args:
        modules: dotted names; importing them must start no thread (`become_job` refuses otherwise).
    """
    multiprocessing.forkserver.set_forkserver_preload(list(modules))
    with _environment(_SERVER_ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings | {name: value for name, value in before.items() if name in _USERS_CHOICE})
    try:
        yield
    finally:
        for name in settings:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def become_job(log: str) -> None:
    """What a `ForkedProcess` does first: it leads a session of its own, appends to a log, and is killed, with all that
    it starts, when the process that asked for it is gone.

    Args:
        log: path; standard output and error are appended to it.

    Raises:
        RuntimeError: the server has threads. A fork copies one of them only, in the middle of what the others do.
    """
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # nothing has replaced it
    if sys.platform.startswith("linux"):
        _end_with_server()
    threading.Thread(target=_end_with_asker, daemon=True).start()


def _end_with_asker() -> None:
    asker = multiprocessing.parent_process()
    assert asker is not None  # this process was started by one
    multiprocessing.connection.wait([asker.sentinel])
    os.killpg(0, signal.SIGKILL)


def end_with_parent() -> None:
    """Has this process killed when the one that started it is gone; Linux only, elsewhere it does nothing."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _end_with_server() -> None:
    # nobody would learn how this process ends
    server = os.getppid()
    end_with_parent()
    threads = len(os.listdir(f"/proc/{server}/task"))
    if threads != 1:
        raise RuntimeError(f"the process that was forked has {threads} threads, not 1: an import has started some")


def kill_group(job: ForkedProcess, number: int) -> None:
    """Sends a signal to a job and what it has started; where all are gone it does nothing.

    Args:
        job: started.
        number: of the signal.
    """
    assert job.pid is not None  # it was started
    try:
        os.killpg(job.pid, number)
    except (ProcessLookupError, PermissionError):
        if job.exitcode is None:  # it does not lead a group yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.pid, number)
