"""The command: help that leads somewhere, errors that say what to mend and no traceback."""

import subprocess
import sys

import pytest

from grpo_engine.system import doctor


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "grpo_engine", *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [(), ("train",), ("evaluate",), ("study",), ("study", "run"), ("doctor",)])
def test_help(arguments):
    result = command(*arguments, "--help")
    assert result.returncode == 0 and "Usage" in result.stdout


def test_doctor_says_what_is_there_and_keeps_its_promises():
    assert all(check.ok for check in doctor.checks())
    result = command("doctor")
    assert result.returncode == 0 and "BROKEN" not in result.stdout
    for fact in ("instruction set", "threads", "gpu", "torch"):
        assert fact in result.stdout


def test_a_dry_run_lists_the_cells_and_runs_nothing(tmp_path):
    result = command("study", "run", "smoke", "--out", str(tmp_path / "s"), "--dry-run")
    assert result.returncode == 0 and "xs-base-seed0" in result.stdout
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "arguments,says",
    [
        (("train", "--out", "OUT", "optimizer.lrr=1"), "optimizer.lrr: unknown key"),
        (("train", "--out", "OUT", "model.path=/nowhere"), "/nowhere"),
        (("train", "--out", "OUT", "model.size=huge"), "huge"),
        (("train", "--out", "OUT", "--config", "absent.yaml"), "absent.yaml"),
        (("study", "run", "tiny", "--out", "OUT"), "no preset 'tiny'"),
        (("study", "status", "OUT"), "study.yaml"),
        (("evaluate", "--model", "m", "--suite", "paper", "--data", "/nowhere", "--out", "OUT"), "no file /nowhere/math"),
        (("train", "--out", "OUT", "task.name=files", "task.train=no.parquet", "model.size=xs"), "no.parquet"),
        (("train", "--out", "FILE", "model.size=xs"), "file: must be a folder, but"),
        (("study", "run", "smoke", "--out", "FILE"), "file: must be a folder, but"),
        (("train", "--out", "/proc/run", "model.size=xs"), "/proc/run"),
        (("train", "--out", "OUT", "model.path=/no/[bold]where[/x]"), "/no/[bold]where[/x]: no such folder"),
        (("study", "status", "OUT[bold]"), "[bold]"),
    ],
)
def test_an_error_is_a_message_and_not_a_traceback(arguments, says, tmp_path):
    (tmp_path / "file").touch()
    result = command(*[a.replace("OUT", f"{tmp_path}/out").replace("FILE", f"{tmp_path}/file") for a in arguments])
    assert result.returncode == 2
    assert says in result.stderr and "Traceback" not in result.stderr
