"""The loss of a micro-batch: each option of the op is a setting of a run, and an objective in torch equals the op."""

import inspect

import models
import pytest
import torch

from grpo_engine import ops
from grpo_engine.config import LossConfig, RolloutConfig
from grpo_engine.rollout.engine import derive_seeds, generate
from grpo_engine.train.batch import minibatches
from grpo_engine.train.loss import policy_loss, token_weights

FROM_THE_BATCH = {
    "logprob", "advantage", "cu_seqlens", "old_logprob", "ref_logprob", "mask", "num_tokens", "num_sequences",
}  # fmt: skip


def test_every_option_of_the_op_can_be_set_from_a_run():
    options = set(inspect.signature(ops.policy_loss).parameters) - FROM_THE_BATCH
    assert options == set(LossConfig.model_fields) - {"mask_truncated"}  # which decides what the op is given


def clip(logprob, *, old_logprob, advantage, config, **_):
    """PPO's objective with the dual clip, in torch."""
    ratio = torch.exp(logprob - old_logprob)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if config.dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * config.dual_clip), loss)


def scalar(logprob, **_):
    return logprob.sum()


@pytest.fixture(scope="module")
def sampled():
    model = models.random_model(scale=4.0)
    prompts = [[1, 2, 3], [4, 5], [6] * 9]
    rollout = generate(model, prompts, group_size=4, seeds=derive_seeds(1, count=12), stop_ids=[7],
                       config=RolloutConfig(max_new_tokens=12))  # fmt: skip
    advantage = torch.randn(12, generator=torch.Generator().manual_seed(3))
    return next(iter(minibatches(rollout, advantage, count=1, tokens_per_micro_batch=40)))


def moved(micro, seed):
    """Log-probs of a policy that has moved away from the one that sampled."""
    noise = torch.randn(micro.old_logprob.shape, generator=torch.Generator().manual_seed(seed))
    return (micro.old_logprob + 0.9 * noise).requires_grad_()


def whole(minibatch, config):
    """(loss, gradients, statistics) of a minibatch, micro-batch by micro-batch."""
    losses, gradients, stats = [], [], []
    for i, micro in enumerate(minibatch.micro_batches):
        logprob = moved(micro, i)
        object.__setattr__(micro, "ref_logprob", micro.old_logprob + 0.1 * torch.cos(micro.target.float()))
        loss, found = policy_loss(logprob, micro, minibatch, config)
        gradients += torch.autograd.grad(loss, logprob)
        losses.append(loss.item())
        stats.append(found)
    return losses, gradients, stats


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_coef": 0.0},
        {"kl_coef": 0.3, "kl": "k3"},
        {"kl_coef": 0.3, "kl": "k1", "kl_ratio": True},
        {"kl_coef": 0.1, "aggregation": "sequence_mean", "dual_clip": None},
        {"kl_coef": 0.1, "aggregation": "constant", "constant_length": 12, "clip_high": 0.28},
    ],
)
def test_an_objective_in_torch_gives_the_loss_and_gradient_of_the_op(sampled, settings):
    losses, gradients, stats = whole(sampled, LossConfig(**settings))
    own = whole(sampled, LossConfig(**settings, objective=f"{__name__}:clip"))
    assert len(losses) > 1
    # up to 150 tokens of |value| < 30: each sum rounds at most that often by 2^-24
    assert own[0] == pytest.approx(losses, rel=1e-5, abs=1e-5)
    for mine, ops_ in zip(own[1], gradients, strict=True):
        assert (mine - ops_).abs().max() <= 1e-5 * ops_.abs().max()
    for mine, ops_ in zip(own[2], stats, strict=True):
        mine, ops_ = (ops.PolicyStats(*s.tolist()) for s in (mine, ops_))
        assert mine.policy_loss == pytest.approx(ops_.policy_loss, rel=1e-5, abs=1e-5)
        assert mine._replace(policy_loss=0.0) == ops_._replace(policy_loss=0.0)
    counted = [ops.PolicyStats(*s.tolist()) for s in stats]
    assert sum(s.clip_low for s in counted) > 0 and sum(s.clip_high for s in counted) > 0  # all branches were taken
    assert settings.get("dual_clip", 3.0) is None or sum(s.dual_clip for s in counted) > 0


def test_weights_of_a_minibatch_add_up_to_one(sampled):
    for aggregation in ("token_mean", "sequence_mean"):
        total = sum(token_weights(m, sampled, LossConfig(aggregation=aggregation)).double().sum()
                    for m in sampled.micro_batches)  # fmt: skip
        assert float(total) == pytest.approx(1.0, abs=1e-6)


