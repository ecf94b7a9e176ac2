"""One GRPO step of a tiny model, on each device and with the emulated CUDA kernels too (whole runs: test_train.py)."""

import copy
from contextlib import contextmanager

import models
import pytest
import torch
from conftest import DEVICES

from grpo_engine.config import RunConfig
from grpo_engine.model.config import ModelConfig
from grpo_engine.model.tokenizer import PromptTokens
from grpo_engine.records.ledger import Ledger
from grpo_engine.rollout.engine import Engine
from grpo_engine.train.optimizer import adamw
from grpo_engine.train.step import grpo_step
from grpo_engine.types import Problem, Reward

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
    """An answer is worth the parity of its tokens."""

    @contextmanager
    def begin(self, problems):
        self.rewards = [None] * len(problems)
        yield self

    def add(self, sequences, answers):
        for sequence, answer in zip(sequences, answers, strict=True):
            self.rewards[sequence] = Reward(value=float(sum(answer) % 2))

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
        grpo_step(engine, reference, optimizer, PROBLEMS, tokenizer=Tokenizer(), encode=encode, pool=Pool(),
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
        assert torch.equal(one.rollout.tokens, other.rollout.tokens)
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
