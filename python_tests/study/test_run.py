import functools
import io
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import jobs
import models
import pytest
from rich.console import Console

from grpo_engine.micro.tokenizer import MicroTokenizer
from grpo_engine.model import weights
from grpo_engine.records import jsonl, records
from grpo_engine.study import executors, status
from grpo_engine.study import jobs as jobs_module
from grpo_engine.study import run as run_
from grpo_engine.study.design import AxesConfig, SizeConfig, StudyConfig, plan, save_study
from grpo_engine.study.executors import LocalExecutor
from grpo_engine.study.job import CONFIG_FILE, Job, main
from grpo_engine.study.run import run_study
from grpo_engine.study.status import study_status
from grpo_engine.system import locks
from grpo_engine.system.locks import LOCK_FILE, Locked
from grpo_engine.system.machine import num_cores

STUDY = StudyConfig(
    name="demo",
    run={"steps": 4, "batch": {"prompts": 8, "group_size": 2}, "evaluation": {"count": 0}},
    sizes={"xs": SizeConfig(), "s": SizeConfig()},
    axes=(AxesConfig(kinds=("base", "instruct"), seeds=(0, 1)),),
)
NAMES = [c.name for c in plan(STUDY).cells]
IDS = [c.id for c in plan(STUDY).cells]


def finish(cell, folder):
    jsonl.write_json_atomic(folder / "run.json", {"run_id": cell.id, "config": {}, "model": {}})
    with jsonl.JsonlWriter(folder / "steps.jsonl") as out:
        out.write(
            records.StepRecord(
                step=cell.config.steps, prompts_seen=0, unique_prompts=0, trained_tokens=7, compute_6nt=1.0,
                compute_ledger=2.0, reward_mean=0.5,
            )
        )  # fmt: skip
    (folder / "evals.jsonl").touch()
    with jsonl.JsonlWriter(folder / "timings.jsonl") as out:
        cost = records.PhaseCost(seconds=2 * cell.cost.seconds)
        out.write(records.TimingRecord(step=cell.config.steps, phase={"forward": cost}))
    jsonl.write_json_atomic(folder / "summary.json", {"steps": cell.config.steps})


class FakeExecutor:
    """Does a job's work the second time it is polled; fails those whose name is in `fails`, or `once`."""

    slots = 2

    def __init__(self, folder, fails=(), at_poll=None, silent=(), once=()):
        self.folder, self.fails, self.silent, self.at_poll = folder, set(fails), set(silent), at_poll
        self.once = set(once)
        self.order, self.running, self.most, self.stopped = [], set(), 0, []

    def start(self, job):
        assert not any(name in self.running for name in job.after)
        self.order.append(job.name)
        self.running.add(job.name)
        self.most = max(self.most, len(self.running))
        job.log.write_text(f"one\ntwo of {job.name}\n")
        return {"job": job, "polls": 0}

    def poll(self, handle):
        job = handle["job"]
        handle["polls"] += 1
        if self.at_poll:
            self.at_poll()
        if handle["polls"] < 2:
            return None
        self.running.discard(job.name)
        if job.name in self.fails or (job.name in self.once and self.order.count(job.name) == 1):
            return 3
        if job.cell and job.name not in self.silent:
            finish(job.cell, self.folder / job.cell.folder)
        return 0

    def stop(self, handles):
        self.stopped += [h["job"].name for h in handles]


@pytest.fixture(autouse=True)
def no_cached_models(monkeypatch):
    monkeypatch.setattr(jobs_module, "model_ready", lambda need: False)


def run_it(folder, executor, **more):
    text = io.StringIO()
    console = Console(file=text, width=200)
    result = run_study(folder, study=STUDY, jobs=2, console=console, executor=executor, poll_s=0.0, **more)
    return result, text.getvalue()


