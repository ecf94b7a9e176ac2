"""Runs the cells of a study side by side, and finishes what an earlier run left.

    study.yaml       the study
    plan.json        its cells, with estimated costs
    models/*.log     what preparing the embedded models printed
    cells/NAME.ID/   one run directory each (see `grpo_engine.records`), with cell.json, config.yaml and log.txt

A cell with a summary is done and is never run again; any other is started, and the trainer resumes from its last
checkpoint. So the same command, given again after a failure, a Ctrl-C or a power cut, does what is missing.

`run_study` decides what runs when; an `Executor` says where. `LocalExecutor` starts processes on this machine, which
are forks of one that has imported everything; `cluster.py` has those for Ray and Slurm.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import yaml

from .. import records
from ..cost import total_cost
from ..hub import find_model
from ..processes import ForkedProcess, become_job, kill_group, start_fork_server
from .core_share import CoreShare
from .design import (
    CELLS,
    PLAN_FILE,
    STUDY_FILE,
    Cell,
    ModelNeed,
    Plan,
    StudyConfig,
    duration,
    human,
    load_study,
    num_cores,
    plan,
    plan_json,
    save_study,
)
from .forecast import Cost, dollars

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LOCK_FILE = ".lock"
LOG_FILE = "log.txt"
CONFIG_FILE = "config.yaml"
MODELS = "models"
LOG_TAIL = 15  # lines of a failed cell's log that are shown
_LOOK_S = 0.02  # between looks at whether a job has ended
_IMPORTED = ("grpo_engine.train", "grpo_engine.tasks.micro")  # with them all that a job needs

State = Literal["waiting", "running", "done", "failed", "blocked"]


class StudyLocked(RuntimeError):
    """Another process runs this study."""


# --------------------------------------------------------------------------------------- executors


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One process to run. It succeeds when it exits with 0."""

    name: str
    arguments: tuple[str, ...]  # what `main` of this module is given
    log: Path  # standard output and error are appended to it
    after: tuple[str, ...]  # names of jobs that must be done first
    seconds: float  # estimate, for the order and the time left
    cell: Cell | None = None  # None for a model

    @property
    def command(self) -> tuple[str, ...]:
        """The command line that does the same."""
        return (sys.executable, "-m", __name__, *self.arguments)


class Executor(Protocol):
    """Where jobs run. A handle is whatever `start` returns."""

    slots: int  # how many jobs are worth starting side by side

    def start(self, job: Job) -> Any:
        """Starts a job and returns at once."""

    def poll(self, handle: Any) -> int | None:
        """The exit code, negative for a signal, or None while it runs; asked many times a second."""

    def stop(self, handles: Sequence[Any]) -> None:
        """Ends jobs and everything that they started; returns when they are gone."""


