"""Packing, and the cut into micro-batches that must not change the step."""

import dataclasses

import models
import pytest
import torch

from grpo_engine.config import LossConfig, RolloutConfig
from grpo_engine.rollout.engine import derive_seeds, generate
from grpo_engine.train.batch import minibatches, pack
from grpo_engine.train.loss import logprobs, policy_loss
from grpo_engine.types import RolloutBatch, RolloutStats

NO_STATS = RolloutStats(
    prefill_tokens=0, recomputed_tokens=0, decode_tokens=0, preemptions=0, prefill_seconds=0.0, decode_seconds=0.0
)


def example():
    return RolloutBatch(
        tokens=torch.tensor([5, 9, 2, 5, 9, 7, 2]),
        cu_seqlens=torch.tensor([0, 3, 7], dtype=torch.int32),
        prompt_len=torch.tensor([2, 2], dtype=torch.int32),
        logprob=torch.tensor([0, 0, -1.0, 0, 0, -2.0, -3.0]),
        entropy=torch.zeros(7),
        finish=("stop", "stop"),
        group_size=2,
        temperature=0.5,
        stats=NO_STATS,
    )


def test_the_example_of_the_docstring():
    rollout = example()
    assert rollout.responses() == [[2], [7, 2]]
    batch = pack(rollout, torch.tensor([0.5, -0.5]), sequences=[1, 0])
    assert batch.tokens.tolist() == [5, 9, 7]
    assert batch.positions.tolist() == [0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 3] and batch.cu_groups.tolist() == [0, 3]
    assert batch.rows.tolist() == [1, 2, 1] and batch.target.tolist() == [7, 2, 2]
    assert batch.cu_responses.tolist() == [0, 2, 3] and batch.num_sequences == 2 and batch.num_inputs == 5
    assert batch.old_logprob.tolist() == [-2.0, -3.0, -1.0] and batch.advantage.tolist() == [-0.5, -0.5, 0.5]
    assert batch.temperature == 0.5


def test_packing_does_not_follow_the_default_device():
    rollout = example()
    advantage = torch.tensor([0.5, -0.5])
    want = pack(rollout, advantage, sequences=[0, 1])
    with torch.device("meta"):
        got = pack(rollout, advantage, sequences=[0, 1])
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.cu_groups, want.cu_groups)


@pytest.fixture(scope="module")
def sampled():
    model = models.random_model(scale=4.0)
    prompts = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 9, 14, 20)]
    rollout = generate(model, prompts, group_size=4, seeds=derive_seeds(1, count=16), stop_ids=[7],
                       config=RolloutConfig(max_new_tokens=20))  # fmt: skip
    return model, rollout, torch.randn(16, generator=torch.Generator().manual_seed(1))


def gradient(model, rollout, advantage, budget, loss):
    model.zero_grad()
    total = 0.0
    (minibatch,) = minibatches(rollout, advantage, count=1, tokens_per_micro_batch=budget)
    for micro in minibatch.micro_batches:
        logprob = logprobs(model, micro)
        # an old policy that differs, so that ratios are not all 1
        old = micro.old_logprob + 0.3 * torch.sin(micro.target.float())
        object.__setattr__(micro, "old_logprob", old)
        result = policy_loss(logprob, micro, minibatch, loss)
        result.loss.backward()
        total += result.loss.item()
    return len(minibatch.micro_batches), total, {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(kl_coef=0.0),
        LossConfig(kl_coef=0.0, aggregation="sequence_mean"),
        LossConfig(kl_coef=0.0, aggregation="sequence_mean", ratio="sequence"),
        LossConfig(kl_coef=0.0, aggregation="constant", constant_length=20),
        LossConfig(kl_coef=0.0, objective="cispo"),
    ],
    ids=["token mean", "GRPO", "GSPO", "Dr. GRPO", "CISPO"],
)
def test_many_micro_batches_give_the_gradient_of_one(sampled, loss):
    model, rollout, advantage = sampled
    one, loss_one, grad_one = gradient(model, rollout, advantage, 10**6, loss)
    many, loss_many, grad_many = gradient(model, rollout, advantage, 40, loss)
    assert one == 1 and many >= 8
    assert_same_step(rollout, many, (loss_one, grad_one), (loss_many, grad_many))


