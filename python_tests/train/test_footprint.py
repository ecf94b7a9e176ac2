"""Memory as predicted: what autograd keeps, what fits, and what would make a run fit."""

import dataclasses
import os

import models
import pytest
import torch

from grpo_engine.config import apply_overrides, load_run_config
from grpo_engine.micro.tokenizer import MicroTokenizer
from grpo_engine.model import hf_config, weights
from grpo_engine.model.decoder import Model
from grpo_engine.rollout.engine import Engine
from grpo_engine.run.run import train
from grpo_engine.system.memory import free_bytes
from grpo_engine.train import footprint

FAMILIES = {"qwen2": {}, "llama": {"qkv_bias": False}, "qwen3": {"qkv_bias": False, "qk_norm": True}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps(family, dtype):
    config = dataclasses.replace(models.small_config(vocab=7), **FAMILIES[family])
    model = Model(config, getattr(torch, dtype)).init_weights(0)
    T, L, kept = 512, config.num_hidden_layers, {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and t.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logprob, _ = model.logprobs(torch.zeros(T, dtype=torch.int64), torch.tensor([0, T], dtype=torch.int32))
    assert logprob.requires_grad
    shapes = footprint.Shapes(config, footprint.count_params(config)[0], footprint.BYTES[dtype])
    layer = shapes.activation_bytes(False) / (L + 2)
    outside = shapes.size * 3 * config.hidden_size + 64  # the last norm, scored rows, sums of the head
    assert L * layer * 0.9 <= sum(kept.values()) / T <= L * layer + outside


@pytest.fixture
def folder(tmp_path):
    weights.save_checkpoint(models.random_model(models.small_config(vocab=MicroTokenizer().vocab_size)), tmp_path / "m")
    return tmp_path / "m"


def config_of(folder, *settings):
    return load_run_config(None, [
        f"model.path={folder}", "model.size=null", "steps=1", "batch={prompts: 8, group_size: 16}", "evaluation.count=0",
        "rollout.max_new_tokens=64", "device=cpu", *settings,
    ])  # fmt: skip


@pytest.mark.parametrize("share", [0.97, 0.7, 0.45])
def test_a_run_that_does_not_fit_is_refused_with_settings_that_make_it_fit(folder, tmp_path, monkeypatch, share):
    config, model = config_of(folder), hf_config.read_config(folder)

    def needs(c):
        shapes = footprint.Shapes(model, footprint.count_params(model)[0], footprint.BYTES[c.model.dtype])
        return footprint.peak_bytes(footprint.memory(c, shapes, 10, c.rollout.max_new_tokens))

    room = share * needs(config)
    monkeypatch.setattr(footprint, "free_bytes", lambda _: room / footprint.ROOM)
    monkeypatch.setattr(weights, "load_model", lambda *_a, **_k: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match=r"of memory are free on cpu, .*: it would fit with \S+=") as error:
        train(config, tmp_path / "run", quiet=True)
    assert "weights" in str(error.value) and "GRPO_ENGINE_MEMORY_CHECK=0" in str(error.value)

    fits = lambda c: needs(c) <= room  # noqa: E731
    settings = footprint.settings_that_fit(config, fits, least_pages=6)
    assert 1 <= len(settings) <= 3 and fits(type(config).model_validate(apply_overrides(config.model_dump(), settings)))
    for name in ("rollout.num_pages", "batch.tokens_per_micro_batch"):  # as large as fits
        for i, setting in enumerate(settings):
            if setting.startswith(name) and setting != "batch.tokens_per_micro_batch=4096":
                more = f"{name}={int(setting.partition('=')[2]) + 1}"
                tried = [*settings[:i], more, *settings[i + 1 :]]
                assert not fits(type(config).model_validate(apply_overrides(config.model_dump(), tried)))


def test_no_settings_help_where_the_weights_alone_are_too_large(folder, monkeypatch):
    monkeypatch.setattr(footprint, "free_bytes", lambda _: 1000)
    with pytest.raises(ValueError, match="no three settings would make it fit"):
        footprint.require_room(config_of(folder), hf_config.read_config(folder), 10)
    monkeypatch.setenv(footprint.SWITCH, "0")
    assert footprint.require_room(config_of(folder), hf_config.read_config(folder), 10) is False
    monkeypatch.setattr(footprint, "free_bytes", lambda _: None)  # a system that does not say
    assert footprint.require_room(config_of(folder), hf_config.read_config(folder), 10)


def test_pages_that_do_not_fit_beside_training_are_given_back_and_change_no_bit(folder, tmp_path, monkeypatch):
    from grpo_engine.records import records
    from grpo_engine.run import run

    found = []
    for name, stay in (("stay", True), ("turns", False)):
        monkeypatch.setattr(footprint, "require_room", lambda *_, stay=stay: stay)
        engines = []
        monkeypatch.setattr(run, "Engine", lambda *a, engines=engines, **k: engines.append(Engine(*a, **k)) or engines[0])
        run.train(config_of(folder, "steps=2", "task.eval_problems=2"), tmp_path / name, quiet=True)
        assert (engines[0].runner.cache is not None) == stay
        found.append((tmp_path / name / records.STEPS_FILE).read_bytes())
    assert found[0] == found[1]


def test_free_memory_is_no_more_than_the_machine_has():
    free, total = free_bytes("cpu"), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert free is None or 0 < free <= total
