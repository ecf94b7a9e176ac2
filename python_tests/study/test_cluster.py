"""Studies on Ray and under Slurm: the same cells, the same records, and what a lost worker costs."""

import functools
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import models
import pytest
from rich.console import Console

from grpo_engine.micro.tokenizer import MicroTokenizer
from grpo_engine.model import weights
from grpo_engine.records import records
from grpo_engine.study import cluster
from grpo_engine.study.design import AxesConfig, SizeConfig, StudyConfig, plan
from grpo_engine.study.job import Job
from grpo_engine.study.run import run_study

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc")


def job(tmp_path, *arguments, name="job"):
    return Job(name=name, arguments=arguments, log=tmp_path / f"{name}.txt", after=(), seconds=1.0)


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def ended(executor, handle):
    wait_for(lambda: executor.poll(handle) is not None)
    return executor.poll(handle)


def small_study(tmp_path, cells, steps=3):
    config = models.small_config(vocab=MicroTokenizer().vocab_size)
    weights.save_checkpoint(models.random_model(config, scale=3.0), tmp_path / "tiny")
    run = {
        "steps": steps, "task": {"eval_problems": 10}, "rollout": {"max_new_tokens": 4}, "checkpoint_every": 1,
        "batch": {"prompts": 4, "group_size": 2, "minibatches": 2}, "evaluation": {"count": 2, "samples": 1},
    }  # fmt: skip
    return StudyConfig(name="far", run=run, sizes={"tiny": SizeConfig(base=str(tmp_path / "tiny"))},
                       axes=(AxesConfig(seeds=tuple(range(cells))),))  # fmt: skip


def run_it(folder, study, executor, **more):
    text = io.StringIO()
    result = run_study(folder, study=study, console=Console(file=text, width=200), executor=executor, **more)
    return result, text.getvalue()


def deterministic(folder, study):
    names = (records.STEPS_FILE, records.EVALS_FILE, records.ORDER_FILE)
    return {(c.name, n): (folder / c.folder / n).read_bytes() for c in plan(study).cells for n in names}


def cell_processes(folder):
    """Processes that run a cell of this folder."""
    out = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if b"grpo_engine.study.job" in words and any(w.startswith(str(folder).encode()) for w in words):
                out.append(int(entry.name))
        except OSError:
            continue
    return out


def kill_a_worker(folder, killed):
    """Kills the process that has started a cell's process, once that has written a step."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not killed:
        if any(folder.glob("cells/*/steps.jsonl")):
            for pid in cell_processes(folder):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                parent = int(status.split("PPid:")[1].split()[0])
                if parent not in (1, os.getpid()):
                    os.kill(parent, signal.SIGKILL)
                    killed.append(pid)
                    break
        time.sleep(0.01)


def gone(pid):
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


# ----------------------------------------------------------------------------------------- one command


def test_a_command_has_its_log_its_folder_and_its_threads(tmp_path):
    code = "import os, sys; print(os.getcwd(), os.environ['OMP_NUM_THREADS'], flush=True); sys.exit(7)"
    assert cluster.run_command((sys.executable, "-c", code), str(tmp_path / "log"), str(tmp_path), 3) == 7
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0].startswith("--- ") and lines[-1] == f"{tmp_path} 3"


def test_a_command_dies_with_the_process_that_started_it(tmp_path):
    """And so does a grandchild, when the worker is only interrupted."""
    inner = "import os, subprocess; p = subprocess.Popen(['sleep', '61']); print(os.getpid(), p.pid, flush=True); p.wait()"
    log = tmp_path / "log"
    code = f"""
