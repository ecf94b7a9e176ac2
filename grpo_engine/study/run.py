"""Runs the cells of a study side by side, and finishes what an earlier run left.

    study.yaml       the study
    plan.json        its cells, with estimated costs
    models/*.log     what preparing the embedded models printed
    cells/NAME.ID/   one run directory each (see `grpo_engine.records.records`), with cell.json, config.yaml and log.txt

A cell with a summary is done and is never run again; any other is started, and the trainer resumes from its last
checkpoint. So the same command, given again after a failure, a Ctrl-C or a power cut, does what is missing.

`run_study` decides what runs when; an `Executor` says where. `LocalExecutor` starts processes on this machine, which
are forks of one that has imported everything; `cluster.py` has those for Ray and Slurm.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from grpo_engine.model.hub import find_model
from grpo_engine.records import jsonl, records
from grpo_engine.records.cost import total_cost
from grpo_engine.study.design import PLAN_FILE, STUDY_FILE, Plan, StudyConfig, load_study, plan, save_study
from grpo_engine.study.display import Display
from grpo_engine.study.executors import Executor, LocalExecutor
from grpo_engine.study.forecast import Cost, dollars
from grpo_engine.study.job import CONFIG_FILE
from grpo_engine.study.jobs import MODELS, StudyResult, Tracked, failure_file, failure_of, jobs_of
from grpo_engine.study.plan_view import plan_json
from grpo_engine.study.status import read_progress
from grpo_engine.system.files import make_folder
from grpo_engine.system.locks import LOCK_FILE, locked

if TYPE_CHECKING:
    from rich.console import Console

_LOOK_S = 0.02  # between looks at whether a job has ended


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
        Locked: another process runs this study.
        FileNotFoundError: `study` is None and the folder has no study.yaml.
        ValueError: `jobs` or `attempts` is not positive, a wrong study, or a model folder that is not there.
    """
    folder = Path(study_dir)
    for name, value in (("jobs", jobs), ("attempts", attempts)):
        if value is not None and value < 1:
            raise ValueError(f"run_study: {name} must be at least 1, got {value}")
    if study is None:
        study = load_study(folder / STUDY_FILE)
    make_folder(folder)
    with locked(folder / LOCK_FILE, f"{folder}: another process runs this study"):
        # before the plan: it imports while this process does
        executor = executor or LocalExecutor(threads=threads, devices=_devices(study))
        jobs = executor.slots if jobs is None else jobs
        the_plan = measured_plan(folder, plan(study))
        _check_folders(the_plan)
        _write_plan(folder, the_plan)
        skipped = [c.name for c in the_plan.cells if records.is_complete(folder / c.folder)]
        tracked = jobs_of(folder, the_plan, set(skipped))
        display = Display(folder, the_plan, tracked, len(skipped), jobs, console)
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
            failures=tuple(failure_of(t) for t in tracked.values() if t.state == "failed"),
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
    jsonl.write_json_atomic(folder / PLAN_FILE, plan_json(the_plan))
    (folder / MODELS).mkdir(exist_ok=True)
    for cell in the_plan.cells:
        path = folder / cell.folder
        path.mkdir(parents=True, exist_ok=True)
        if records.is_complete(path):
            continue
        (path / CONFIG_FILE).write_text(
            f"# {cell.name} of study {the_plan.study.name}\n"
            + yaml.safe_dump(cell.config.model_dump(mode="json"), sort_keys=False),
            encoding="utf-8",
        )
        description = {
            "study": the_plan.study.name, "cell": cell.id, "name": cell.name, "axes": cell.axes,
            "variant": cell.variant,
            "method": cell.method, "size": cell.size, "kind": cell.kind, "seed": cell.seed, "tau": cell.tau,
            "group_size": cell.group_size, "steps": cell.config.steps,
        }  # fmt: skip
        jsonl.write_json_atomic(path / records.CELL_FILE, description)


def _loop(
    folder: Path,
    tracked: dict[str, Tracked],
    jobs: int,
    attempts: int,
    executor: Executor,
    display: Display,
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
                jsonl.write_json_atomic(failure_file(t.job.log), {"reason": failure_of(t).reason, "attempts": t.attempts})
            display.ended(t)
        for t in tracked.values():
            if t.state == "waiting" and any(tracked[n].state in ("failed", "blocked") for n in t.job.after):
                t.state = "blocked"
        running = sum(t.state == "running" for t in tracked.values())
        for t in tracked.values():  # in order of their chains
            if running >= jobs:
                break
            if t.state == "waiting" and all(tracked[n].state == "done" for n in t.job.after):
                failure_file(t.job.log).unlink(missing_ok=True)
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
            interrupt.wait(_LOOK_S)  # a free slot is taken at once


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