def test_every_cell_runs_once_after_its_model(tmp_path):
    executor = FakeExecutor(tmp_path)
    result, text = run_it(tmp_path, executor)
    assert result.exit_code == 0 and sorted(result.done) == sorted(NAMES) and result.skipped == ()
    assert len(executor.order) == len(set(executor.order)) == 2 * len(NAMES)  # each seed has a model of its own
    at = executor.order.index
    for size, seed in itertools.product(("xs", "s"), (0, 1)):
        assert at(f"model {size}-base-{seed}") < at(f"model {size}-instruct-{seed}") < at(f"{size}-instruct-seed{seed}")
        assert at(f"model {size}-base-{seed}") < at(f"{size}-base-seed{seed}")
    assert executor.most == 2
    assert at("model s-base-0") == 0  # the longest chain first
    assert "8 of 8 cells done" in text


def test_a_second_run_does_nothing(tmp_path):
    run_it(tmp_path, FakeExecutor(tmp_path))
    executor = FakeExecutor(tmp_path)
    result, text = run_it(tmp_path, executor)
    assert executor.order == [] and sorted(result.skipped) == sorted(NAMES) and result.exit_code == 0
    assert "8 done before" in text


def test_cells_that_a_changed_study_no_longer_has_are_mentioned_and_left_alone(tmp_path):
    run_it(tmp_path, FakeExecutor(tmp_path))
    longer = STUDY.model_copy(update={"run": STUDY.run | {"steps": 5}})
    text = io.StringIO()
    result = run_study(tmp_path, study=longer, jobs=2, console=Console(file=text, width=200),
                       executor=FakeExecutor(tmp_path), poll_s=0.0)  # fmt: skip
    assert len(result.done) == len(NAMES) and result.skipped == ()
    assert f"{len(NAMES)} folders of an earlier plan" in text.getvalue()
    assert len(list((tmp_path / "cells").iterdir())) == 2 * len(NAMES)


def test_a_failure_names_the_cell_and_shows_its_log_and_the_others_go_on(tmp_path):
    result, text = run_it(tmp_path, first := FakeExecutor(tmp_path, fails=["s-base-seed1"]))
    assert result.exit_code == 1 and [f.name for f in result.failures] == ["s-base-seed1"]
    assert first.order.count("s-base-seed1") == 2  # it was tried again
    assert sorted(result.done) == sorted(set(NAMES) - {"s-base-seed1"})
    assert "s-base-seed1 failed (exit code 3)" in text and "    two of s-base-seed1" in text
    again, _ = run_it(tmp_path, second := FakeExecutor(tmp_path))
    assert again.exit_code == 0 and [n for n in second.order if not n.startswith("model")] == ["s-base-seed1"]


def test_a_cell_that_fails_once_is_started_again_and_is_no_failure(tmp_path):
    result, text = run_it(tmp_path, executor := FakeExecutor(tmp_path, once=["xs-base-seed0", "model s-base-0"]))
    assert result.exit_code == 0 and sorted(result.done) == sorted(NAMES) and result.failures == ()
    assert executor.order.count("xs-base-seed0") == executor.order.count("model s-base-0") == 2
    assert "xs-base-seed0: exit code 3; it is started again" in text
    (tmp_path / "strict").mkdir()
    strict, _ = run_it(tmp_path / "strict", FakeExecutor(tmp_path / "strict", once=["xs-base-seed0"]), attempts=1)
    assert [f.name for f in strict.failures] == ["xs-base-seed0"]


def test_a_failed_model_blocks_what_needs_it_and_nothing_else(tmp_path):
    result, text = run_it(tmp_path, FakeExecutor(tmp_path, fails=["model s-base-0"]))
    assert result.exit_code == 1 and [f.name for f in result.failures] == ["model s-base-0"]
    blocked = ["s-base-seed0", "s-instruct-seed0"]
    assert sorted(result.blocked) == blocked
    assert sorted(result.done) == sorted(set(NAMES) - set(blocked))
    assert "not started for want of their model" in text