import signal, sys
from grpo_engine.study.cluster import run_command
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell inherit that it is ignored
run_command((sys.executable, "-c", {inner!r}), {str(log)!r}, {str(tmp_path)!r}, 1)
"""
    for number in (signal.SIGINT, signal.SIGKILL):
        log.unlink(missing_ok=True)
        worker = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        wait_for(lambda: log.exists() and log.read_text().count("\n") == 2)
        child, grandchild = map(int, log.read_text().splitlines()[1].split())
        worker.send_signal(number)
        worker.wait(15)
        wait_for(functools.partial(gone, child))
        if number == signal.SIGINT:
            wait_for(functools.partial(gone, grandchild))
        elif not gone(grandchild):
            os.kill(grandchild, signal.SIGKILL)


@pytest.mark.parametrize(
    "backend, options, message",
    [
        ("pbs", [], "backend must be local, ray or slurm, got 'pbs'"),
        ("local", ["gpus=1"], "the local backend has no options, got gpus"),
        ("ray", ["gpu=1"], "ray options are address, gpus and num_cpus, got gpu"),
        ("ray", ["address"], "a cluster option must be name=value, got 'address'"),
    ],
)
def test_wrong_options_are_named(tmp_path, backend, options, message):
    with pytest.raises(ValueError, match=message):
        cluster.make_executor(backend, tmp_path, threads=1, options=options)


@pytest.mark.parametrize("backend", ["ray", "submitit"])
def test_a_backend_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch, backend):
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(RuntimeError, match=rf"needs {backend}: pip install 'grpo_engine\[cluster\]'"):
        cluster.make_executor({"submitit": "slurm"}.get(backend, backend), tmp_path, threads=1)


# ------------------------------------------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def ray_executor():
    ray = pytest.importorskip("ray", reason="ray is not installed")
    yield cluster.RayExecutor(num_cpus=2)
    ray.shutdown()


def test_ray_finishes_a_study_though_a_worker_is_killed(tmp_path, ray_executor):
    assert ray_executor.slots == 2
    study, killed = small_study(tmp_path, cells=8, steps=30), []
    local, _ = run_it(tmp_path / "local", study, None, jobs=2)
    assert len(local.done) == 8, local.failures
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "ray", killed))
    killer.start()
    result, text = run_it(tmp_path / "ray", study, ray_executor)
    killer.join()
    assert killed and result.exit_code == 0 and len(result.done) == 8, text
    assert "killed by SIGKILL, perhaps because memory ran out; it is started again" in text
    assert deterministic(tmp_path / "ray", study) == deterministic(tmp_path / "local", study)


def test_ray_tells_exit_codes_and_stops_what_runs(tmp_path, ray_executor):
    failing = ray_executor.start(job(tmp_path, "dance", name="failing"))
    assert ended(ray_executor, failing) == 1 and "expected 'model SIZE KIND SEED'" in (tmp_path / "failing.txt").read_text()
    study = small_study(tmp_path, cells=1, steps=1500)
    folder = tmp_path / "long"

    def stop_soon():
        wait_for(lambda: any(folder.glob("cells/*/steps.jsonl")))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_soon).start()
    result, _ = run_it(folder, study, ray_executor)
    assert result.interrupted == signal.SIGINT and result.missing
    assert cell_processes(folder) == []


# ----------------------------------------------------------------------------------------------- Slurm


@pytest.fixture
def submitit():
    return pytest.importorskip("submitit", reason="submitit is not installed")


def test_submitted_jobs_finish_a_study(tmp_path, submitit):
    """With processes of this machine in Slurm's place."""
    study, killed = small_study(tmp_path, cells=3, steps=30), []
    folder = tmp_path / "slurm"
    executor = cluster.make_executor("slurm", folder, threads=1, options=["cluster=local", "slots=2", "timeout_min=5"])
    killer = threading.Thread(target=kill_a_worker, args=(folder, killed))
    killer.start()
    result, text = run_it(folder, study, executor)
    killer.join()
    assert result.exit_code == 0 and len(result.done) == 3, text
    assert killed and "it is started again" in text
    local, _ = run_it(tmp_path / "local", study, None, jobs=2)
    assert deterministic(folder, study) == deterministic(tmp_path / "local", study)


def test_a_submitted_job_that_is_still_there_is_found_again(tmp_path, submitit, monkeypatch):
    class Earlier:
        job_id, state = "17", "PENDING"

        def done(self):
            return True

        def result(self):
            return 0

    executor = cluster.SlurmExecutor(tmp_path, cluster="local")
    (tmp_path / "job.id").write_text("17")
    found = []
    monkeypatch.setattr(cluster.SlurmExecutor, "find", lambda self, job_id: found.append(job_id) or Earlier())
    handle = executor.start(job(tmp_path, "dance"))
    assert found == ["17"] and handle.remote.job_id == "17" and executor.poll(handle) == 0
    monkeypatch.setattr(Earlier, "state", "CANCELLED")
    again = executor.start(job(tmp_path, "dance"))
    assert again.remote.job_id != "17" and (tmp_path / "job.id").read_text() == again.remote.job_id
    assert ended(executor, again) == 1
