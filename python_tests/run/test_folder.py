"""The folder of a run: one writer, and the data that it was begun on."""

import json
import os
import shutil
import subprocess
import sys

import models
import pytest
from conftest import ROOT

from grpo_engine.config import RunConfig
from grpo_engine.micro.tokenizer import MicroTokenizer
from grpo_engine.model import weights
from grpo_engine.records import records
from grpo_engine.run.folder import RunFolder, fingerprints
from grpo_engine.system import files
from grpo_engine.system.locks import LOCK_FILE, Locked, locked


@pytest.fixture
def config(tmp_path):
    weights.save_checkpoint(models.random_model(models.small_config(vocab=MicroTokenizer().vocab_size)), tmp_path / "model")
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": f"{name}?", "answer": "1"}) + "\n")
    task = {"name": "files", "train": str(tmp_path / "train.jsonl"), "evals": {"held_out": str(tmp_path / "held_out.jsonl")}}
    return RunConfig(steps=2, model={"path": str(tmp_path / "model")}, task=task)


def begun(config, out):
    folder = RunFolder.of(config, out)
    with folder.held():
        folder.begin({"model": {"revision": None}})
    return folder


def test_a_second_writer_is_refused_and_the_first_is_named(config, tmp_path):
    code = (
        "import sys, pathlib; from grpo_engine.system.locks import locked; "
        f"lock = locked(pathlib.Path({str(tmp_path / LOCK_FILE)!r}), 'held'); lock.__enter__(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert other.stdout.readline() == "held\n"
    folder = RunFolder.of(config, tmp_path)
    with pytest.raises(Locked, match=rf"another process writes to this run \(process {other.pid}\)"), folder.held():
        pass
    other.kill()  # the lock dies with it
    other.wait()
    with folder.held():
        assert (tmp_path / LOCK_FILE).read_text() == str(os.getpid())


@pytest.mark.parametrize(
    "name,file",
    [
        ("task.train", "train.jsonl"),
        ("task.evals.held_out", "held_out.jsonl"),
        ("model.path", "model/model.safetensors"),
        ("model.path", "model/config.json"),
    ],
)
def test_a_run_whose_data_changed_is_refused_by_name(config, name, file, tmp_path):
    begun(config, tmp_path / "out")
    assert RunFolder.of(config, tmp_path / "out").finished is False  # the same content: it goes on
    data = bytearray((tmp_path / file).read_bytes())
    data[-2] ^= 1
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}=.*{file.split('/')[0]} has changed since the run began"):
        RunFolder.of(config, tmp_path / "out")


def test_data_that_vanished_stops_a_run_that_goes_on_and_none_that_is_finished(config, tmp_path):
    begun(config, tmp_path / "out")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"task\.train=.*train\.jsonl is not there any more"):
        RunFolder.of(config, tmp_path / "out")
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "out" / records.SUMMARY_FILE).write_text('{"schema": 2}')
    assert RunFolder.of(config, tmp_path / "out").finished


def test_a_run_of_an_earlier_version_without_fingerprints_goes_on(config, tmp_path):
    begun(config, tmp_path / "out")
    header = json.loads((tmp_path / "out" / records.RUN_FILE).read_text())
    assert header.pop("data") == fingerprints(config)
    (tmp_path / "out" / records.RUN_FILE).write_text(json.dumps(header))
    (tmp_path / "train.jsonl").write_text("other")
    assert not RunFolder.of(config, tmp_path / "out").finished


def test_a_fingerprint_is_of_content_and_of_large_files_reads_pieces(tmp_path, monkeypatch):
    small, moved = tmp_path / "small", tmp_path / "moved"
    small.write_bytes(b"abc")
    moved.write_bytes(b"abc")
    assert files.fingerprint(small) == files.fingerprint(moved) != files.fingerprint(tmp_path)
    monkeypatch.setattr(files, "_WHOLE", 2)
    monkeypatch.setattr(files, "_SAMPLES", 2)
    large = bytearray(files._PIECE * 4)
    for place, seen in ((0, True), (len(large) - 1, True), (len(large) // 2, False)):
        small.write_bytes(large)
        whole, sampled = files.fingerprint(small), files.fingerprint(small, sampled=True)
        small.write_bytes(large[:place] + b"x" + large[place + 1 :])
        assert files.fingerprint(small) != whole
        assert (files.fingerprint(small, sampled=True) != sampled) == seen


def test_a_lock_waits(tmp_path):
    with locked(tmp_path / LOCK_FILE, "held"), pytest.raises(Locked, match="busy"):
        with locked(tmp_path / LOCK_FILE, "busy", wait_s=0.1):
            pass


def test_a_child_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    code = (
        "import os, pathlib, time; from grpo_engine.system.locks import locked; "
        f"lock = locked(pathlib.Path({str(tmp_path / LOCK_FILE)!r}), 'held'); lock.__enter__(); "
        "os.fork() or time.sleep(5); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    with locked(tmp_path / LOCK_FILE, "busy"):
        pass