def test_a_cell_that_ends_without_a_summary_has_failed(tmp_path):
    result, _ = run_it(tmp_path, FakeExecutor(tmp_path, silent=["xs-base-seed0"]))
    assert [f.reason for f in result.failures] == ["it ended without writing summary.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_what_runs_and_keeps_the_rest(tmp_path, number):
    polls = []

    def at_poll():
        polls.append(1)
        if len(polls) == 9:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    executor = FakeExecutor(tmp_path, at_poll=at_poll)
    result, text = run_it(tmp_path, executor)
    assert result.interrupted == number and result.exit_code == 128 + number
    assert set(executor.stopped) == executor.running and executor.running
    assert result.missing and "the same command goes on from here" in text
    assert signal.getsignal(number) == before
    again, _ = run_it(tmp_path, FakeExecutor(tmp_path))
    assert again.exit_code == 0 and sorted(again.done + again.skipped) == sorted(NAMES)


def test_two_runs_in_one_folder_refuse(tmp_path):
    seen = []

    def at_poll():
        if not seen:
            with pytest.raises(Locked, match=f"another process runs this study .process {os.getpid()}"):
                run_it(tmp_path, FakeExecutor(tmp_path))
            seen.append(1)

    result, _ = run_it(tmp_path, FakeExecutor(tmp_path, at_poll=at_poll))
    assert seen and result.exit_code == 0
    assert run_it(tmp_path, FakeExecutor(tmp_path))[0].exit_code == 0  # and the lock is gone


def test_a_folder_describes_its_study(tmp_path):
    run_it(tmp_path, FakeExecutor(tmp_path))
    rows = jsonl.read_json(tmp_path / "plan.json")["cells"]
    assert [r["name"] for r in rows] == NAMES
    for cell in plan(STUDY).cells:
        described = jsonl.read_json(tmp_path / cell.folder / "cell.json")
        assert (described["study"], described["cell"], described["tau"]) == ("demo", cell.id, 1.0)
    without_argument = run_study(tmp_path, jobs=1, console=Console(file=io.StringIO()), executor=FakeExecutor(tmp_path))
    assert sorted(without_argument.skipped) == sorted(NAMES)


def test_measured_costs_replace_and_scale_the_estimates(tmp_path):
    before = plan(STUDY)
    assert run_.measured_plan(tmp_path, before) == before
    first = before.cells[0]
    (tmp_path / first.folder).mkdir(parents=True)
    finish(first, tmp_path / first.folder)
    after = run_.measured_plan(tmp_path, before)
    cost = after.cells[0].cost
    assert (cost.trained_tokens, cost.flops, cost.seconds, cost.measured) == (7, 2.0, 2 * first.cost.seconds, True)
    for old, new in zip(before.cells[1:], after.cells[1:], strict=True):
        assert new.cost.seconds == pytest.approx(2 * old.cost.seconds) and not new.cost.measured


def test_a_folder_without_a_study_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="study.yaml"):
        run_study(tmp_path / "none")
    for name in ("jobs", "attempts"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            run_study(tmp_path, study=STUDY, **{name: 0})


def test_a_device_that_is_not_there_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo_engine.system.device.has_cuda_kernels", lambda: False)
    on_gpus = STUDY.model_copy(update={"run": STUDY.run | {"device": "cuda"}})
    with pytest.raises(ValueError, match="device=cuda: this build has no CUDA kernels"):
        run_study(tmp_path / "gpu", study=on_gpus)
    assert not list((tmp_path / "gpu").glob("cells/*"))


def test_a_model_folder_that_is_not_there_is_named_before_anything_runs(tmp_path):
    sizes = {"tiny": SizeConfig(base=str(tmp_path / "nowhere"), params_nominal=1e6)}
    study = StudyConfig(name="demo", sizes=sizes, axes=(AxesConfig(),))
    with pytest.raises(ValueError, match="study demo: .*nowhere: no such folder, .*put your own folders"):
        run_study(tmp_path / "study", study=study, executor=FakeExecutor(tmp_path))


def test_status_tells_done_running_partial_and_missing(tmp_path):
    run_it(tmp_path, FakeExecutor(tmp_path, fails=NAMES))
    cells = plan(STUDY).cells
    finish(cells[0], tmp_path / cells[0].folder)
    assert [s.reason for s in study_status(tmp_path)] == [None, *["exit code 3"] * 7]
    for cell in cells[2:4]:
        (tmp_path / cell.folder / "log.failed.json").unlink()
    for cell in cells[1:3]:
        with jsonl.JsonlWriter(tmp_path / cell.folder / "steps.jsonl") as out:
            out.write({"step": 2, "reward_mean": 0.25})
    with locks.locked(tmp_path / cells[1].folder / LOCK_FILE, "held"):
        states = [str(s) for s in study_status(tmp_path)]
    assert states[:4] == ["done", "running 2 of 4", "partial 2 of 4", "missing"]
    assert str(study_status(tmp_path)[1]) == "failed at 2 of 4 (exit code 3)"


def test_progress_is_read_from_a_file_that_is_being_written(tmp_path):
    assert status.read_progress(tmp_path) == {}
    with jsonl.JsonlWriter(tmp_path / "steps.jsonl") as out:
        for step in range(1, 400):
            out.write({"step": step, "reward_mean": step / 400, "padding": "x" * 100})
    with open(tmp_path / "steps.jsonl", "ab") as out:
        out.write(b'{"schema":1,"step":40')
    with jsonl.JsonlWriter(tmp_path / "evals.jsonl") as out:
        for name, inside, mode, loss in (("chain", True, "sample", 0.5), ("chain", True, "greedy", 0.1),
                                         ("word", True, "sample", 0.6), ("code", False, "sample", 0.9)):  # fmt: skip
            out.write({"eval_set": name, "in_domain": inside, "mode": mode, "loss": loss})
    progress = status.read_progress(tmp_path)
    assert (progress["step"], progress["reward"], progress["loss"]) == (399, 399 / 400, 0.5)


def test_a_terminal_gets_a_live_table(tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=120, height=40, force_terminal=True, color_system=None)
    executor = FakeExecutor(tmp_path, fails=["s-base-seed1"])
    run_study(tmp_path, study=STUDY, jobs=2, console=console, executor=executor, poll_s=0.0)
    assert "time left" in text.getvalue() and "7 of 8 cells, 1 failed" in text.getvalue()


# ------------------------------------------------------------------------------- real processes


@pytest.fixture
def executor():
    """Makes executors whose jobs are code."""
    return functools.partial(LocalExecutor, run=jobs.run)


def job(tmp_path, code, name="log"):
    return Job(name="job", arguments=(textwrap.dedent(code),), log=tmp_path / f"{name}.txt", after=(), seconds=1.0)


def printed(path):
    """The lines that a job has written below the line that says what it is."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    starts = [i for i, line in enumerate(lines) if line.startswith("--- ")]
    below = [line for line in lines[starts[-1] + 1 :]] if starts else []
    return [line.rstrip("\n") for line in below if line.endswith("\n")]


def exit_code(executor, handle, seconds=30.0):
    wait_for(lambda: executor.poll(handle) is not None, seconds)
    return executor.poll(handle)


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


GRANDCHILD = """
    import os, signal, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    signal.signal(signal.SIGTERM, {handler})
    time.sleep(60)
"""


@pytest.mark.parametrize("handler", ["signal.SIG_DFL", "signal.SIG_IGN"])
def test_stopping_ends_the_whole_group_even_when_it_will_not(tmp_path, executor, handler):
    local = executor(grace_s=0.3)
    handle = local.start(job(tmp_path, GRANDCHILD.format(handler=handler)))
    log = tmp_path / "log.txt"
    wait_for(lambda: printed(log) and printed(log)[-1].isdigit())
    child = int(printed(log)[-1])
    assert local.poll(handle) is None and alive(child)
    local.stop([handle])
    assert local.poll(handle) < 0
    wait_for(lambda: not alive(child))


def test_the_log_and_the_threads_of_a_process(tmp_path, executor):
    (tmp_path / "log.txt").write_text("an earlier line\n")
    local = executor(threads=3)
    code = "import os, sys, torch; print(torch.get_num_threads(), os.getpid() == os.getsid(0)); sys.exit('to stderr')"
    assert exit_code(local, local.start(job(tmp_path, code))) == 1
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[0] == "an earlier line" and "-m grpo_engine.study.job import os" in lines[1]
    assert lines[-2:] == ["3 True", "to stderr"]
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        LocalExecutor(threads=0)


def test_each_cell_has_a_gpu_of_its_own(tmp_path, executor, monkeypatch):
    monkeypatch.setattr("grpo_engine.system.device.resolve", lambda device: "cuda" if device == "auto" else device)
    monkeypatch.setattr("grpo_engine.system.device.visible_gpus", lambda: ["5", "GPU-8f6d"])
    assert [c.id for c in plan(STUDY).cells] == IDS  # not the planning machine's business
    assert executor(devices=["cpu"], threads=num_cores()).slots == 1
    local = executor(devices=["cpu", "auto"])
    assert local.slots == 2
    code = "import os, time; print(os.environ.get('CUDA_VISIBLE_DEVICES')); time.sleep({})"
    cell = plan(STUDY).cells[0]

    def start(name, seconds):
        return local.start(replace(job(tmp_path, code.format(seconds), name), cell=cell))

    waiting = start("first", 30)
    for name in ("second", "third"):  # the second GPU falls free
        assert exit_code(local, start(name, 0)) == 0
    assert exit_code(local, local.start(job(tmp_path, code.format(0), "model"))) == 0  # pretraining is the CPU's
    wait_for(lambda: printed(tmp_path / "first.txt"))
    local.stop([waiting])
    seen = [printed(tmp_path / f"{name}.txt")[-1] for name in ("first", "second", "third", "model")]
    assert seen == ["5", "GPU-8f6d", "GPU-8f6d", str(os.environ.get("CUDA_VISIBLE_DEVICES"))]


def test_one_job_that_raises_and_one_that_is_killed_leave_the_others_alone(tmp_path, executor):
    local = executor()
    raising = local.start(job(tmp_path, "raise KeyError('lost')", "raising"))
    killed = local.start(job(tmp_path, "import os; os.kill(os.getpid(), 9)", "killed"))
    staying = local.start(job(tmp_path, "input_ = __import__('sys').stdin.read(); __import__('time').sleep(1)", "staying"))
    assert exit_code(local, raising) == 1 and printed(tmp_path / "raising.txt")[-1] == "KeyError: 'lost'"
    assert exit_code(local, killed) == -signal.SIGKILL
    assert local.poll(staying) is None
    assert exit_code(local, staying) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent-death signal is Linux's")
def test_processes_end_with_a_study_that_is_killed(tmp_path):
    log = tmp_path / "c.txt"
    code = f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import jobs
        from grpo_engine.study.executors import LocalExecutor
        from grpo_engine.study.job import Job
        child = "import os, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(60)"
        LocalExecutor(run=jobs.run).start(Job(name="x", arguments=(child,), log=Path({str(log)!r}), after=(), seconds=1.0))
        time.sleep(60)
    """  # without a main guard: what it starts must not run it again
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    wait_for(lambda: printed(log), 30)
    pids = [int(pid) for pid in printed(log)[-1].split()]
    assert len(pids) == 2 and all(map(alive, pids))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not any(map(alive, pids)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent-death signal is Linux's")
def test_a_server_that_is_killed_costs_its_jobs_and_is_replaced(tmp_path, executor):
    local = executor()
    lost = local.start(job(tmp_path, "import os, time; print(os.getppid(), flush=True); time.sleep(60)", "lost"))
    wait_for(lambda: printed(tmp_path / "lost.txt"), 30)
    os.kill(int(printed(tmp_path / "lost.txt")[0]), signal.SIGKILL)
    assert exit_code(local, lost) != 0
    wait_for(lambda: not alive(lost.pid))
    assert exit_code(local, local.start(job(tmp_path, "pass", "next"))) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_a_server_with_threads_is_refused(tmp_path):
    module = "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    (tmp_path / "threaded.py").write_text(module)
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from grpo_engine.system.processes import ForkedProcess, become_job, start_fork_server
        start_fork_server(["threaded"])
        process = ForkedProcess(target=become_job, args=({str(tmp_path / "log.txt")!r},))
        process.start()
        process.join(30)
        print(process.exitcode)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == "1" and "has 2 threads, not 1" in (tmp_path / "log.txt").read_text()


def test_a_forked_process_has_the_imports_and_computes_on_the_threads_it_was_given(tmp_path, executor):
    local = executor(threads=2)
    code = """
        import os, sys
        assert "grpo_engine.run.run" in sys.modules  # imported before the fork
        import torch
        x = torch.randn(400, 400, requires_grad=True)
        (x @ x).relu().sum().backward()
        print(torch.get_num_threads())
    """
    assert exit_code(local, local.start(job(tmp_path, code))) == 0, (tmp_path / "log.txt").read_text()
    assert printed(tmp_path / "log.txt")[-1] == "2"


COUNT = """
    import pathlib, time, torch
    from grpo_engine import ops
    from grpo_engine.system.threads import count_threads
    x, weight, last = torch.ones(24 * 64, 512), torch.ones(512), None
    while not pathlib.Path({end!r}).exists():
        with count_threads() as count:
            ops.rms_norm(x, weight, eps=1e-6)
        if count.number != last:
            print(last := count.number, flush=True)
"""


class Counting:
    """Jobs that print how many threads took part in a kernel, whenever that changes, until they are told to end."""

    def __init__(self, local, folder):
        self.local, self.folder, self.handles = local, folder, {}

    def start(self, name):
        code = COUNT.format(end=str(self.folder / f"{name}.end"))
        self.handles[name] = self.local.start(job(self.folder, code, name))

    def end(self, name):
        (self.folder / f"{name}.end").touch()
        assert exit_code(self.local, self.handles[name]) == 0, (self.folder / f"{name}.txt").read_text()

    def counts(self, name):
        return [int(line) for line in printed(self.folder / f"{name}.txt") if line.isdigit()]  # the rest is its code

    def expect(self, name, *numbers):
        wait_for(lambda: self.counts(name) == [*numbers], 120)


@pytest.fixture
def counting(tmp_path, executor):
    """Makes a `Counting` of an executor's settings; what still runs is stopped, or Python would wait for it at its end."""
    made = []

    def make(**settings):
        made.append(Counting(executor(**settings), tmp_path))
        return made[-1]

    yield make
    for counting in made:
        counting.local.stop(list(counting.handles.values()))


def test_a_job_takes_the_cores_that_others_leave_and_gives_them_back(counting, monkeypatch):
    monkeypatch.setattr(executors, "num_cores", lambda: 4)
    counting = counting()
    assert counting.local.slots == 4  # jobs side by side are one a core all the same
    counting.start("first")
    counting.expect("first", 4)
    counting.start("second")
    counting.expect("second", 2)
    counting.expect("first", 4, 2)
    counting.end("second")
    counting.expect("first", 4, 2, 4)
    counting.start("third")
    counting.expect("first", 4, 2, 4, 2)
    counting.start("fourth")
    counting.expect("fourth", 1)
    counting.expect("first", 4, 2, 4, 2, 1)
    for name in ("fourth", "third", "first"):
        counting.end(name)


@pytest.mark.parametrize("chosen", [None, "active"])
def test_threads_of_jobs_sleep_while_they_wait_unless_the_user_says_otherwise(tmp_path, chosen):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if chosen:
        environment["OMP_WAIT_POLICY"] = chosen
    code = f"""
        import os, sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import jobs
        from grpo_engine.study.executors import LocalExecutor
        from grpo_engine.study.job import Job
        before = dict(os.environ)
        local = LocalExecutor(run=jobs.run)
        child = "import os; print(os.environ['OMP_WAIT_POLICY'], os.environ['OPENBLAS_NUM_THREADS'])"
        job = local.start(Job(name="x", arguments=(child,), log=Path({str(tmp_path / "log.txt")!r}), after=(), seconds=1.0))
        while local.poll(job) is None:
            time.sleep(0.02)
        assert dict(os.environ) == before
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)
    assert printed(tmp_path / "log.txt")[-1] == f"{chosen or 'passive'} 1"


def test_threads_that_were_asked_for_do_not_change(counting):
    counting = counting(threads=3)
    for name in ("first", "second"):
        counting.start(name)
        counting.expect(name, 3)
    counting.end("second")
    time.sleep(0.5)  # a share would have changed by now
    counting.end("first")
    assert counting.counts("first") == [3]


def tiny_study(tmp_path, seeds, **run):
    config = models.small_config(vocab=MicroTokenizer().vocab_size)
    weights.save_checkpoint(models.random_model(config, scale=3.0), tmp_path / "tiny")
    small = {
        "task": {"eval_problems": 10}, "rollout": {"max_new_tokens": 4},
        "batch": {"prompts": 4, "group_size": 2, "minibatches": 2}, "evaluation": {"count": 2, "samples": 1},
    }  # fmt: skip
    return StudyConfig(name="real", run=small | run, sizes={"tiny": SizeConfig(base=str(tmp_path / "tiny"))},
                       axes=(AxesConfig(seeds=seeds),))  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent-death signal is Linux's")
def test_a_study_killed_twice_and_started_again_has_the_same_records(tmp_path):
    study = tiny_study(tmp_path, (0, 1), steps=16, checkpoint_every=3)
    folder = tmp_path / "killed"
    folder.mkdir()
    save_study(study, folder / "study.yaml")
    code = f"import sys; from grpo_engine.study.run import run_study; sys.exit(run_study({str(folder)!r}, jobs=2).exit_code)"
    moment, kills = random.Random(7), 0
    for attempt in range(3):
        before = lines_of(folder)
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        if attempt < 2:
            wait_for(lambda b=before, p=process: lines_of(folder) > b or p.poll() is not None, 60)
            time.sleep(moment.uniform(0, 0.2))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
    assert process.wait(120) == 0 and kills >= 1
    undisturbed = tmp_path / "undisturbed"
    assert run_study(undisturbed, study=study, jobs=2, console=Console(file=io.StringIO())).exit_code == 0
    for cell in plan(study).cells:
        for name in (records.STEPS_FILE, records.EVALS_FILE, records.ORDER_FILE, "checkpoint/model.safetensors"):
            assert (folder / cell.folder / name).read_bytes() == (undisturbed / cell.folder / name).read_bytes(), name


def lines_of(folder):
    return sum(p.read_bytes().count(b"\n") for p in folder.glob("cells/*/steps.jsonl"))


def test_a_study_of_real_processes_writes_what_a_process_of_its_own_writes(tmp_path):
    study = tiny_study(tmp_path, (0, 1, 2), steps=3)
    folder = tmp_path / "study"
    result = run_study(folder, study=study, jobs=2, console=Console(file=io.StringIO()))
    assert result.exit_code == 0 and len(result.done) == 3, result.failures
    cell = folder / plan(study).cells[1].folder
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(cell / CONFIG_FILE, alone)
    subprocess.run([sys.executable, "-m", "grpo_engine.study.job", "cell", str(alone)], check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    for name in (records.STEPS_FILE, records.EVALS_FILE, "checkpoint/model.safetensors", "checkpoint/optimizer.safetensors"):
        assert (cell / name).read_bytes() == (alone / name).read_bytes(), name
    header, other = (jsonl.read_json(path / records.RUN_FILE) for path in (cell, alone))
    header["hardware"]["threads"] = other["hardware"]["threads"]  # as many as were free
    assert header == other


def test_main_refuses_other_words():
    with pytest.raises(ValueError, match="expected 'model SIZE KIND SEED' or 'cell FOLDER', got 'dance'"):
        main(["dance"])


def test_a_cell_waits_for_its_predecessor_to_be_gone(tmp_path):
    lock = tmp_path / LOCK_FILE
    holding = threading.Event()

    def hold():
        with locks.locked(lock, "held"):
            holding.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    with pytest.raises(Locked, match="cell is busy"):
        with locks.locked(lock, "cell is busy"):
            pass
    with locks.locked(lock, "cell is busy", wait_s=5.0):
        pass
    thread.join()
