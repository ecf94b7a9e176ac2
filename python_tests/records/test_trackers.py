"""Trackers get the numbers of the records; each is tested where it is installed."""

import contextlib
import json
import math
import sqlite3

import pytest

from grpo_engine.records import jsonl, records, trackers


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()

    def write(name, *rows):
        (folder / name).write_text("".join(json.dumps({"schema": jsonl.SCHEMA, **row}) + "\n" for row in rows))

    seen = {"prompts_seen": 4, "unique_prompts": 4, "trained_tokens": 90, "compute_6nt": 1e6, "compute_ledger": 2e6}
    write(records.RUN_FILE, {"config": {"seed": 3}})
    write(records.STEPS_FILE, *({"step": s, **seen, "reward_mean": 0.25 * s, "loss": -0.5, "kl": None} for s in (1, 2)))
    write(records.EVALS_FILE, {
        "step": 2, **seen, "eval_set": "words", "in_domain": True, "mode": "greedy", "temperature": 0.0, "num_problems": 8,
        "num_samples": 1, "pass1": 0.75, "loss": 0.25, "stderr": 0.1,
    })  # fmt: skip
    write(records.TIMINGS_FILE, *({"step": s, "phase": {"decode": {"seconds": 1.5}}} for s in (1, 2, 2)))
    return folder


def test_scalars_are_the_measured_numbers(run_dir):
    (one, first), (two, second) = trackers.scalars(records.read_run(run_dir, allow_incomplete=True))
    assert (one, two) == (1, 2) and first["train/reward_mean"] == 0.25 and second["train/reward_mean"] == 0.5
    assert second["eval/words/greedy/pass1"] == 0.75 and not any(key.startswith("eval") for key in first)
    assert (first["seconds/decode"], second["seconds/decode"]) == (1.5, 3.0)  # the last step has two records
    assert "train/kl" not in first and "train/step" not in first and all(map(math.isfinite, second.values()))


def test_tensorboard_reads_them_back(run_dir, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert trackers.export(run_dir, "tensorboard", out=tmp_path / "tb") == 2
    events = EventAccumulator(str(tmp_path / "tb" / "one"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/reward_mean")] == [(1, 0.25), (2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/words/greedy/pass1")] == [(2, 0.75)]


def test_wandb_writes_them_offline(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = pytest.importorskip("wandb")
    assert trackers.export(run_dir, "wandb", out=tmp_path / "out") == 2
    wandb.teardown()  # its process writes the file to the end
    (file,) = (tmp_path / "out").rglob("offline-run-*/run-*.wandb")
    written = file.read_bytes()
    assert b"train/reward_mean" in written and b"eval/words/greedy/pass1" in written and b"0.75" in written


def test_trackio_writes_them_into_its_folder(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    assert trackers.export(run_dir, "trackio", out=tmp_path) == 2
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "grpo_engine.db")) as base:
        rows = base.execute("select step, metrics from metrics order by step").fetchall()
    (one, first), (two, second) = ((step, json.loads(values)) for step, values in rows)
    assert (one, two) == (1, 2) and (first["train/reward_mean"], second["train/reward_mean"]) == (0.25, 0.5)
    assert second["eval/words/greedy/pass1"] == 0.75


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_the_others_are_given_them(run_dir, tmp_path, tracker, monkeypatch):
    """A stand-in for the library: what it is called with."""
    calls = []
    stand_in = type("Library", (), {
        "init": staticmethod(lambda **k: calls.append(("init", k))),
        "log": staticmethod(lambda values, step: calls.append((step, values))),
        "finish": staticmethod(lambda: calls.append(("finish",))),
    })  # fmt: skip
    monkeypatch.setattr(trackers.importlib, "import_module", lambda name: stand_in)
    assert trackers.export(run_dir, tracker, out=tmp_path / "out") == 2
    (_, start), (one, first), (two, _), end = calls
    assert start["name"] == "one" and start["config"] == {"seed": 3} and (one, two, *end) == (1, 2, "finish")
    assert first["train/loss"] == -0.5
    assert (start.get("mode") == "offline") == (tracker == "wandb")


def test_an_unknown_tracker_and_one_that_is_absent_are_named(run_dir, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="one of tensorboard, wandb, trackio, got 'mlflow'"):
        trackers.export(run_dir, "mlflow", out=tmp_path)

    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(trackers.importlib, "import_module", absent)
    with pytest.raises(ValueError, match="trackio is not installed.*pip install trackio"):
        trackers.export(run_dir, "trackio", out=tmp_path)
