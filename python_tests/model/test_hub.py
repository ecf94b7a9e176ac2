"""A model by its name on the hub, out of a cache laid out as huggingface_hub lays it out; there is no network."""

import json
import shutil

import models
import pytest

from grpo_engine.config import ModelSource, load_run_config
from grpo_engine.micro.tokenizer import MicroTokenizer
from grpo_engine.model import hub, weights
from grpo_engine.records import records
from grpo_engine.run.run import train
from grpo_engine.study.forecast import num_params

NAME, FIRST, SECOND = "Owner/Tiny-0.1B", "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """One model with two commits, of which main is the second."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "models--Owner--Tiny-0.1B"
    (repo / "refs").mkdir(parents=True)
    for seed, commit in enumerate((FIRST, SECOND)):
        model = models.random_model(models.small_config(vocab=MicroTokenizer().vocab_size), seed=seed, scale=3.0)
        weights.save_checkpoint(model, repo / "snapshots" / commit)
    (repo / "refs" / "main").write_text(SECOND)
    return repo


def test_a_name_is_a_snapshot_of_the_cache(cache, tmp_path):
    assert hub.find_model(NAME) == hub.Snapshot(cache / "snapshots" / SECOND, SECOND)
    assert hub.find_model(f"{NAME}@{FIRST}").revision == hub.find_model(NAME, revision=FIRST).revision == FIRST
    assert hub.find_model(str(cache)) == hub.Snapshot(cache, None)
    assert hub.find_config(NAME) == cache / "snapshots" / SECOND
    assert hub.find_config("Owner/Other") is None and hub.find_config(tmp_path) is None
    n = weights.load_model(cache / "snapshots" / SECOND).num_non_embedding
    assert num_params(ModelSource(path=NAME)) == n


@pytest.mark.parametrize("path, says", [
    ("Owner/Other", r"Owner/Other: no such folder, not in the cache .*hub, and not to be fetched \(HF_HUB_OFFLINE is set\)"),
    (f"{NAME}@{'c' * 40}", "no such folder, not in the cache"),
    ("/no/where", "/no/where: no such folder, and no name on a hub"),
    ("models/../x", "no such folder, and no name on a hub"),
])  # fmt: skip
def test_what_is_nowhere_is_refused_before_the_problems_are_read(cache, tmp_path, path, says):
    settings = [f"model={{path: '{path}'}}", "task={name: files, train: absent.parquet}"]
    with pytest.raises(FileNotFoundError, match=says):
        train(load_run_config(None, settings), tmp_path / "run", quiet=True)


def test_a_run_records_its_commit_and_goes_on_with_it(cache, tmp_path):
    settings = [f"model={{path: {NAME}}}", "steps=1", "batch={prompts: 2, group_size: 2}", "evaluation.count=0",
                "rollout.max_new_tokens=2", "checkpoint_every=1"]  # fmt: skip
    out = train(load_run_config(None, settings), tmp_path / "run", quiet=True)
    header = json.loads((out / records.RUN_FILE).read_text())
    assert header["model"]["revision"] == SECOND and header["model"]["name"] == NAME
    (out / records.SUMMARY_FILE).unlink()
    (cache / "refs" / "main").write_text(FIRST)
    train(load_run_config(None, settings), out, quiet=True)
    assert json.loads((out / records.RUN_FILE).read_text()) == header

    (out / records.SUMMARY_FILE).unlink()
    shutil.rmtree(cache / "snapshots" / SECOND)
    with pytest.raises(FileNotFoundError, match=f"not in the cache .* at {SECOND}"):
        train(load_run_config(None, settings), out, quiet=True)
