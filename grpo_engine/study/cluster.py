"""Where a study's jobs run besides this machine: on a Ray cluster, or under Slurm.

Both start the command of a job in a process of its own on some node, which dies with the node's worker. Every node must
see the study's folder, the models and the data under the same paths, and run the same Python environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from grpo_engine.system.processes import end_with_parent

if TYPE_CHECKING:
    from grpo_engine.study.job import Job

_ROOT = str(Path(__file__).resolve().parents[2])  # where grpo_engine is imported from
_LOST = -signal.SIGKILL  # the exit code of a job whose worker is gone
_GRACE_S = 3.0


def run_command(command: Sequence[str], log: str, folder: str, threads: int) -> int:
    """Runs a job's command on a node; ends it, and all that it started, when interrupted.

    Args:
        command: words.
        log: path; standard output and error are appended to it.
        folder: to run in.
        threads: to compute on.

    Returns:
        The exit code.
    """
    path = os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with open(log, "ab") as out:
        out.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {os.uname().nodename}: {' '.join(command)}\n".encode())
        out.flush()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
                                   env=environment, start_new_session=True, preexec_fn=end_with_parent)  # fmt: skip
    try:
        return process.wait()
    finally:
        if process.returncode is None:
            _signal_group(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        _signal_group(process, signal.SIGKILL)  # also what the command left behind


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@dataclass(slots=True)
class _Handle:
    """A job on its way; its exit code is polled until it is known."""

    job: Job
    remote: Any  # Ray's reference, or submitit's job
    code: int | None = None

    def end(self, error: BaseException | None, code: int) -> int:
        """Notes how the job ended; what the cluster says of it goes into its log."""
        if error is not None:
            with open(self.job.log, "a", encoding="utf-8") as log:
                log.write("".join(traceback.format_exception_only(type(error), error)).strip() + "\n")
        self.code = code
        return code


@dataclass(slots=True)
class RayExecutor:
    """Jobs as Ray tasks; see `grpo_engine.study.executors.Executor`.

    Without an address, and with no RAY_ADDRESS in the environment, a cluster of this machine alone is started.

    Args:
        threads: CPUs that a job requests, and that it computes on.
        gpus: GPUs that a job requests; Ray tells it which in CUDA_VISIBLE_DEVICES.
        address: of a running cluster, for instance "auto".
        num_cpus: of the cluster that is started here; None: all of this machine.
    """

    threads: int = 1
    gpus: float = 0.0
    address: str | None = None
    num_cpus: int | None = None
    _task: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        ray = _import("ray", "ray")
        if not ray.is_initialized():
            address = self.address or os.environ.get("RAY_ADDRESS") or "local"  # "local": a cluster of our own
            ray.init(address=address, num_cpus=self.num_cpus, include_dashboard=False, log_to_driver=False,
                     runtime_env={"env_vars": {"PYTHONPATH": _ROOT}})  # fmt: skip
        self._task = ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_retries=0)(run_command)

    @property
    def slots(self) -> int:
        """How many jobs the cluster has room for."""
        import ray

        there = ray.cluster_resources()
        room = there.get("CPU", 0.0) / self.threads
        if self.gpus:
            room = min(room, there.get("GPU", 0.0) / self.gpus)
        return max(1, int(room))

    def start(self, job: Job) -> _Handle:
        """Hands a job to Ray, which starts it when there is room."""
        return _Handle(job, self._task.remote(job.command, os.fspath(job.log.resolve()), os.getcwd(), self.threads))

    def poll(self, handle: _Handle) -> int | None:
        """The exit code, or None; -SIGKILL when the job's worker or node is gone."""
        import ray

        if handle.code is None:
            ready, _ = ray.wait([handle.remote], timeout=0)
            if ready:
                try:
                    handle.code = ray.get(handle.remote)
                except (ray.exceptions.RayError, KeyboardInterrupt) as error:
                    failed = isinstance(error, ray.exceptions.RayTaskError)
                    handle.end(error, 1 if failed else _LOST)
        return handle.code

    def stop(self, handles: Sequence[_Handle]) -> None:
        """Interrupts jobs, and kills the workers of those that do not end."""
        import ray

        for force, wait_s in ((False, _GRACE_S + 5.0), (True, 5.0)):
            left = [h for h in handles if self.poll(h) is None]
            for handle in left:
                ray.cancel(handle.remote, force=force)
            if left:
                ray.wait([h.remote for h in left], num_returns=len(left), timeout=wait_s)


class _Submitted(Protocol):
    """What is used of a submitit job."""

    job_id: str
    state: str

    def done(self) -> bool: ...
    def result(self) -> int: ...
    def cancel(self, check: bool = True) -> None: ...


_ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "REQUEUED", "SUSPENDED", "COMPLETING")  # of Slurm


@dataclass(slots=True)
class SlurmExecutor:
    """Jobs submitted to Slurm by submitit; see `grpo_engine.study.executors.Executor`.

    A job outlives the study that submitted it. Its id is kept, so the same study, started again, waits for the job that
    is still there and does not submit another.

    Args:
        folder: of submitit's files and the ids.
        threads: CPUs of a job.
        cluster: "slurm", or "local" for processes of this machine in Slurm's place.
        slots: jobs that are submitted at a time.
        parameters: of submitit's AutoExecutor: timeout_min (a day unless given), gpus_per_node, slurm_partition, ...
    """

    folder: Path
    threads: int = 1
    cluster: str = "slurm"
    slots: int = 1000
    parameters: Mapping[str, Any] = field(default_factory=dict)
    _executor: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        submitit = _import("submitit", "submitit")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._executor = submitit.AutoExecutor(folder=os.fspath(self.folder.resolve()), cluster=self.cluster)
        settings = {"timeout_min": 24 * 60, "cpus_per_task": self.threads} | dict(self.parameters)
        self._executor.update_parameters(**settings)

    def start(self, job: Job) -> _Handle:
        """Submits a job, or finds it where an earlier run of this study has submitted it."""
        known = self.folder / f"{job.name.replace(' ', '-')}.id"
        if known.is_file():
            earlier = self.find(known.read_text(encoding="utf-8"))
            if earlier is not None and earlier.state in _ALIVE:
                return _Handle(job, earlier)
        self._executor.update_parameters(name=job.name.replace(" ", "-"))
        submitted = self._executor.submit(run_command, job.command, os.fspath(job.log.resolve()), os.getcwd(), self.threads)
        known.write_text(submitted.job_id, encoding="utf-8")
        return _Handle(job, submitted)

    def find(self, job_id: str) -> _Submitted | None:
        """A job by its id; None where processes stand in for Slurm, as those have none that lasts."""
        return None if self.cluster == "local" else self._executor.job_class(self._executor.folder, job_id)

    def poll(self, handle: _Handle) -> int | None:
        """The exit code, or None; -SIGKILL when Slurm ended the job."""
        if handle.code is None and handle.remote.done():
            import submitit

            try:
                handle.code = handle.remote.result()
            except submitit.core.utils.FailedJobError as error:
                handle.end(error, 1)
            except submitit.core.utils.UncompletedJobError as error:
                handle.end(error, _LOST)
        return handle.code

    def stop(self, handles: Sequence[_Handle]) -> None:
        """Cancels jobs and waits until they are gone, a minute at most."""
        left = [h for h in handles if self.poll(h) is None]
        for handle in left:
            handle.remote.cancel(check=False)
        deadline = time.monotonic() + 60.0
        while any(self.poll(h) is None for h in left) and time.monotonic() < deadline:
            time.sleep(0.1)


def _import(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise RuntimeError(f"this backend needs {package}: pip install 'grpo_engine[cluster]'") from None


def make_executor(
    backend: str, study_dir: str | os.PathLike[str], *, threads: int | None, options: Sequence[str] = ()
) -> Any:
    """An executor by name.

    Args:
        backend: "local", "ray" or "slurm".
        study_dir: the study's folder.
        threads: of each job; None: one on a cluster.
        options: "name=value": arguments of `RayExecutor`; for Slurm `cluster`, `slots` and parameters of submitit.

    Returns:
        The executor; None for "local", which `run_study` makes itself.

    Raises:
        ValueError: no such backend or option.
        RuntimeError: the backend's package is not installed.
    """
    given = {}
    for item in options:
        name, eq, text = item.partition("=")
        if not eq:
            raise ValueError(f"a cluster option must be name=value, got {item!r}")
        given[name] = yaml.safe_load(text)
    if backend == "local":
        if given:
            raise ValueError(f"the local backend has no options, got {', '.join(given)}")
        return None
    if backend == "ray":
        if unknown := sorted(set(given) - {"address", "gpus", "num_cpus"}):
            raise ValueError(f"ray options are address, gpus and num_cpus, got {', '.join(unknown)}")
        return RayExecutor(threads=threads or 1, **given)
    if backend == "slurm":
        own = {k: given.pop(k) for k in ("cluster", "slots") if k in given}
        return SlurmExecutor(Path(study_dir) / "slurm", threads=threads or 1, parameters=given, **own)
    raise ValueError(f"backend must be local, ray or slurm, got {backend!r}")
