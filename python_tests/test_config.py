"""Configuration: a wrong key or value is an error that names it."""

import pytest

from grpo_engine.config import RunConfig, apply_overrides, load_run_config, load_yaml, validate


@pytest.mark.parametrize(
    "overrides,says",
    [
        (["optimizr.lr=1"], "optimizr: unknown key; known keys here: .*optimizer"),
        (["optimizer.learning_rate=1"], "optimizer.learning_rate: unknown key; known keys here: .*lr"),
        (["optimizer.lr=-1"], "optimizer.lr: .*greater than 0, got -1"),
        (["optimizer.lr=fast"], "optimizer.lr: .*got 'fast'"),
        (["optimizer.lr=.nan"], "optimizer.lr: .*got nan"),
        (["batch.prompts=10", "batch.minibatches=4"], "batch.prompts=10 must divide by batch.minibatches=4"),
        (["batch.group_size=1"], "batch.group_size: .*greater than or equal to 2, got 1"),
        (["rollout.temperature=0"], "rollout.temperature: .*greater than 0, got 0"),
        (["rollout.top_p=1.5"], "rollout.top_p: .*less than or equal to 1, got 1.5"),
        (["rollout.page_size=24"], "rollout.page_size: .*multiple of 16, got 24"),
        (["loss.objective=ppo"], "loss.objective: .*'clip' or 'cispo', got 'ppo'"),
        (["loss.aggregation=constant"], "loss.constant_length goes with loss.aggregation=constant"),
        (["loss.dual_clip=0.5"], "loss.dual_clip: .*greater than 1, got 0.5"),
        (["model.path=a", "model.size=s"], "model: give either path .* or size"),
        (["model.size=null"], "model: give either path .* or size"),
        (["task.name=files"], "task.train must name a file of problems"),
        (["task.train=x.parquet"], "task.train and task.evals belong to task.name=files"),
        (["task.name=files", "task.train=x", "task.eval_draw=selection"], "task.eval_draw belongs to task.name=micro"),
        (["model.path=x", "model.seed=1"], "seed belongs to models of the embedded ladder, got 1"),
        (["seed=abc"], "seed: .*valid integer.*got 'abc'"),
        (["steps=0"], "steps: .*greater than or equal to 1, got 0"),
        (["steps"], "an override must be key.path=value, got 'steps'"),
        (["steps=3", "steps.more=1"], "steps is a value, not a group"),
    ],
)
def test_a_wrong_setting_is_named(overrides, says):
    with pytest.raises(ValueError, match=says):
        load_run_config(None, overrides)


def test_all_faults_are_told_at_once():
    with pytest.raises(ValueError) as e:
        load_run_config(None, ["optimizer.lr=-1", "batch.group_size=1"])
    assert "optimizer.lr" in str(e.value) and "batch.group_size" in str(e.value)


def test_overrides_and_defaults():
    config = load_run_config(None, ["optimizer.lr=1e-4", "model.size=null", "model.path=/m", "optimizer.betas=[0.9, 0.98]"])
    assert config.optimizer.lr == 1e-4 and config.model.path == "/m" and config.optimizer.betas == (0.9, 0.98)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_a_round_trip_through_json_is_the_same_configuration():
    config = load_run_config(None, ["seed=5", "loss.dual_clip=null"])
    assert validate(RunConfig, config.model_dump(mode="json")) == config


def test_yaml_files(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 3\noptimizer: {lr: 2e-5}\n")
    assert load_run_config(tmp_path / "a.yaml").optimizer.lr == 2e-5
    (tmp_path / "b.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="b.yaml: the top level must be a mapping, got list"):
        load_yaml(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="c.yaml: not YAML"):
        load_yaml(tmp_path / "c.yaml")
    with pytest.raises(FileNotFoundError, match="d.yaml"):
        load_yaml(tmp_path / "d.yaml")
    with pytest.raises(ValueError, match="no preset 'tiny': presets are .*smoke"):
        load_yaml("tiny")


def test_overrides_leave_the_original_alone():
    data = {"a": {"b": 1}}
    assert apply_overrides(data, ["a.b=2"]) == {"a": {"b": 2}} and data == {"a": {"b": 1}}
