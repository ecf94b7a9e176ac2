"""The examples run, with tiny settings."""

import runpy
import sys

import models
import pytest
from conftest import ROOT

from grpo_engine.config import RewardConfig, TaskConfig, load_run_config
from grpo_engine.evaluate.suite import evaluate_suite
from grpo_engine.load import load_task
from grpo_engine.micro.tokenizer import MicroTokenizer
from grpo_engine.model import weights
from grpo_engine.records import jsonl, records
from grpo_engine.system import plugins

EXAMPLES = ROOT / "examples"
TINY = ["steps=2", "batch.prompts=4", "batch.group_size=4", "task.eval_problems=8", "evaluation.count=2", "reward.workers=1"]


@pytest.fixture(autouse=True)
def from_the_folder(tmp_path, monkeypatch):
    """As `python examples/NAME.py` has it; runs go into a temporary folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def steps_of(folder):
    return jsonl.read_jsonl(folder / records.STEPS_FILE).records


def test_ops_alone():
    first, last = runpy.run_path(str(EXAMPLES / "ops_alone.py"))["main"](steps=25)
    assert 0.4 < first < 0.6 and last > first + 0.2


def test_trl_trainer():
    pytest.importorskip("trl", reason="trl is not installed")
    log = runpy.run_path(str(EXAMPLES / "trl_trainer.py"))["main"](steps=2)
    assert [entry["step"] for entry in log] == [1, 2, 2] and log[0]["kl"] == 0 and log[1]["entropy"] > 0


def test_custom_reward(monkeypatch, tmp_path):
    model = models.random_model(models.small_config(vocab=MicroTokenizer().vocab_size), scale=3.0)
    weights.save_checkpoint(model, tmp_path / "model")
    run(monkeypatch, "custom_reward", "model.size=null", f"model.path={tmp_path / 'model'}", *TINY)
    assert [(s["step"], s["reward_failures"]) for s in steps_of(tmp_path / "runs/custom_reward")] == [(1, 0), (2, 0)]


def test_custom_loss(monkeypatch, tmp_path):
    model = models.random_model(models.small_config(vocab=MicroTokenizer().vocab_size), scale=3.0)
    weights.save_checkpoint(model, tmp_path / "model")
    settings = ["model.size=null", f"model.path={tmp_path / 'model'}", *TINY, "steps=5", "batch.minibatches=2"]
    run(monkeypatch, "custom_loss", *settings)
    steps = steps_of(tmp_path / "runs/custom_loss")
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5]
    assert all(s["logprob_mismatch_max"] == 0.0 and s["clip_high_share"] is not None for s in steps)
    moved = [s["step"] for s in steps if s["grad_norm"] > 0]
    assert moved, "no group had rewards that differ, so nothing was tried"


def test_custom_task(monkeypatch, tmp_path):
    shape = {"vocab": 270, "width": 32, "layers": 1, "heads": 4, "positions": 64}
    folder = models.save_qwen2(tmp_path / "model", ["1 2 3 :"], **shape)
    run(monkeypatch, "custom_task", "model.size=null", f"model.path={folder}", *TINY)
    assert [(s["step"], s["reward_failures"]) for s in steps_of(tmp_path / "runs/custom_task")] == [(1, 0), (2, 0)]
    first = jsonl.read_jsonl(tmp_path / "runs/custom_task" / records.EVALS_FILE).records[0]
    assert first["eval_set"] == "sort" and first["num_problems"] == 8


def test_a_function_of_the_users_scores_every_problem():
    task = load_task(TaskConfig(eval_problems=3), seed=0, needed=2, reward=RewardConfig(function="custom_reward:score"))
    every = [*task.train, *(p for s in task.evals.values() for p in s.problems)]
    assert {p.reward for p in every} == {"custom_reward:score"} and len(every) > 2


@pytest.mark.parametrize(
    "setting, says",
    [
        ("task.name=sorting", "task.name must be micro, files or 'module:function', got 'sorting'"),
        ("reward.function=score", "reward.function: .*got 'score'"),
        ("task.name=no_such_module:sorting", "task.name=no_such_module:sorting: .*PYTHONPATH"),
        ("task.name=custom_task:sort", "task.name=custom_task:sort: module custom_task has no sort"),
        ("task.name=custom_task:OURS", "task.name=custom_task:OURS: wanted something to call"),
        ("reward.function=custom_reward:nothing", "reward.function=custom_reward:nothing: module custom_reward has no"),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_computed(setting, says):
    with pytest.raises(ValueError, match=says):
        config = load_run_config(None, [setting])
        load_task(config.task, seed=0, needed=1, reward=config.reward)


def test_a_suite_refuses_a_function_of_the_users(tmp_path):
    config = load_run_config(None, ["reward.function=custom_reward:score", "task.evals={one: x}", "task.name=a:b"])
    with pytest.raises(ValueError, match="evaluate_suite: reward.function is for runs"):
        evaluate_suite(config, tmp_path / "suite")


def test_a_task_without_problems_or_with_one_twice_is_refused(monkeypatch):
    import custom_task

    task = custom_task.sorting(TaskConfig(eval_problems=2), seed=0, needed=2)
    for wrong, says in [(None, "must return a grpo_engine.types.Task"), (task.train, "must return")]:
        monkeypatch.setattr(plugins, "load", lambda *_, wrong=wrong: lambda *_, **__: wrong)
        with pytest.raises(ValueError, match=says):
            load_task(TaskConfig(name="custom_task:sorting"), seed=0, needed=2)
    twice = type(task)(name="sorting", train=[*task.train, task.train[0]], evals={})
    monkeypatch.setattr(plugins, "load", lambda *_: lambda *_, **__: twice)
    with pytest.raises(ValueError, match="may share a uid: 'sort/"):
        load_task(TaskConfig(name="custom_task:sorting"), seed=0, needed=2)
