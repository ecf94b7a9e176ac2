"""One GRPO step of a tiny model, on each device and with the emulated CUDA kernels too (whole runs: test_train.py)."""

import copy
import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import models
import pytest
import torch
from conftest import DEVICES

from grpo_engine.config import RunConfig
from grpo_engine.model.config import ModelConfig
from grpo_engine.model.tokenizer import PromptTokens
from grpo_engine.records.ledger import Ledger
from grpo_engine.rollout.engine import Engine, derive_seeds
from grpo_engine.train import step as step_module
from grpo_engine.train.optimizer import adamw
from grpo_engine.train.step import Scored, groups_to_train, grpo_step, informative
from grpo_engine.types import Problem, Reward, RolloutBatch

TINY = ModelConfig(
    vocab_size=23, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
PROBLEMS = [Problem(uid=text, prompt=text, answer="", domain="", reward="exact") for text in ("3 4 5", "6 7")]


class Tokenizer:
    """A prompt is a list of token ids."""

    stop_ids = (1,)

    def encode_prompt(self, prompt, chat):
        return [int(word) for word in prompt.split()]

    def decode(self, tokens):
        return list(tokens)


class Pool:
    """A response is worth the parity of its tokens."""

    @contextmanager
    def begin(self, problems):
        self.rewards = [None] * len(problems)
        yield self

    def add(self, sequences, responses):
        for sequence, response in zip(sequences, responses, strict=True):
            self.rewards[sequence] = Reward(value=float(sum(response) % 2))

    def finish(self):
        return self.rewards


def two_steps(place, dtype, keep=True, **batch):
    """The outcomes of two steps, and the weights after them."""
    policy = models.random_model(TINY, dtype=dtype).to(place)
    reference = copy.deepcopy(policy).requires_grad_(False)
    engine = Engine(policy, keep=keep)
    optimizer = adamw(policy.parameters(), lr=1e-2, betas=(0.9, 0.999))
    settings = {"prompts": 2, "group_size": 3, "minibatches": 2, "tokens_per_micro_batch": 8}
    config = RunConfig(rollout={"max_new_tokens": 3}, optimizer={"lr": 1e-2}, batch=settings | batch)
    encode = PromptTokens(Tokenizer(), chat=False)
    outcomes = [
        grpo_step(engine, reference, optimizer, iter(PROBLEMS), tokenizer=Tokenizer(), encode=encode, pool=Pool(),
                  config=config, step=step, ledger=Ledger(device=place))
        for step in (1, 2)
    ]  # fmt: skip
    assert (engine.runner.cache is not None) == keep
    return outcomes, [p.detach() for p in policy.parameters()]


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_repeats_itself_with_less_memory_too(dtype, place):
    outcomes, weights = two_steps(place, dtype)
    again, same_weights = two_steps(place, dtype, keep=False, activation_checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(weights, same_weights, strict=True))
    for one, other in zip(outcomes, again, strict=True):
        assert (one.loss, one.grad_norm, one.stats) == (other.loss, other.grad_norm, other.stats)
        assert torch.equal(one.scored.rollout.tokens, other.scored.rollout.tokens)
        assert one.mismatch_max == 0.0  # the sampler's bits are the trainer's
        assert one.grad_norm > 0 and one.stats.kl > 0 or one is outcomes[0]


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_micro_batches_step_as_one(dtype, place):
    (one, _), _ = two_steps(place, dtype, tokens_per_micro_batch=1000)
    (many, _), _ = two_steps(place, dtype, tokens_per_micro_batch=1)
    assert many.trained_tokens == one.trained_tokens and many.stats.tokens == one.stats.tokens
    # a micro-batch's gradient of a weight is rounded to the weight's type, and then added up in float32
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=4 * rounding)
    assert many.loss == pytest.approx(one.loss, rel=4 * rounding, abs=4 * rounding)


class FirstTokens(Pool):
    """A response is worth 1 where its first token is below a limit."""

    below = 12

    def add(self, sequences, responses):
        for sequence, response in zip(sequences, responses, strict=True):
            self.rewards[sequence] = Reward(value=float(response[0] < self.below))


