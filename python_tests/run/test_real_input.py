"""Real problems, a real tokenizer format, a checkpoint that transformers saved: the command line from end to end."""

import json
import math
import subprocess
import sys

import models
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from grpo_engine.cli import app
from grpo_engine.evaluate.suite import SUITES
from grpo_engine.records import jsonl, records
from grpo_engine.tasks.files import read_problems

TRAIN = "math_curriculum_sampled/math__sampled_1_4_12800.parquet"
HELD_OUT = "math_curriculum/math__full_difficulty_ordered_test_500.parquet"


@pytest.fixture(scope="module")
def checkpoint(real_data, tmp_path_factory):
    texts = [p.prompt for p in read_problems(real_data / TRAIN, limit=1000)]
    return models.save_qwen2(tmp_path_factory.mktemp("qwen"), texts, vocab=1024, width=64, layers=2, heads=4, positions=2048)


def test_three_steps_on_12800_real_problems(real_data, checkpoint, tmp_path):
    assert pq.read_metadata(real_data / TRAIN).num_rows == 12800
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "grpo_engine", "train", "--out", str(out), "--threads", "2",
        f"model.path={checkpoint}", "steps=3", "batch.prompts=16", "batch.group_size=4",
        "task.name=files", f"task.train={real_data / TRAIN}", f"task.evals={{held_out: {real_data / HELD_OUT}}}",
        "task.eval_problems=50", "evaluation.count=2", "evaluation.samples=1",
        "rollout.max_new_tokens=24", "rollout.max_prompt_tokens=512", "optimizer.lr=1e-4",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    steps = jsonl.read_jsonl(out / records.STEPS_FILE).records
    assert [s["step"] for s in steps] == [1, 2, 3] and steps[-1]["prompts_seen"] == 48
    for s in steps:
        assert s["logprob_mismatch_max"] == 0.0 and "non_finite" not in s
        assert all(math.isfinite(s[k]) for k in ("loss", "kl", "entropy", "grad_norm", "reward_mean"))
    evals = jsonl.read_jsonl(out / records.EVALS_FILE).records
    assert {(e["step"], e["mode"]) for e in evals} == {(s, m) for s in (0, 3) for m in ("sample", "greedy")}
    assert all(e["num_problems"] <= 50 and 0 <= e["loss"] <= 1 for e in evals)
    assert json.loads((out / records.SUMMARY_FILE).read_text())["steps"] == 3
    equal = sum(s["zero_variance_groups"] for s in steps)
    statement = "All 48 groups had zero variance" if equal == 48 else f"{equal} of 48 groups had zero variance"
    assert statement in " ".join(result.stdout.split())


def test_the_papers_suite_on_the_command_line(real_data, checkpoint, tmp_path):
    out = tmp_path / "suite"
    command = ["evaluate", "--model", str(checkpoint), "--suite", "paper", "--data", str(real_data), "--out", str(out),
               "task.eval_problems=2", "evaluation.samples=2", "rollout.max_new_tokens=8"]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    table = json.loads((out / "table.json").read_text())
    assert [row["eval_set"] for row in table] == list(SUITES["paper"])
    for row in table:
        assert row["problems"] == row["samples"] == 2 and row["failures"] == 0
        assert row["pass_at"].keys() == {"1", "2"} and (row["maj_at"] is None) == (row["eval_set"] == "humaneval")
        assert row["low"] <= row["score"] <= row["high"] and row["truncated"] > 0 and row["mean_tokens"] > 0
    heads, _, scores = (out / "table.md").read_text().splitlines()[2:5]
    assert heads.split(" | ")[1:3] == ["aime2024", "amc2023"] and scores.count("±") == 8
    assert pq.read_metadata(out / "problems.parquet").num_rows == 16
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert CliRunner().invoke(app, command).exit_code == 0  # nothing is left to answer
    tables = ("table.json", "table.md", "problems.parquet")
    assert all((out / name).read_bytes() == before[name] for name in tables)
