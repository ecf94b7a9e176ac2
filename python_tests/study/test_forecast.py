"""What a run is predicted to take, against what one did and against published sizes."""

import pytest

from grpo_engine.config import ModelSource, load_run_config
from grpo_engine.model.config import ModelConfig
from grpo_engine.model.decoder import Model
from grpo_engine.model.weights import save_checkpoint
from grpo_engine.records import records
from grpo_engine.records.cost import total_cost
from grpo_engine.run.run import train
from grpo_engine.study.forecast import EstimateConfig, architecture, forecast, num_params, pace
from grpo_engine.study.gpus import GPUS, gpu_here
from grpo_engine.train.footprint import count_params


@pytest.mark.parametrize(
    "size, inside, everything",
    [("0.5B", 0.36, 494_032_768), ("1.5B", 1.31, 1_543_714_304), ("3B", 2.77, 3_085_938_688), ("7B", 6.53, 7_615_616_512),
     ("14B", 13.1, 14_770_033_664), ("32B", 31.0, 32_763_876_352), ("72B", 70.0, 72_706_203_648)],
)  # fmt: skip
def test_sizes_are_those_that_are_published(size, inside, everything):
    """Billions without embeddings, from the model cards; all of them, from the checkpoints' metadata."""
    n, total = count_params(architecture(ModelSource(path=f"models/Qwen2.5-{size}-Instruct")))
    assert n == pytest.approx(inside * 1e9, rel=0.01) and total == everything


@pytest.mark.parametrize(
    "size, inside, everything",
    [("0.6B", 0.44, 596_049_920), ("1.7B", 1.41, 1_720_574_976), ("4B", 3.63, 4_022_468_096), ("8B", 6.95, 8_190_735_360),
     ("14B", 13.2, 14_768_307_200), ("32B", 31.2, 32_762_123_264)],
)  # fmt: skip
def test_sizes_of_qwen3_are_those_that_are_published(size, inside, everything):
    n, total = count_params(architecture(ModelSource(path=f"Qwen/Qwen3-{size}-Base")))
    assert n == pytest.approx(inside * 1e9, rel=0.01) and total == everything


@pytest.mark.parametrize("tied, family", [(True, {}), (False, {}), (False, {"qkv_bias": False, "qk_norm": True})])
def test_parameters_are_those_of_the_model(tied, family):
    config = ModelConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied, **family)  # fmt: skip
    model = Model(config)
    assert count_params(config) == (model.num_non_embedding, model.num_parameters)


def test_a_model_that_nobody_knows_has_its_nominal_size():
    assert num_params(ModelSource(path="/nowhere/Llama-3-8B", params_nominal=8e9)) == 8_000_000_000
    with pytest.raises(FileNotFoundError, match="no config.json, the name is no Qwen2.5 or Qwen3 model's"):
        num_params(ModelSource(path="/nowhere/Llama-3-8B"))


@pytest.mark.parametrize("method", ["grpo", "pretrain"])
def test_phases_are_those_of_the_ledger(tmp_path, method, monkeypatch):
    """A run with the lengths that it turned out to have: tokens to the last one, FLOPs to what their spread costs."""
    import models

    from grpo_engine.micro.tokenizer import MicroTokenizer

    tiny = models.small_config(vocab=MicroTokenizer().vocab_size)
    save_checkpoint(models.random_model(tiny, scale=3.0), tmp_path / "tiny")
    settings = ["steps=2", "batch={prompts: 8, group_size: 4}", "task.eval_problems=40", "rollout.max_new_tokens=6",
                "evaluation={count: 2, samples: 3, others_every: 1}", f"model={{path: {tmp_path / 'tiny'}}}"]  # fmt: skip
    if method == "pretrain":
        settings += ["method=pretrain", "model={size: xs}", "evaluation.count=0"]
        monkeypatch.setattr("grpo_engine.run.run.load_policy", _untrained)
    config = load_run_config(None, settings)
    run = records.read_run(train(config, tmp_path / "run", quiet=True))
    cost = total_cost(run.timings)
    if method == "pretrain":
        estimate = EstimateConfig(prompt_tokens=6, response_tokens=run.steps[-1].trained_tokens / 64 - 5)
    else:
        answers = sum(s.response_tokens for s in run.steps) / 64
        estimate = EstimateConfig(prompt_tokens=sum(s.prompt_tokens for s in run.steps) / 64, response_tokens=answers)
    expected = forecast(config, estimate)
    assert expected.trained_tokens == pytest.approx(run.steps[-1].trained_tokens)
    for phase, flops in expected.phases.items():
        measured = cost[phase].flops if phase in cost else 0.0
        assert flops == pytest.approx(measured, rel=0.25 if phase == "evaluation" else 0.05), phase


def _untrained(config, _source, _task):
    from grpo_engine.load import Policy, load_tokenizer
    from grpo_engine.micro import ladder
    from grpo_engine.model.tokenizer import PromptTokens

    tokenizer = load_tokenizer("micro")
    model = Model(ladder.architecture(config.model.size)).init_weights(0)
    encode = PromptTokens(tokenizer, chat=False)
    return Policy(tokenizer=tokenizer, encode=encode, model=model, pages_stay=True, revision=None)


