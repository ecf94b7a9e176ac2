"""Real problems, a real tokenizer format, a checkpoint that transformers saved: the command line from end to end."""

import json
import math
import subprocess
import sys

import models
import pyarrow.parquet as pq
import pytest

from grpo_engine import records
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
    steps = records.read_jsonl(out / records.STEPS_FILE).records
    assert [s["step"] for s in steps] == [1, 2, 3] and steps[-1]["prompts_seen"] == 48
    for s in steps:
        assert s["logprob_mismatch_max"] == 0.0 and "non_finite" not in s
        assert all(math.isfinite(s[k]) for k in ("loss", "kl", "entropy", "grad_norm", "reward_mean"))
    evals = records.read_jsonl(out / records.EVALS_FILE).records
    assert {(e["step"], e["mode"]) for e in evals} == {(s, m) for s in (0, 3) for m in ("sample", "greedy")}
    assert all(e["num_problems"] <= 50 and 0 <= e["loss"] <= 1 for e in evals)
    assert json.loads((out / records.SUMMARY_FILE).read_text())["steps"] == 3
    equal = sum(s["equal_groups"] for s in steps)
    statement = "All 48 groups had equal rewards" if equal == 48 else f"{equal} of 48 groups had equal rewards"
    assert statement in " ".join(result.stdout.split())
