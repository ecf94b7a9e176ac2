"""Where the jobs of a study run: processes of this machine, or a cluster (`grpo_engine.study.cluster`)."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from grpo_engine.study.core_share import CoreShare
from grpo_engine.study.job import Job, main
from grpo_engine.system.machine import num_cores
from grpo_engine.system.processes import ForkedProcess, become_job, kill_group, start_fork_server

_IMPORTED = ("grpo_engine.run.run", "grpo_engine.micro.task")  # with them all that a job needs


class Executor(Protocol):
    """Where jobs run. A handle is whatever `start` returns."""

    @property
    def slots(self) -> int:
        """How many jobs are worth starting side by side."""

    def start(self, job: Job) -> Any:
        """Starts a job and returns at once."""

    def poll(self, handle: Any) -> int | None:
        """The exit code, negative for a signal, or None while it runs; polled many times a second."""

    def stop(self, handles: Sequence[Any]) -> None:
        """Ends jobs and everything that they started; returns when they are gone."""


class LocalExecutor:
    """Processes on this machine, each the leader of its own process group, and killed with this one.

    Making one starts to import what jobs need, in a process beside this one.

    Args:
        threads: that each process computes on. None: the cores over the running jobs, and a job takes more or fewer as
            others end and start (`core_share.py`).
        devices: that jobs request (`grpo_engine.system.device.resolve`). Where one of them is cuda each cell sees one GPU
            alone.
        grace_s: seconds between SIGTERM and SIGKILL when stopping.
        run: what a job does: a function of a module, given the job's arguments, that returns the exit code.
            None: `main`.
    """

    def __init__(
        self,
        *,
        threads: int | None = None,
        devices: Collection[str] = (),
        grace_s: float = 3.0,
        run: Callable[[Sequence[str]], int] | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"LocalExecutor: threads must be at least 1, got {threads}")
        start_fork_server(_IMPORTED)
        self._threads = threads
        self._share = CoreShare(num_cores()) if threads is None else None
        self._running: list[ForkedProcess] = []
        self._grace_s = grace_s
        self._run = run or main
        from grpo_engine.system.device import resolve, visible_gpus  # torch, while that process imports it too

        self._gpus = visible_gpus() if "cuda" in map(resolve, devices) else []
        self._on_gpu: list[tuple[ForkedProcess, str]] = []  # started, and where

    @property
    def slots(self) -> int:
        """One job a GPU; on the CPU one a core, or fewer when each was given several threads."""
        return len(self._gpus) or max(1, num_cores() // (self._threads or 1))

    def _divide_cores(self, *, starting: int = 0) -> None:
        self._running = [process for process in self._running if process.exitcode is None]
        if self._share:
            self._share.divide(len(self._running) + starting)

    def _idlest_gpu(self) -> str:
        self._on_gpu = [(process, gpu) for process, gpu in self._on_gpu if process.exitcode is None]
        busy = [gpu for _, gpu in self._on_gpu]
        return min(self._gpus, key=busy.count)

    def start(self, job: Job) -> ForkedProcess:
        """Starts a job with its log appended to; see `Executor`."""
        with open(job.log, "a", encoding="utf-8") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(job.command)}\n")
        gpu = self._idlest_gpu() if self._gpus and job.cell else None
        threads = self._threads or self._share
        process = ForkedProcess(target=_run_job, args=(self._run, job.arguments, os.fspath(job.log), threads, gpu))
        self._divide_cores(starting=1)
        process.start()
        self._running.append(process)
        if gpu is not None:
            self._on_gpu.append((process, gpu))
        return process

    def poll(self, handle: ForkedProcess) -> int | None:
        """The exit code or None; see `Executor`."""
        code = handle.exitcode
        if code is not None and handle in self._running:
            self._divide_cores()
        return code

    def stop(self, handles: Sequence[ForkedProcess]) -> None:
        """SIGTERM to every process group, SIGKILL to what is left after the grace; see `Executor`."""
        for handle in handles:
            kill_group(handle, signal.SIGTERM)
        deadline = time.monotonic() + self._grace_s
        for handle in handles:
            handle.join(max(0.0, deadline - time.monotonic()))
        for handle in handles:
            kill_group(handle, signal.SIGKILL)  # also what the leader left behind in its group
            handle.join()


def _run_job(
    run: Callable[[Sequence[str]], int], arguments: Sequence[str], log: str, threads: int | CoreShare, gpu: str | None
) -> None:
    become_job(log)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA reads it when it starts, which it has not in the server or here
    import torch

    if isinstance(threads, CoreShare):
        with threads.followed():
            sys.exit(run(arguments))
    torch.set_num_threads(threads)
    sys.exit(run(arguments))
