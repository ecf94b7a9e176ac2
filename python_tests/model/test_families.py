"""Families: sizes as published, the arithmetic of transformers, one model for sampling and training."""

import copy
import dataclasses
import json
import re

import models
import pytest
import torch
from conftest import DEVICES
from published import LLAMA3, PUBLISHED, published

from grpo_engine.config import RolloutConfig
from grpo_engine.model import hf_config, weights
from grpo_engine.model.config import FAMILIES
from grpo_engine.model.decoder import Model, Packed, packed_positions, rope_frequencies
from grpo_engine.rollout.engine import derive_seeds, generate
from grpo_engine.train.footprint import count_params

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models_are_those_of_transformers(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published(name)))
    config = hf_config.read_config(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = Model(config)
        one, two = (  # every layer has as many, and 80 of them take seconds to build
            transformers.AutoModelForCausalLM.from_config(_with_layers(theirs, n)) for n in (1, 2)
        )
    count, more = (sum(p.numel() for p in m.parameters()) for m in (one, two))
    everything = count + (config.num_hidden_layers - 1) * (more - count)
    tables = {id(t.weight): t.weight.numel() for t in (one.get_input_embeddings(), one.get_output_embeddings())}
    assert model.num_parameters == everything
    assert model.num_non_embedding == everything - sum(tables.values())
    assert count_params(config) == (model.num_non_embedding, model.num_parameters)
    shapes = {k: tuple(v.shape) for k, v in one.named_parameters()}
    ours = weights.pieces(dataclasses.replace(config, num_hidden_layers=1))
    assert {k: piece.shape for k, piece in ours.items()} == shapes


def _with_layers(config, count):
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    return config


def tiny(kind):
    """A random model of transformers, norms and biases random as well."""
    torch.manual_seed(7)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=kind != "llama")  # fmt: skip
    if kind == "qwen3":
        sizes["head_dim"] = 12  # not the quotient
    if kind == "mistral":
        sizes["sliding_window"] = None
    if kind == "llama":  # a reach so short that the angles of this test are slowed, kept and mixed
        sizes |= {"rope_parameters": LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 64}}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **sizes), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.2 if p.dim() == 2 else 0.3) + (1.0 if "norm" in name else 0.0))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "theirs"
    theirs = tiny(request.param)
    theirs.save_pretrained(folder)
    return weights.load_model(folder), theirs, folder


def test_logits_equal_transformers(both):
    model, theirs, _ = both
    lengths = [1, 2, 17, 200]
    tokens = torch.randint(97, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    with torch.no_grad():
        ours = model.logits(model(tokens, packed_positions(cu), Packed(cu))).split(lengths)
        for row, ids in zip(ours, tokens.split(lengths), strict=True):
            want = theirs(ids[None]).logits[0]
            assert want.abs().max() > 1.0
            assert (row - want).abs().max() <= 1e-4


def test_greedy_tokens_equal_transformers_and_training_has_the_bits_of_sampling(both, on_threads):
    model, theirs, _ = both
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(96, (n,), generator=generator).tolist() for n in (1, 5, 17, 30)]
    config = RolloutConfig(max_new_tokens=40)
    ask = dict(group_size=1, seeds=derive_seeds(0, count=4), stop_ids=[96])
    for prompt, answer in zip(
        prompts, generate(model, prompts, **ask, temperature=0.0, config=config).responses(), strict=True
    ):
        ids = torch.tensor([prompt])
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=96, pad_token_id=0
        )
        assert answer == want[0, len(prompt) :].tolist()

    scarce = config.model_copy(update={"num_pages": 12, "max_step_tokens": 16})
    rollout = generate(model, prompts, **ask, temperature=1.0, config=scarce)
    logprob, *others = on_threads(lambda: model.logprobs(rollout.tokens, rollout.cu_seqlens)[0].detach())
    assert all(torch.equal(logprob, other) for other in others)
    starts = zip(rollout.cu_seqlens[:-1].tolist(), rollout.prompt_len.tolist(), strict=True)
    answered = torch.cat(
        [
            torch.arange(first + prompt, end)
            for (first, prompt), end in zip(starts, rollout.cu_seqlens[1:].tolist(), strict=True)
        ]
    )
    sequence = torch.bucketize(answered, rollout.cu_seqlens[1:], right=True)
    assert torch.equal(logprob[answered - 1 - sequence], rollout.logprob[answered])


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_has_the_bits_of_sampling_on_every_device(both, dtype, place):
    model = weights.load_model(both[2], dtype=dtype, device=place)
    rollout = generate(model, [[3, 1, 4, 1, 5]], group_size=3, seeds=derive_seeds(0, count=3), stop_ids=[],
                       config=RolloutConfig(max_new_tokens=20))  # fmt: skip
    logprob = model.logprobs(rollout.tokens.to(place), rollout.cu_seqlens.to(place))[0].cpu()
    assert torch.equal(logprob.view(3, 24)[:, 4:], rollout.logprob.view(3, 25)[:, 5:])