def test_a_gpu_is_bounded_by_matmuls_or_by_bandwidth():
    config = load_run_config(None, ["model={path: models/Qwen2.5-7B, dtype: bfloat16}", "steps=1", "evaluation.count=0",
                                    "batch={prompts: 64, group_size: 8}", "loss.kl_coef=0"])  # fmt: skip
    estimate = EstimateConfig(prompt_tokens=100, response_tokens=1000, gpu="h200", start_s=0, usd_per_hour=4,
                              flops_fraction=0.4, bandwidth_fraction=0.6)  # fmt: skip
    many = forecast(config, estimate)
    few = forecast(config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_running": 8})}), estimate)
    rate, gpu = 0.4 * GPUS["h200"].flops, GPUS["h200"]
    matmuls = (many.flops - many.phases["decode"]) / rate
    kv = 2 * 2 * 28 * 4 * 128
    assert few.flops == many.flops
    tokens = 512 * 1000
    read = tokens * (2 * 7.6156e9 / 8 + 600 * kv) / (0.6 * gpu.bandwidth)
    assert few.seconds == pytest.approx(matmuls + read, rel=1e-3)
    assert many.seconds == pytest.approx(matmuls + many.phases["decode"] / rate, rel=1e-3)
    assert few.usd == pytest.approx(few.seconds * 4 / 3600)
    assert many.devices == 2 and many.memory["weights"] == pytest.approx(2 * 7.6156e9, rel=1e-3)
    assert many.memory["gradients"] == 2 * many.memory["weights"] and many.memory["optimizer"] == 5 * many.memory["weights"]
    assert "reference" not in many.memory


@pytest.mark.parametrize("size, rollout_s, training_s", [("0.5B", 0.298, 0.0937), ("1.5B", 0.571, 0.175)])
def test_a_gpu_is_as_fast_as_one_h200_was(size, rollout_s, training_s):
    """benchmarks/results/h200/results.md: 16 x 16 responses of 64 tokens to prompts of 256; training on 4,096 tokens."""
    config = load_run_config(None, [f"model={{path: models/Qwen2.5-{size}, dtype: bfloat16}}", "evaluation.count=0",
                                    "batch={prompts: 16, group_size: 16}", "loss.kl_coef=0", "steps=1"])  # fmt: skip
    estimate = EstimateConfig(prompt_tokens=256, response_tokens=64, gpu="h200", start_s=0)
    run = forecast(config, estimate)
    phases = run.phases
    gpu = GPUS["h200"]
    learning = gpu.learning_seconds(phases["forward"] + phases["backward"], dtype="bfloat16")
    prefill = gpu.learning_seconds(phases["prefill"], dtype="bfloat16")
    assert (run.seconds - learning) / rollout_s == pytest.approx(1.0, abs=0.3)
    assert prefill < 0.1 * run.seconds
    model = architecture(config.model)
    inside, whole = count_params(model)
    flops = 6.0 * (inside + model.vocab_size * model.hidden_size) * 4096
    assert 0.5 < gpu.learning_seconds(flops, dtype="bfloat16") / training_s < 1.1 and whole > inside


@pytest.mark.parametrize("settings", [["model.size=s"], ["model={path: models/Qwen2.5-7B, dtype: bfloat16}"]])
def test_a_run_of_any_length_has_the_pace_of_its_forecast(settings):
    """Evaluations are bound by one limit and training's decoding by the other, so that the time is linear in the steps."""
    config = load_run_config(None, [*settings, "steps=30"])
    estimate = EstimateConfig(prompt_tokens=100, response_tokens=300, gpu="h200")
    its_pace = pace(config, estimate)
    for steps in (1, 30, 977):
        cost = forecast(config.model_copy(update={"steps": steps}), estimate)
        compute = 6.0 * num_params(config.model) * cost.trained_tokens
        assert its_pace.seconds(compute) == pytest.approx(cost.seconds, rel=1e-9)
        assert its_pace.compute(cost.seconds) == pytest.approx(compute, rel=1e-6)


def test_memory_decides_how_many_gpus():
    config = load_run_config(None, ["model={path: models/Qwen2.5-72B, dtype: bfloat16}"])
    cost = forecast(config, EstimateConfig(gpu="h100"))
    assert cost.devices in (8, 16, 32) and 0.9 * cost.devices / 2 * 80e9 < cost.peak_bytes <= 0.9 * cost.devices * 80e9


@pytest.mark.parametrize("checkpointing, activations", [(True, 4.3e9), (False, 26e9)])
def test_memory_at_the_7b_shape_is_what_the_documents_count(checkpointing, activations):
    """docs/memory.md, the 7B shape on an H200: micro-batches of 8,192 tokens, 36,000 pages."""
    config = load_run_config(None, ["model={path: models/Qwen2.5-7B, dtype: bfloat16}", "rollout.num_pages=36000",
                                    "batch={prompts: 512, group_size: 8, tokens_per_micro_batch: 8192}",
                                    f"batch.activation_checkpointing={checkpointing}"])  # fmt: skip
    cost = forecast(config, EstimateConfig(prompt_tokens=120, response_tokens=1050))
    m = cost.memory
    assert m["weights"] + m["optimizer"] + m["gradients"] == pytest.approx(121.8e9, rel=1e-3)
    assert m["reference"] == pytest.approx(15.2e9, rel=5e-3) and m["KV"] == pytest.approx(33e9, rel=5e-3)
    assert m["activations"] == pytest.approx(activations, rel=0.03)
    assert cost.peak_bytes == pytest.approx(137e9 + activations, rel=0.01)


@pytest.mark.parametrize("name, gpu", [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4")])
def test_the_gpu_here_is_known_by_its_name(monkeypatch, name, gpu):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    assert gpu_here() == gpu
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla T4")
    with pytest.raises(ValueError, match="must be one of .*, got Tesla T4"):
        gpu_here()