def dynamic(rounds, *, pool=None, prompts=4, mask_truncated=False, reward=None, tokenizer=None):
    """(outcome, weights, problems taken) of one step with at most so many rounds of sampling."""
    policy = models.random_model(TINY, scale=3.0)
    taken = []

    def problems():
        for n in itertools.count():
            taken.append(n)
            yield Problem(uid=str(n), prompt=f"{2 + n % 20} {3 + n // 20}", answer="", domain="", reward="exact")

    config = RunConfig(
        rollout={"max_new_tokens": 3}, optimizer={"lr": 1e-2}, reward=reward or {},
        loss={"kl_coef": 0.0, "mask_truncated": mask_truncated},
        batch={"prompts": prompts, "group_size": 2, "sampling_rounds": rounds, "tokens_per_micro_batch": 8},
    )  # fmt: skip
    optimizer = adamw(policy.parameters(), lr=1e-2, betas=(0.9, 0.999))
    outcome = grpo_step(
        Engine(policy), None, optimizer, problems(), tokenizer=tokenizer or Tokenizer(),
        encode=PromptTokens(Tokenizer(), chat=False), pool=pool or FirstTokens(), config=config, step=1, ledger=Ledger(),
    )  # fmt: skip
    return outcome, [p.detach() for p in policy.parameters()], taken


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_further_rounds_replace_groups_of_equal_reward(monkeypatch):
    """What is trained on is the step over the first P groups whose rewards differ, wherever they were sampled."""
    seeds = []
    monkeypatch.setattr(step_module, "derive_seeds", lambda *a, **k: seeds.append(derive_seeds(*a, **k)) or seeds[-1])
    one, before, taken = dynamic(1, prompts=6)
    assert one.zero_variance_groups > 0 and len(taken) == 6
    many, after, taken = dynamic(50, prompts=6)
    rewards = many.scored.rewards_PG
    differ = (rewards[:, 0] != rewards[:, 1]).nonzero().flatten().tolist()
    assert len(differ) == 6 and len(rewards) == len(taken) > 6 and not same_weights(before, after)
    assert groups_to_train(rewards[:, 0] != rewards[:, 1], 6) == differ
    assert torch.equal(many.scored.rollout.tokens[: len(one.scored.rollout.tokens)], one.scored.rollout.tokens)
    assert many.zero_variance_groups == len(taken) - 6 and many.stats.tokens == sum(
        int(many.scored.rollout.response_len[2 * g : 2 * g + 2].sum()) for g in differ
    )
    assert many.mismatch_max == 0.0
    of_the_step = torch.cat(seeds[1:]).tolist()
    assert len(seeds) > 2 and len(set(of_the_step)) == len(of_the_step) == 2 * len(taken)
    again, same, _ = dynamic(50, prompts=6)
    assert same_weights(after, same) and torch.equal(again.scored.rollout.tokens, many.scored.rollout.tokens)


def test_rounds_are_bounded_and_the_batch_is_filled_up():
    outcome, _, taken = dynamic(3, pool=Equal())
    assert len(taken) == 3 * 4 and outcome.zero_variance_groups == 12  # each round samples what is missing: all
    assert outcome.loss == 0.0
    assert groups_to_train(torch.zeros(12, dtype=torch.bool), 4) == [0, 1, 2, 3]
    assert groups_to_train(torch.tensor([False, False, True, False, True]), 3) == [0, 2, 4]


def test_a_group_that_will_be_masked_teaches_nothing():
    rewards = tuple(Reward(value=v) for v in (1.0, 0.0, 0.5, 0.2, 0.3, 0.3))
    rollout = SimpleNamespace(finish=("stop", "length", "length", "length", "stop", "stop"), group_size=2)
    scored = Scored(rollout=rollout, rewards=rewards)
    assert informative(scored, RunConfig()).tolist() == [True, True, False]
    assert informative(scored, RunConfig(loss={"mask_truncated": True})).tolist() == [True, False, False]


def test_sampled_groups_are_taken_and_joined_unchanged():
    rollout = dynamic(50)[0].scored.rollout
    P = rollout.num_sequences // 2
    parts = [rollout.take([g]) for g in range(P)]
    joined = RolloutBatch.join(parts)
    for name in ("tokens", "cu_seqlens", "prompt_len", "logprob", "entropy", "finish"):
        a, b = getattr(rollout, name), getattr(joined, name)
        assert a == b if name == "finish" else torch.equal(a, b) and a.dtype == b.dtype, name
    assert [p.responses() for p in parts] == [rollout.responses()[2 * g : 2 * g + 2] for g in range(P)]
    assert rollout.take([2, 0]).responses() == parts[2].responses() + parts[0].responses()


class Equal(FirstTokens):
    """No response is worth anything."""

    below = 0


class Short(Tokenizer):
    """A third of the vocabulary ends a response."""

    stop_ids = tuple(range(8))


class Endless(Tokenizer):
    """No token ends a response."""

    stop_ids = ()


def test_masked_responses_are_counted_and_a_step_of_them_alone_trains_nothing():
    some, _, _ = dynamic(1, mask_truncated=True, tokenizer=Short())
    cut_off = some.scored.rollout.finish.count("length")
    assert 0 < cut_off == some.masked_responses < 8 and some.loss is not None
    all_of_them, weights, _ = dynamic(1, mask_truncated=True, tokenizer=Endless())
    assert all_of_them.masked_responses == 8 and all_of_them.trained_tokens == 0
    assert all_of_them.loss is all_of_them.grad_norm is all_of_them.stats is all_of_them.mismatch_max is None
    assert same_weights(weights, [p.detach() for p in models.random_model(TINY, scale=3.0).parameters()])


def test_long_responses_lose_reward_in_training_alone():
    settings = {"tokenizer": Short(), "pool": Equal()}
    plain, before, _ = dynamic(1, **settings)
    shaped, after, _ = dynamic(1, reward={"overlong_buffer": 3, "overlong_penalty": 0.7}, **settings)
    assert torch.equal(plain.scored.rewards_PG, shaped.scored.rewards_PG) and not same_weights(before, after)
    lengths = shaped.scored.rollout.response_len.double()
    assert plain.overlong_penalty == 0 and len(set(lengths.tolist())) > 1
    assert shaped.overlong_penalty == pytest.approx(float((0.7 * lengths / 3).mean()), rel=1e-6)
    assert plain.zero_variance_groups == shaped.zero_variance_groups == 4 and plain.loss == 0.0 != shaped.loss