def test_gradients_equal_transformers_with_activation_checkpointing_or_without(both):
    model, theirs, folder = both
    tokens = torch.randint(97, (50,), generator=torch.Generator().manual_seed(6))
    theirs.zero_grad()
    theirs(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None]).mean().backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    layout, grads = weights.pieces(model.config), []
    for checkpointed in (False, True):
        model.zero_grad()
        cu = torch.tensor([0, 50], dtype=torch.int32)
        model.logprobs(tokens, cu, activation_checkpointing=checkpointed)[0].mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(a, grads[1][name]) for name, a in grads[0].items())
    for name, piece in layout.items():
        got = grads[0][piece.parameter][piece.start : piece.start + piece.shape[0]]
        torch.testing.assert_close(got, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_saved_model_is_the_same_in_transformers(both, tmp_path):
    model, theirs, _ = both
    weights.save_checkpoint(model, tmp_path / "m")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert type(again) is type(theirs) and hf_config.read_config(tmp_path / "m") == model.config
    ours, wanted = again.state_dict(), theirs.state_dict()
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[k], wanted[k]) for k in ours)
    assert hf_config.read_config(tmp_path / "m").model_type == model.config.model_type == theirs.config.model_type
    for name in ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "head_dim", "sliding_window"):
        assert getattr(again.config, name, None) == getattr(theirs.config, name, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_ops_have_the_bits_of_the_fused_layer(dtype, monkeypatch):
    model = models.random_model(dtype=dtype)
    tokens = torch.randint(97, (60,), generator=torch.Generator().manual_seed(6))
    cu = torch.tensor([0, 20, 60], dtype=torch.int32)
    fused = model.logprobs(tokens, cu)[0]
    for layer in model.layers:
        monkeypatch.setattr(layer, "fused", False)
    assert torch.equal(model.logprobs(tokens, cu)[0], fused)


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Llama-3.1-8B"])
def test_scaled_frequencies_are_those_of_transformers(name, tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    (tmp_path / "config.json").write_text(json.dumps(published(name)))
    c = hf_config.read_config(tmp_path)
    want, scale = ROPE_INIT_FUNCTIONS["llama3"](transformers.AutoConfig.from_pretrained(tmp_path))
    ours = rope_frequencies(c.rope_theta, c.head_dim, c.rope_scaling, torch.device("cpu"))
    assert scale == 1.0 and torch.equal(ours, want)


@pytest.mark.parametrize("window,got", [(4096, "4096"), (..., "none (then it is 4096)")])
def test_a_mistral_with_a_window_is_refused(window, got, tmp_path):
    tiny("mistral").config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw.pop("sliding_window") is None
    raw |= {} if window is ... else {"sliding_window": window}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="sliding_window must be null .*, got " + re.escape(got)):
        hf_config.read_config(tmp_path)


def test_a_model_that_no_family_knows_is_not_saved(tmp_path):
    config = dataclasses.replace(models.small_config(), qk_norm=True)
    with pytest.raises(ValueError, match="no family has qkv_bias=True with qk_norm=True"):
        weights.save_checkpoint(Model(config).init_weights(0), tmp_path / "m")
    assert not list(tmp_path.iterdir())