def test_shared_prompts_give_the_gradient_of_whole_sequences(sampled):
    model, rollout, advantage = sampled
    alone = dataclasses.replace(rollout, group_size=1)
    loss = LossConfig(kl_coef=0.0, aggregation="sequence_mean")
    one, *shared = gradient(model, rollout, advantage, 10**6, loss)
    assert one == gradient(model, alone, advantage, 10**6, loss)[0] == 1
    assert_same_step(rollout, one, shared, gradient(model, alone, advantage, 10**6, loss)[1:])


def test_shared_prompts_leave_fewer_tokens_and_the_same_bits(sampled):
    model, rollout, advantage = sampled
    shared = pack(rollout, advantage, sequences=range(16))
    alone = pack(dataclasses.replace(rollout, group_size=1), advantage, sequences=range(16))
    prompts = rollout.prompt_len[::4].sum()
    assert alone.tokens.numel() - shared.tokens.numel() == 3 * prompts
    assert shared.num_inputs == alone.num_inputs == alone.tokens.numel()
    with torch.no_grad():
        assert torch.equal(logprobs(model, shared), rollout.logprob[rollout.logprob != 0])
        assert torch.equal(logprobs(model, shared), logprobs(model, alone))


def assert_same_step(rollout, many, one, other):
    (loss_one, grad_one), (loss_many, grad_many) = one, other
    # the parts are added in float64 inside a call and in Python floats outside; each is rounded to float32 once
    assert abs(loss_one - loss_many) <= (many + 1) * 2.0**-24 * max(1.0, abs(loss_one))
    tokens = rollout.tokens.numel()
    for name, want in grad_one.items():
        # a sum of T products in another order: each of its at most T + micro-batches roundings moves it by at most
        # 2^-24 of the sum of magnitudes, here bounded by T times the largest element
        bound = (tokens + many) * 2.0**-24 * max(want.abs().max().item(), 1e-3) * 4
        assert (grad_many[name] - want).abs().max().item() <= bound, name


def test_minibatches_take_whole_groups_in_order(sampled):
    _, rollout, advantage = sampled
    parts = list(minibatches(rollout, advantage, count=2, tokens_per_micro_batch=10**6))
    assert [p.num_sequences for p in parts] == [8, 8]
    assert sum(p.num_tokens for p in parts) == sum(map(len, rollout.responses()))
    firsts = [p.micro_batches[0].tokens[:3].tolist() for p in parts]
    assert firsts == [rollout.tokens[:3].tolist(), rollout.tokens[rollout.cu_seqlens[8] :][:3].tolist()]


def test_a_budget_is_kept_by_whole_groups_where_they_fit(sampled):
    _, rollout, advantage = sampled
    for budget in (60, 100, 1000):
        (minibatch,) = minibatches(rollout, advantage, count=1, tokens_per_micro_batch=budget)
        groups = sum(m.cu_groups.numel() - 1 for m in minibatch.micro_batches)
        assert all(m.tokens.numel() <= budget for m in minibatch.micro_batches)
        assert groups == 4 or budget < 100
        responses = torch.cat([m.target for m in minibatch.micro_batches]).tolist()
        assert responses == sum(rollout.responses(), [])


def test_a_longer_sequence_goes_alone(sampled):
    _, rollout, advantage = sampled
    (minibatch,) = minibatches(rollout, advantage, count=1, tokens_per_micro_batch=1)
    assert len(minibatch.micro_batches) == 16


def test_prompts_must_divide_into_minibatches(sampled):
    _, rollout, advantage = sampled
    with pytest.raises(ValueError, match="4 prompts do not divide into 3 minibatches"):
        list(minibatches(rollout, advantage, count=3, tokens_per_micro_batch=100))
