"""The model against transformers, and its own promises."""

import models
import pytest
import torch
from conftest import DEVICES

from grpo_engine import ops
from grpo_engine.config import RolloutConfig
from grpo_engine.model import weights
from grpo_engine.model.config import ModelConfig
from grpo_engine.model.decoder import Model, Packed, packed_positions
from grpo_engine.rollout.engine import derive_seeds, generate

HEADS = [(4, 4), (4, 2), (7, 1)]  # query/key ratios 1, 2, 7


def lengths_to_cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads,kv_heads", HEADS)
def test_logits_equal_transformers(heads, kv_heads, tied, tmp_path):
    model = models.random_model(models.small_config(heads=heads, kv_heads=kv_heads, tied=tied))
    theirs = models.as_transformers(model, tmp_path / "hf")
    lengths = [1, 2, 17, 60]
    tokens = torch.randint(97, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    cu = lengths_to_cu(lengths)
    with torch.no_grad():
        hidden = model(tokens, packed_positions(cu), Packed(cu))
        ours = model.logits(hidden).split(lengths)
        for row, ids in zip(ours, tokens.split(lengths), strict=True):
            want = theirs(ids[None]).logits[0]
            assert want.abs().max() > 1.0  # the comparison means something
            assert (row - want).abs().max() <= 1e-4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads,kv_heads", HEADS)
def test_greedy_generation_equals_transformers_for_64_tokens(heads, kv_heads, tied, tmp_path):
    model = models.random_model(models.small_config(heads=heads, kv_heads=kv_heads, tied=tied), seed=5)
    theirs = models.as_transformers(model, tmp_path / "hf")
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(97, (n,), generator=generator).tolist() for n in range(1, 33, 2)]
    assert len(prompts) == 16
    rollout = generate(
        model, prompts, group_size=1, seeds=derive_seeds(0, count=16), stop_ids=[96], temperature=0.0,
        config=RolloutConfig(max_new_tokens=64),
    )  # fmt: skip
    for prompt, answer in zip(prompts, rollout.responses(), strict=True):
        ids = torch.tensor([prompt])
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, eos_token_id=96, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert answer == want


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_the_choice_of_batch_invariance_reaches_every_product(batch_invariant, monkeypatch, tmp_path):
    weights.save_checkpoint(models.random_model(), tmp_path)
    model = weights.load_model(tmp_path, batch_invariant=batch_invariant)
    seen = []

    def watched(name, op):
        def call(*args, **kwargs):
            seen.append((name, kwargs["batch_invariant"]))
            return op(*args, **kwargs)

        return call

    names = {"linear", "token_logprob", "decoder_layer", "decoder_layer_paged"}
    for name in names:
        monkeypatch.setattr(ops, name, watched(name, getattr(ops, name)))
    rollout = generate(model, [[1, 2, 3]], group_size=1, seeds=derive_seeds(0, count=1), stop_ids=[],
                       config=RolloutConfig(max_new_tokens=4))  # fmt: skip
    tokens = torch.tensor([1, 2, 3, *rollout.responses()[0]])
    logprob, _ = model.logprobs(tokens, lengths_to_cu([7]))
    assert set(seen) == {(name, batch_invariant) for name in names}
    # logits of up to 30 in magnitude, sums in another order at most
    torch.testing.assert_close(logprob[2:], rollout.logprob[3:], rtol=0, atol=0 if batch_invariant else 1e-4)


def test_gradients_equal_transformers(tmp_path):
    model = models.random_model()
    theirs = models.as_transformers(model, tmp_path / "hf")
    tokens = torch.randint(97, (50,), generator=torch.Generator().manual_seed(6))
    logprob, _ = model.logprobs(tokens, lengths_to_cu([50]))
    logprob.mean().backward()
    want = theirs(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None]).mean()
    want.backward()
    theirs_by_name = dict(theirs.named_parameters())
    ours = dict(model.named_parameters())
    for layer in range(2):
        qkv = torch.cat([theirs_by_name[f"model.layers.{layer}.self_attn.{n}_proj.weight"].grad for n in "qkv"])
        torch.testing.assert_close(ours[f"layers.{layer}.qkv_weight"].grad, qkv, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        ours["embed.weight"].grad, theirs_by_name["model.embed_tokens.weight"].grad, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_scores_the_same_alone_in_a_batch_and_on_any_number_of_threads(dtype, on_threads):
    model = models.random_model(dtype=dtype)
    lengths = [5, 33, 2, 16] * 4  # eight threads take part then, though not in every kernel of the small model
    tokens = torch.randint(97, (sum(lengths),), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        one, *others = on_threads(lambda: model.logprobs(tokens, lengths_to_cu(lengths))[0])
        assert all(torch.equal(one, other) for other in others)
        alone = [model.logprobs(ids, lengths_to_cu([len(ids)]))[0] for ids in tokens.split(lengths)]
    assert torch.equal(torch.cat(alone), one)


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_keeps_less_and_changes_no_bit(dtype, place):
    model = models.random_model(dtype=dtype).to(place)
    lengths = [5, 33, 2, 16]
    tokens = torch.randint(97, (sum(lengths),), generator=torch.Generator().manual_seed(7)).to(place)
    results, kept = [], []

    def keep(t):
        kept[-1] += t.nbytes
        return t

    for checkpointed in (False, True):
        model.zero_grad()
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logprob, _ = model.logprobs(tokens, lengths_to_cu(lengths).to(place), activation_checkpointing=checkpointed)
        (logprob.cos() / 7).sum().backward()
        results.append([logprob.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / 2  # of it the weights, which are saved as such, are most
    with torch.no_grad():  # and where nothing is kept it does nothing
        plain = model.logprobs(tokens, lengths_to_cu(lengths).to(place), activation_checkpointing=True)[0]
    assert torch.equal(plain, results[0][0])


@pytest.mark.parametrize("place", DEVICES)
def test_weights_are_drawn_alike_on_every_device(place):
    on_cpu = Model(models.small_config(), torch.bfloat16).init_weights(3)
    with torch.device(place):
        there = Model(models.small_config(), torch.bfloat16).init_weights(3)
    assert there.device.type == place
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu.parameters(), there.parameters(), strict=True))


def test_non_embedding_parameters():
    tied = models.random_model(models.small_config(tied=True))
    untied = models.random_model(models.small_config(tied=False))
    assert tied.num_non_embedding == untied.num_non_embedding
    assert untied.num_parameters - tied.num_parameters == 97 * 32
    assert tied.num_parameters - tied.num_non_embedding == 97 * 32


@pytest.mark.parametrize(
    "change,says",
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"vocab_size": 0}, "vocab_size must be >= 1, got 0"),
    ],
)
def test_an_impossible_architecture_is_refused(change, says):
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8)  # fmt: skip
    with pytest.raises(ValueError, match=says):
        ModelConfig(**{**sizes, **change})