def test_an_objective_that_returns_another_shape_is_named(sampled):
    micro = sampled.micro_batches[0]
    config = LossConfig(objective=f"{__name__}:scalar")
    with pytest.raises(ValueError, match=r"test_loss:scalar: must return a tensor \[R\] = .* one value a response token"):
        policy_loss(moved(micro, 0), micro, sampled, config)
    with pytest.raises(ValueError, match="objective"):
        LossConfig(objective="no_such_objective")


def masked_by_hand(rollout, advantage, logprob, config):
    """The clipped loss over the responses that ended by themselves, in float64: one sum, response by response."""
    kept = [n for n, finish in enumerate(rollout.finish) if finish == "stop"]
    tokens = sum(len(logprob[n]) for n in kept)
    total = torch.zeros((), dtype=torch.float64)
    for n in kept:
        start, end = int(rollout.cu_seqlens[n] + rollout.prompt_len[n]), int(rollout.cu_seqlens[n + 1])
        ratio = torch.exp(logprob[n] - rollout.logprob[start:end].double())
        a = advantage[n].double()
        each = torch.minimum(ratio * a, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * a)
        weight = {"token_mean": 1 / tokens, "sequence_mean": 1 / (len(kept) * (end - start)),
                  "constant": 1 / (len(kept) * (config.constant_length or 1))}[config.aggregation]  # fmt: skip
        total = total - each.sum() * weight
    return total


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("budget", [40, 10**6])
def test_masked_responses_are_in_no_sum_and_in_no_denominator(aggregation, budget):
    model = models.random_model(scale=4.0)
    prompts = [[1, 2, 3], [4, 5], [6] * 9]
    rollout = generate(model, prompts, group_size=4, seeds=derive_seeds(1, count=12), stop_ids=[7, 11, 13, 17, 19],
                       config=RolloutConfig(max_new_tokens=12))  # fmt: skip
    cut_off = rollout.finish.count("length")
    assert 2 <= cut_off <= 10  # some, and not all
    advantage = torch.randn(12, generator=torch.Generator().manual_seed(3))
    config = LossConfig(aggregation=aggregation, constant_length=20 if aggregation == "constant" else None, kl_coef=0.0,
                        dual_clip=None, mask_truncated=True)  # fmt: skip
    (minibatch,) = minibatches(rollout, advantage, count=1, tokens_per_micro_batch=budget, mask_truncated=True)
    assert minibatch.num_sequences == 12 - cut_off
    kept = [n for n, finish in enumerate(rollout.finish) if finish == "stop"]
    assert minibatch.num_tokens == int(rollout.response_len[kept].sum())
    moved_to = iter([moved(micro, i) for i, micro in enumerate(minibatch.micro_batches)])
    loss, gradient, by_response = 0.0, [], []
    for micro in minibatch.micro_batches:
        logprob = next(moved_to)
        result = policy_loss(logprob, micro, minibatch, config)
        result.loss.backward()
        loss += result.loss.item()
        gradient.append(logprob.grad.double())
        by_response += logprob.detach().double().split((micro.cu_responses[1:] - micro.cu_responses[:-1]).tolist())
    exact = {n: part.requires_grad_() for n, part in zip(kept, by_response, strict=True)}
    want = masked_by_hand(rollout, advantage, exact, config)
    want.backward()
    # a token's value is a few float32 operations on numbers below 20; a sum has at most 144 of them
    assert loss == pytest.approx(want.item(), rel=1e-5, abs=144 * 20 * 2.0**-24)
    torch.testing.assert_close(torch.cat(gradient), torch.cat([exact[n].grad for n in kept]), rtol=1e-5, atol=1e-7)


def test_without_the_option_nothing_is_masked():
    model = models.random_model(scale=4.0)
    rollout = generate(model, [[1, 2]], group_size=4, seeds=derive_seeds(1, count=4), stop_ids=[], config=RolloutConfig())
    every = {"count": 1, "tokens_per_micro_batch": 100}
    (minibatch,) = minibatches(rollout, torch.zeros(4), **every)
    assert rollout.finish == ("length",) * 4 and minibatch.num_sequences == 4
    (minibatch,) = minibatches(rollout, torch.zeros(4), **every, mask_truncated=True)
    assert (minibatch.micro_batches, minibatch.num_sequences, minibatch.num_tokens) == ((), 0, 0)
