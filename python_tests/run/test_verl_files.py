"""verl's own files of GSM8K and MATH: every row is scored by its truth, and they train as they are."""

import json
import math
import subprocess
import sys

import models
import pytest
from typer.testing import CliRunner

from grpo_engine.cli import app
from grpo_engine.config import load_run_config
from grpo_engine.load import first_prompt
from grpo_engine.records import jsonl, records
from grpo_engine.rewards.math import score
from grpo_engine.run.run import train
from grpo_engine.tasks.files import FIELDS, read_problems
from grpo_engine.tasks.rows import read_rows

FILES = {"gsm8k": (7473, 1319), "math": (7500, 5000)}


@pytest.fixture(scope="module")
def checkpoint(real_data, tmp_path_factory):
    texts = [p.prompt for p in read_problems(f"{real_data / 'math'}:train", limit=500)]
    return models.save_qwen2(tmp_path_factory.mktemp("qwen"), texts, vocab=1024, width=64, layers=2, heads=4, positions=1024)


@pytest.mark.parametrize("name", FILES)
def test_every_true_answer_scores_one(real_data, name):
    for split, rows in zip(("train", "test"), FILES[name], strict=True):
        problems = read_problems(f"{real_data / name}:{split}")
        assert rows - len(problems) == (2 if (name, split) == ("math", "train") else 0)
        assert {p.reward for p in problems} == {"math"}
        wrong = [p.uid for p in problems if score(f"It is $\\boxed{{{p.answer}}}$.", p) != 1.0]
        assert wrong == []


def test_every_solution_of_gsm8k_scores_one(real_data):
    problems = {p.prompt: p for p in read_problems(f"{real_data / 'gsm8k'}:train")}
    rows = [row for _, row in read_rows(f"{real_data / 'gsm8k'}:train", FIELDS)]
    solutions = [(row["extra_info"]["answer"], problems[row["prompt"][0]["content"]]) for row in rows]
    assert len(solutions) == 7473 and "####" in solutions[0][0]
    assert [p.uid for solution, p in solutions if score(solution, p) != 1.0] == []


@pytest.mark.parametrize("name", FILES)
def test_two_steps_on_the_files_as_they_are(real_data, checkpoint, name, tmp_path):
    settings = [
        f"model.path={checkpoint}", "steps=2", "batch.prompts=4", "batch.group_size=4", "task.name=files",
        f"task.train={real_data / name}:train", f"task.evals={{held_out: '{real_data / name}:test'}}", "optimizer.lr=1e-4",
        "task.eval_problems=8", "evaluation.count=2", "evaluation.samples=1", "rollout.max_new_tokens=16",
        "rollout.max_prompt_tokens=512",
    ]  # fmt: skip
    command = ["train", "--out", str(tmp_path / "run"), "--threads", "1", *settings]
    shown = CliRunner().invoke(app, [*command, "--show-prompt"])
    assert shown.exit_code == 0 and not (tmp_path / "run").exists()
    result = subprocess.run([sys.executable, "-m", "grpo_engine", *command], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    steps = jsonl.read_jsonl(tmp_path / "run" / records.STEPS_FILE).records
    assert [s["step"] for s in steps] == [1, 2]
    assert all(s["reward_failures"] == 0 and s["logprob_mismatch_max"] == 0.0 and math.isfinite(s["loss"]) for s in steps)
    evals = jsonl.read_jsonl(tmp_path / "run" / records.EVALS_FILE).records
    assert {(e["step"], e["eval_set"]) for e in evals} == {(0, "held_out"), (2, "held_out")}
    assert all(0 < e["num_problems"] <= 8 for e in evals)
    # the prompt that was shown is the one that the run says once, and the first that it trains on
    uid = (tmp_path / "run" / records.ORDER_FILE).read_text().split()[0]
    text = shown.stdout.partition("tokens:\n")[2].partition("\ntokens: ")[0]
    assert f"first prompt ({uid})" in shown.stdout and result.stderr.count(f"first prompt ({uid})") == 1
    prompts = {p.uid: p.prompt for p in read_problems(f"{real_data / name}:train")}
    assert text == prompts[uid] and text in result.stderr


def test_the_first_prompt_is_said_once_and_not_where_silence_was_asked_for(checkpoint, tmp_path, capsys):
    rows = [{"question": f"[bold]{n} + 1?", "answer": n + 1} for n in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = [f"model.path={checkpoint}", "steps=1", "batch.prompts=2", "batch.group_size=2", "task.name=files",
                f"task.train={tmp_path / 'p.jsonl'}", "rollout.max_new_tokens=4", "evaluation.count=0"]  # fmt: skip
    config = load_run_config(None, settings)
    train(config, tmp_path / "silent", quiet=True)
    assert capsys.readouterr().err == ""
    train(config, tmp_path / "run")
    said = capsys.readouterr().err
    assert first_prompt(config) in said and "[bold]" in said
    (tmp_path / "run" / records.SUMMARY_FILE).unlink()
    train(config, tmp_path / "run")  # goes on
    assert "first prompt" not in capsys.readouterr().err


def test_no_prompt_that_fits(checkpoint, real_data):
    settings = [f"model.path={checkpoint}", "task.name=files", f"task.train={real_data / 'math'}:test"]
    with pytest.raises(ValueError, match="rollout.max_prompt_tokens=2 leaves no problem to train on"):
        first_prompt(load_run_config(None, [*settings, "rollout.max_prompt_tokens=2"]))