class LocalExecutor:
    """Processes on this machine, each the leader of its own process group, and killed with this one.

    Making one starts to import what jobs need, in a process beside this one.

    Args:
        threads: that each process computes on. None: the cores over the running jobs, and a job takes more or fewer as
            others end and start (`core_share.py`).
        devices: that jobs ask for (`grpo_engine.device.resolve`). Where one of them is cuda each cell sees one GPU alone.
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
        from ..device import resolve, visible_gpus  # torch, while that process imports it too

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


# ------------------------------------------------------------------------------------- the scheduler


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A cell or a model that did not come to its end."""

    name: str
    reason: str  # "exit code 1", "killed by SIGKILL"
    log: Path
    tail: str  # the last lines of the log

    def __str__(self) -> str:
        return f"{self.name} failed ({self.reason}); the end of {self.log}:\n" + "\n".join(
            f"    {line}" for line in self.tail.splitlines()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """How a run of a study ended."""

    done: tuple[str, ...]  # cells that this run finished
    skipped: tuple[str, ...]  # cells that were done before
    failures: tuple[Failure, ...]
    blocked: tuple[str, ...]  # never started, because what they need failed
    missing: tuple[str, ...]  # not finished, because the run was interrupted
    interrupted: int | None  # signal number
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 when every cell is done, 128 + signal when interrupted, else 1."""
        if self.interrupted is not None:
            return 128 + self.interrupted
        return 1 if self.failures or self.blocked else 0


@dataclass(slots=True)
class _Tracked:
    job: Job
    state: State = "waiting"
    handle: Any = None
    started: float = 0.0
    seconds: float | None = None  # how long it took
    attempts: int = 0
    progress: dict[str, Any] = field(default_factory=dict)


def run_study(
    study_dir: str | os.PathLike[str],
    *,
    study: StudyConfig | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    console: Console | None = None,
    executor: Executor | None = None,
    attempts: int = 2,
    poll_s: float = 0.2,
) -> StudyResult:
    """Runs every cell that is not done yet.

    Models of the embedded ladder are made first where they are not cached (base before instruct); whatever can run
    beside them does. The longest chain goes first. A cell that fails is tried again from its last checkpoint, then
    reported, and the others go on. SIGINT and SIGTERM end all processes; what they had finished of their cells stays,
    and the next run resumes there.

    Args:
        study_dir: the study's folder; made when absent.
        study: the study; None reads the folder's `study.yaml`.
        jobs: processes side by side; None: as many as the executor has room for.
        threads: threads of each process; None: its share of the cores, which grows and shrinks as others end and start.
        console: where progress goes (rich); None: standard error. On a terminal a live table, else plain lines.
        executor: where jobs run; None: a `LocalExecutor` with these threads, on the study's device.
        attempts: how often a cell or a model is started before it counts as failed.
        poll_s: seconds between looks at how far the running jobs are.

    Returns:
        What was done, skipped, failed and left.

    Raises:
        StudyLocked: another process runs this study.
        FileNotFoundError: `study` is None and the folder has no study.yaml.
        ValueError: `jobs` or `attempts` is not positive, a wrong study, or a model folder that is not there.
    """
    folder = Path(study_dir)
    for name, value in (("jobs", jobs), ("attempts", attempts)):
        if value is not None and value < 1:
            raise ValueError(f"run_study: {name} must be at least 1, got {value}")
    if study is None:
        study = load_study(folder / STUDY_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / LOCK_FILE, f"{folder}: another process runs this study"):
        # before the plan: it imports while this process does
        executor = executor or LocalExecutor(threads=threads, devices=_devices(study))
        jobs = executor.slots if jobs is None else jobs
        the_plan = measured_plan(folder, plan(study))
        _check_folders(the_plan)
        _write_plan(folder, the_plan)
        skipped = [c.name for c in the_plan.cells if records.is_complete(folder / c.folder)]
        tracked = _jobs(folder, the_plan, set(skipped))
        display = _Display(folder, the_plan, tracked, len(skipped), jobs, console)
        started = time.monotonic()
        with _Interrupt() as interrupt, display:
            try:
                _loop(folder, tracked, jobs, attempts, executor, display, interrupt, poll_s)
            finally:
                executor.stop([t.handle for t in tracked.values() if t.state == "running"])
        cells = [t for t in tracked.values() if t.job.cell]
        result = StudyResult(
            done=tuple(t.job.name for t in cells if t.state == "done"),
            skipped=tuple(skipped),
            failures=tuple(_failure(t) for t in tracked.values() if t.state == "failed"),
            blocked=tuple(t.job.name for t in cells if t.state == "blocked"),
            missing=tuple(t.job.name for t in cells if t.state in ("waiting", "running")),
            interrupted=interrupt.signal,
            seconds=time.monotonic() - started,
        )
        display.summary(result)
    return result


def _devices(study: StudyConfig) -> set[str]:
    runs = [*(s.run for s in study.sizes.values()), *(a.run for a in study.axes)]
    runs += [v for a in study.axes for v in a.variants.values()]
    return {study.run.get("device", "auto"), *(r["device"] for r in runs if "device" in r)}


def measured_plan(study_dir: str | os.PathLike[str], the_plan: Plan) -> Plan:
    """Replaces estimates by what was measured.

    Args:
        study_dir: the study's folder; it need not exist.
        the_plan: a plan with estimates.

    Returns:
        The plan in which a finished cell has its recorded cost, and the seconds of every other cell are scaled by
        how the finished ones compare with their estimates.

    Raises:
        ValueError: a malformed record, named by file and line.
    """
    folder = Path(study_dir)
    measured: dict[str, Cost] = {}
    for cell in the_plan.cells:
        if records.is_complete(folder / cell.folder):
            run = records.read_run(folder / cell.folder)
            last = run.steps[-1]
            seconds = sum(c.seconds for c in total_cost(run.timings).values())
            measured[cell.name] = Cost(
                trained_tokens=last.trained_tokens, flops=last.compute_ledger, seconds=seconds, measured=True,
                usd=dollars(seconds, the_plan.study.estimate),
            )  # fmt: skip
    estimated = sum(c.cost.seconds for c in the_plan.cells if c.name in measured)
    factor = sum(c.seconds for c in measured.values()) / estimated if estimated else 1.0
    cells = [
        replace(c, cost=measured.get(c.name) or replace(c.cost, seconds=c.cost.seconds * (factor or 1.0)))
        for c in the_plan.cells
    ]
    return replace(the_plan, cells=tuple(cells))


def _check_folders(the_plan: Plan) -> None:
    paths = dict.fromkeys(c.config.model.path for c in the_plan.cells if c.config.model.path is not None)
    absent = []
    for path in paths:
        try:  # fetched once, and not by every cell
            folder = find_model(path).folder
        except FileNotFoundError as error:
            absent.append(str(error))
            continue
        if not (folder / "config.json").is_file():
            absent.append(f"no config.json in {path}")
    if absent:
        raise ValueError(f"study {the_plan.study.name}: {'; '.join(absent)}: put your own folders under `sizes`")


def _write_plan(folder: Path, the_plan: Plan) -> None:
    save_study(the_plan.study, folder / STUDY_FILE)
    records.write_json_atomic(folder / PLAN_FILE, plan_json(the_plan))
    (folder / MODELS).mkdir(exist_ok=True)
    for cell in the_plan.cells:
        path = folder / cell.folder
        path.mkdir(parents=True, exist_ok=True)
        if records.is_complete(path):
            continue
        (path / CONFIG_FILE).write_text(
            f"# {cell.name} of study {the_plan.study.name}\n"
            + yaml.safe_dump(cell.config.model_dump(mode="json"), sort_keys=False)
        )
        description = {
            "study": the_plan.study.name, "cell": cell.id, "name": cell.name, "axes": cell.axes,
            "variant": cell.variant,
            "method": cell.method, "size": cell.size, "kind": cell.kind, "seed": cell.seed, "tau": cell.tau,
            "group_size": cell.group_size, "steps": cell.config.steps,
        }  # fmt: skip
        records.write_json_atomic(path / records.CELL_FILE, description)


def _jobs(folder: Path, the_plan: Plan, skipped: set[str]) -> dict[str, _Tracked]:
    """Models that are missing and cells that are not done, longest chain first."""
    wanted = [c for c in the_plan.cells if c.name not in skipped]
    needed = {c.needs for c in wanted if c.needs}
    needed |= {n.base for n in needed}
    missing = {n: cost for n, cost in the_plan.models if n in needed and not model_ready(n)}
    found: dict[str, Job] = {}
    for need, cost in missing.items():
        found[f"model {need.name}"] = Job(
            name=f"model {need.name}",
            arguments=("model", need.size, need.kind, str(need.seed)),
            log=folder / MODELS / f"{need.name}.log",
            after=(f"model {need.base.name}",) if need.kind == "instruct" and need.base in missing else (),
            seconds=cost.seconds,
        )
    for cell in wanted:
        path = folder / cell.folder
        found[cell.name] = Job(
            name=cell.name,
            arguments=("cell", os.fspath(path)),
            log=path / LOG_FILE,
            after=(f"model {cell.needs.name}",) if cell.needs in missing else (),
            seconds=cell.cost.seconds,
            cell=cell,
        )
    chain: dict[str, float] = {}

    def length(name: str) -> float:
        if name not in chain:
            chain[name] = found[name].seconds + max(
                (length(j.name) for j in found.values() if name in j.after), default=0.0
            )
        return chain[name]

    ranks = {name: position for position, name in enumerate(found)}
    return {n: _Tracked(found[n]) for n in sorted(found, key=lambda n: (-length(n), ranks[n]))}


def model_ready(need: ModelNeed) -> bool:
    """Whether a model of the embedded ladder lies in the cache already.

    Args:
        need: size, kind and seed.

    Returns:
        True when `grpo_engine.pretrain.ensure_model` would return without training.
    """
    from ..pretrain import cached_model

    return cached_model(need.size, need.kind, seed=need.seed) is not None


def _loop(
    folder: Path,
    tracked: dict[str, _Tracked],
    jobs: int,
    attempts: int,
    executor: Executor,
    display: _Display,
    interrupt: _Interrupt,
    poll_s: float,
) -> None:
    while interrupt.signal is None:
        for t in tracked.values():
            if t.state != "running":
                continue
            code = executor.poll(t.handle)
            if code is None:
                if t.job.cell:
                    t.progress = read_progress(folder / t.job.cell.folder)
                continue
            t.seconds = time.monotonic() - t.started
            ended = code == 0 and (t.job.cell is None or records.is_complete(folder / t.job.cell.folder))
            again = t.attempts < attempts and interrupt.signal is None
            t.state = "done" if ended else "waiting" if again else "failed"
            t.progress = read_progress(folder / t.job.cell.folder) if t.job.cell else {}
            t.progress["code"] = code
            if t.state == "failed":
                records.write_json_atomic(_failure_file(t.job), {"reason": _failure(t).reason, "attempts": t.attempts})
            display.ended(t)
        for t in tracked.values():
            if t.state == "waiting" and any(tracked[n].state in ("failed", "blocked") for n in t.job.after):
                t.state = "blocked"
        running = sum(t.state == "running" for t in tracked.values())
        for t in tracked.values():  # in order of their chains
            if running >= jobs:
                break
            if t.state == "waiting" and all(tracked[n].state == "done" for n in t.job.after):
                _failure_file(t.job).unlink(missing_ok=True)
                t.handle = executor.start(t.job)
                t.state, t.started = "running", time.monotonic()
                t.attempts += 1
                running += 1
                display.started(t)
        display.update()
        if running == 0 and not any(t.state == "waiting" for t in tracked.values()):
            return
        busy = [t.handle for t in tracked.values() if t.state == "running"]
        until = time.monotonic() + poll_s
        while interrupt.signal is None and time.monotonic() < until and all(executor.poll(h) is None for h in busy):
            interrupt.wait(_LOOK_S)  # a place that falls free is taken at once


def _failure_file(job: Job) -> Path:
    """Beside the job's log; there while its last attempt has failed."""
    return job.log.with_suffix(".failed.json")


def _failure(t: _Tracked) -> Failure:
    code = t.progress.get("code")
    if code is not None and code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            reason += ", perhaps because memory ran out"
    elif code == 0:
        reason = "it ended without writing summary.json"
    else:
        reason = f"exit code {code}"
    try:
        text = t.job.log.read_text(errors="replace")
    except OSError as error:
        text = f"(no log: {error})"
    return Failure(name=t.job.name, reason=reason, log=t.job.log, tail="\n".join(text.splitlines()[-LOG_TAIL:]))


@contextlib.contextmanager
def _locked(path: Path, message: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Holds a file lock, which the kernel releases with the process however it ends."""
    deadline = time.monotonic() + wait_s
    with open(path, "a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.read().strip()
                    raise StudyLocked(message + (f" (process {holder})" if holder else "")) from None
                time.sleep(0.05)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class _Interrupt:
    """Turns SIGINT and SIGTERM into a flag while it is entered (in the main thread; elsewhere it does nothing)."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._event = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: object) -> None:
        self.signal = number
        self._event.set()

    def wait(self, seconds: float) -> None:
        self._event.wait(seconds)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------ progress


def read_progress(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """How far a run has come, from the ends of its record files; never raises for a file that is being written.

    Args:
        run_dir: the run directory.

    Returns:
        {"step", "reward", "loss"}: the last step, its mean reward, and the last sampled test loss of an in-domain
        set; keys are absent where there is no record yet.
    """
    out: dict[str, Any] = {}
    path = Path(run_dir)
    for record in _tail(path / records.STEPS_FILE):
        out |= {"step": record.get("step"), "reward": record.get("reward_mean")}
    for record in _tail(path / records.EVALS_FILE):
        if record.get("mode") == "sample" and record.get("in_domain"):
            out.setdefault("eval_set", record.get("eval_set"))
            if record.get("eval_set") == out["eval_set"]:
                out["loss"] = record.get("loss")
    return {k: v for k, v in out.items() if v is not None}


def _tail(path: Path, num_bytes: int = 16384) -> list[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - num_bytes))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return []
    out = []
    for line in lines[1 if size > num_bytes else 0 :]:
        with contextlib.suppress(ValueError):
            obj = json.loads(line)
            if isinstance(obj, dict):
                out.append(obj)
    return out


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1] if lines and not lines[-1].startswith("---") else ""


class _Display:
    """A live table on a terminal, plain lines elsewhere (one when a job starts or ends, and one a minute)."""

    EVERY_S = 60.0

    def __init__(
        self,
        folder: Path,
        the_plan: Plan,
        tracked: Mapping[str, _Tracked],
        num_skipped: int,
        jobs: int,
        console: Console | None,
    ) -> None:
        from rich.console import Console

        self.console = console or Console(stderr=True)
        self.folder = folder
        self.study = the_plan.study.name
        self.num_cells = len(the_plan.cells)
        self.folders = {c.folder for c in the_plan.cells}
        self.tracked = tracked
        self.num_skipped = num_skipped
        self.jobs = jobs
        self.losses: dict[str, float] = {}  # the last of each cell
        self.last_loss = ""
        self.live: Any = None
        self.last = time.monotonic()

    def __enter__(self) -> _Display:
        self._say(
            f"study {self.study} in {self.folder}: {self.num_cells} cells, {self.num_skipped} done before, "
            f"{len(self.tracked) - (self.num_cells - self.num_skipped)} models to prepare, {self.jobs} at once"
        )
        if strangers := self._strangers():
            self._say(f"{strangers} folders of an earlier plan lie in {self.folder / CELLS} and are left alone")
        if self.console.is_terminal:
            from rich.live import Live

            self.live = Live(self._table(), console=self.console, refresh_per_second=4, transient=True)
            self.live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.live.update(self._table())
            self.live.__exit__(None, None, None)

    def _strangers(self) -> int:
        """Folders of cells that the study no longer has, because a setting or the engine's defaults changed."""
        found = {f"{CELLS}/{p.name}" for p in (self.folder / CELLS).iterdir() if p.is_dir()}
        return len(found - self.folders)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def started(self, t: _Tracked) -> None:
        if not self.live:
            self._say(f"{t.job.name}: started")

    def ended(self, t: _Tracked) -> None:
        if t.state == "failed":
            self._say(str(_failure(t)))
        elif t.state == "waiting":
            self._say(f"{t.job.name}: {_failure(t).reason}; it is started again ({t.job.log})")
        elif not self.live:
            loss = t.progress.get("loss")
            end = f", test loss {loss:.3f}" if loss is not None else ""
            self._say(f"{t.job.name}: done in {duration(t.seconds or 0)}{end} ({self._counts()})")

    def update(self) -> None:
        self._note_losses()
        if self.live:
            self.live.update(self._table())
        elif time.monotonic() - self.last >= self.EVERY_S:
            self.last = time.monotonic()
            running = "; ".join(
                f"{t.job.name} {self._step(t)}".strip() for t in self.tracked.values() if t.state == "running"
            )
            self._say(f"{self._counts(every=True)}: {running}")

    def summary(self, result: StudyResult) -> None:
        text = f"study {self.study}: {len(result.done) + len(result.skipped)} of {self.num_cells} cells done"
        if result.interrupted is not None:
            text += f", interrupted by {signal.Signals(result.interrupted).name}; the same command goes on from here"
        if result.failures:
            text += f"; failed: {', '.join(f.name for f in result.failures)}"
        if result.blocked:
            text += f"; not started for want of their model: {', '.join(result.blocked)}"
        self._say(f"{text} ({duration(result.seconds)})")

    def _counts(self, *, every: bool = False) -> str:
        """Cells done and time left; with `every`, also what runs, what failed and the last test loss."""
        of = {s: [t for t in self.tracked.values() if t.state == s] for s in ("done", "running", "failed")}
        parts = [f"{self.num_skipped + sum(t.job.cell is not None for t in of['done'])} of {self.num_cells} cells"]
        if every:
            parts += [f"{len(of[s])} {s}" for s in ("running", "failed") if of[s]]
        if (left := self._seconds_left()) is not None:
            parts.append(f"about {duration(left)} left")
        if every and self.last_loss:
            parts.append(self.last_loss)
        return ", ".join(parts)

    def _note_losses(self) -> None:
        for t in self.tracked.values():
            loss = t.progress.get("loss")
            if loss is not None and self.losses.get(t.job.name) != loss:
                self.losses[t.job.name] = loss
                self.last_loss = f"last test loss {loss:.3f} ({t.job.name})"

    def _seconds_left(self) -> float | None:
        """Estimates of the plan, scaled by how they did so far, over the processes that can be kept busy."""
        now = time.monotonic()
        spent = planned = left = longest = 0.0
        for t in self.tracked.values():
            share = 0.0
            if t.state == "done":
                spent, planned = spent + (t.seconds or 0), planned + t.job.seconds
            elif t.state == "running":
                steps = t.job.cell.config.steps if t.job.cell else 0
                share = t.progress.get("step", 0) / steps if steps else 0.0
                if share > 0:
                    spent, planned = spent + now - t.started, planned + t.job.seconds * share
            if t.state in ("running", "waiting"):
                left += t.job.seconds * (1 - share)
                longest = max(longest, t.job.seconds * (1 - share))
        if planned == 0 or left == 0:
            return None
        return max(left / self.jobs, longest) * spent / planned

    def _step(self, t: _Tracked) -> str:
        if t.job.cell is None:
            return _last_line(t.job.log)
        return f"step {t.progress.get('step', 0)} of {t.job.cell.config.steps}"

    def _table(self) -> RenderableType:
        from rich.table import Table

        table = Table(title=f"{self.study}: {self._counts(every=True)}", title_justify="left", expand=False)
        for name, side in (("cell", "left"), ("state", "left"), ("reward", "right"), ("test loss", "right"),
                           ("time left", "right")):  # fmt: skip
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        rows = list(self.tracked.values())
        room = max(4, self.console.size.height - 8)
        if len(rows) > room:  # what runs and what failed first, then what is next
            rank = {"failed": 0, "running": 1, "waiting": 2, "blocked": 3, "done": 4}
            rows = sorted(rows, key=lambda t: rank[t.state])[:room]
        for t in rows:
            reward, loss = t.progress.get("reward"), t.progress.get("loss")
            left = ""
            if t.state == "running" and t.job.cell and t.progress.get("step"):
                step = t.progress["step"]
                left = duration((time.monotonic() - t.started) / step * (t.job.cell.config.steps - step))
            elif t.state == "done":
                left = f"in {duration(t.seconds or 0)}"
            style = {"failed": "red", "running": "bold", "done": "green", "waiting": "dim", "blocked": "red"}[t.state]
            state = self._step(t) if t.state == "running" else t.state
            table.add_row(
                t.job.name,
                state,
                "" if reward is None else f"{reward:.3f}",
                "" if loss is None else f"{loss:.3f}",
                left,
                style=style,
            )
        if len(self.tracked) > len(rows):
            table.caption = f"and {len(self.tracked) - len(rows)} more"
        return table


# ------------------------------------------------------------------------------------------- status


@dataclass(frozen=True, kw_only=True, slots=True)
class CellStatus:
    """How far one cell is."""

    cell: Cell
    state: Literal["done", "running", "failed", "partial", "missing"]
    step: int
    seconds: float | None  # of its recorded steps; None before the first step
    loss: float | None = None  # the last sampled test loss of the first set in domain
    reason: str | None = None  # of a failure

    def __str__(self) -> str:
        steps = self.cell.config.steps
        if self.state in ("running", "partial"):
            return f"{self.state} {self.step} of {steps}"
        return self.state if self.reason is None else f"failed at {self.step} of {steps} ({self.reason})"


def study_status(study_dir: str | os.PathLike[str]) -> tuple[CellStatus, ...]:
    """What of a study is done, running, failed, begun or missing, from its records alone.

    Args:
        study_dir: a folder that `run_study` was given.

    Returns:
        One status a cell, in the plan's order.

    Raises:
        FileNotFoundError: no study.yaml there.
        ValueError: a wrong study.yaml.
    """
    folder = Path(study_dir)
    out = []
    for cell in plan(load_study(folder / STUDY_FILE)).cells:
        path = folder / cell.folder
        progress, reason = read_progress(path), None
        step = progress.get("step", 0)
        failed = (path / LOG_FILE).with_suffix(".failed.json")
        if records.is_complete(path):
            state = "done"
        elif _is_locked(path / LOCK_FILE):
            state = "running"
        elif failed.is_file():
            state, reason = "failed", records.read_json(failed)["reason"]
        else:
            state = "partial" if step else "missing"
        seconds = None
        if (path / records.TIMINGS_FILE).is_file():
            found = records.read_jsonl(path / records.TIMINGS_FILE, allow_torn=True).records
            timings = [records.from_json(records.TimingRecord, o, where=str(path)) for o in found]
            seconds = sum(c.seconds for c in total_cost(timings).values()) if timings else None
        out.append(
            CellStatus(cell=cell, state=state, step=step, seconds=seconds, loss=progress.get("loss"), reason=reason)  # type: ignore[arg-type]
        )
    return tuple(out)


# ------------------------------------------------------------------------- what a started process does


def main(arguments: Sequence[str]) -> int:
    """What the processes do that `run_study` starts: `model SIZE KIND SEED` or `cell FOLDER`.

    Args:
        arguments: these words.

    Returns:
        The exit code.

    Raises:
        ValueError: other words than these.
    """
    from ..startup import skip_compiler

    skip_compiler()
    match list(arguments):
        case ["model", size, kind, seed]:
            from ..pretrain import ensure_model

            print(ensure_model(size, kind, seed=int(seed), progress=_print_progress()), flush=True)
        case ["cell", folder]:
            from ..config import load_run_config
            from ..train import train

            path = Path(folder)
            with _locked(path / LOCK_FILE, f"{path}: another process runs this cell", wait_s=10.0):
                train(load_run_config(path / CONFIG_FILE), path)
        case _:
            raise ValueError(f"expected 'model SIZE KIND SEED' or 'cell FOLDER', got {' '.join(arguments)!r}")
    return 0


def _print_progress() -> Callable[[int, int, float], None]:
    """Prints how far a pretraining is, at most every two seconds."""
    last = 0.0

    def progress(read: int, total: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last >= 2.0:
            last = time.monotonic()
            print(f"{read / total:.0%} of {human(total)} tokens, loss {loss:.3f}", flush=True)

    return progress


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
