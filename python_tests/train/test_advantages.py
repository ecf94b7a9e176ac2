"""Estimators of advantages: each against its formula in float64, and what an estimator of one's own may return."""

import types

import pytest
import torch

from grpo_engine.config import AdvantageConfig, RewardConfig, RunConfig
from grpo_engine.train import advantages
from grpo_engine.train.advantages import ESTIMATORS, estimate_advantages, estimator, overlong_penalty

EPS = AdvantageConfig().eps


def rollout(group_size):
    return types.SimpleNamespace(group_size=group_size)


def rewards_of(P, G, seed):
    values = torch.rand(P, G, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[0] = values[0, 0]  # a group without variance
    return values


def by_hand(name, r):
    """[P, G] float64, with loops instead of broadcasting."""
    out = torch.empty_like(r)
    P, G = r.shape
    for p in range(P):
        for g in range(G):
            others = [float(r[p, j]) for j in range(G) if j != g]
            mean = sum(map(float, r[p])) / G
            std = (sum((float(x) - mean) ** 2 for x in r[p]) / (G - 1)) ** 0.5
            batch_mean = sum(map(float, r.flatten())) / (P * G)
            batch_std = (sum((float(x) - batch_mean) ** 2 for x in r.flatten()) / (P * G - 1)) ** 0.5
            out[p, g] = {
                "grpo": (float(r[p, g]) - mean) / (std + EPS),
                "dr_grpo": float(r[p, g]) - mean,
                "rloo": float(r[p, g]) - sum(others) / (G - 1),
                "reinforce_pp": (float(r[p, g]) - batch_mean) / (batch_std + EPS),
            }[name]
    return out


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("P,G", [(1, 2), (3, 2), (5, 7), (16, 8)])
def test_an_estimator_is_its_formula(name, P, G):
    r = rewards_of(P, G, seed=P).float().double()  # what float32 holds
    if P == 1:
        r[0, 0] += 0.25  # one group, and some variance
    got = estimate_advantages(r.float(), rollout(G), AdvantageConfig(estimator=name))
    want = by_hand(name, r).flatten()
    assert got.shape == (P * G,) and got.dtype == torch.float32
    # sums of at most P G rewards in [0, 1.25], each rounded to 2^-24, over the standard deviation
    scale = {"grpo": r.std(dim=1).clamp(min=EPS).min(), "reinforce_pp": r.std()}.get(name, torch.tensor(1.0))
    bound = 4 * P * G * 2.0**-24 * 1.25 / float(scale)
    zero = (r == r[:, :1]).all(dim=1).repeat_interleave(G) & (name != "reinforce_pp")
    assert ((got.double() - want).abs()[~zero] <= bound).all()
    assert (got[zero] == 0).all()


def test_the_std_belongs_to_grpo():
    with pytest.raises(ValueError, match="std belongs to estimator=grpo, got std=none and estimator=rloo"):
        AdvantageConfig(estimator="rloo", std="none")
    with pytest.raises(ValueError, match="estimator"):
        AdvantageConfig(estimator="no_such_estimator")


def half(rewards_PG, rollout, config):
    return rewards_PG / 2


def flat(rewards_PG, rollout, config):
    return rewards_PG.flatten()


def no_number(rewards_PG, rollout, config):
    return rewards_PG / 0


def test_an_estimator_of_ones_own():
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.5]])

    def estimate(name):
        return estimate_advantages(rewards, rollout(2), AdvantageConfig(estimator=f"{__name__}:{name}"))

    assert estimate("half").tolist() == [0.5, 0.0, 0.25, 0.25]
    with pytest.raises(ValueError, match=r"flat: must return a tensor \[P, G\] = \[2, 2\], got \[4\]"):
        estimate("flat")
    with pytest.raises(ValueError, match=r"no_number: returned \[inf, nan\] for prompt 0 with rewards \[1.0, 0.0\]"):
        estimate("no_number")
    with pytest.raises(ValueError, match="advantage.estimator=.*has no absent"):
        estimator(AdvantageConfig(estimator=f"{__name__}:absent"))


def test_the_configuration_names_every_estimator():
    assert all(estimator(AdvantageConfig(estimator=name)) is function for name, function in ESTIMATORS.items())
    assert advantages.ESTIMATORS["rloo"] is advantages.rloo


def responses_of(lengths, group_size):
    """A rollout of responses of those lengths behind prompts of 3 tokens."""
    cu = torch.tensor([0, *lengths]).cumsum(0) + 3 * torch.arange(len(lengths) + 1)
    return types.SimpleNamespace(response_len=cu.diff() - 3, group_size=group_size)


def test_the_penalty_of_a_long_response_is_dapos():
    """Equation 13: 0 up to the limit less the buffer, -1 past the limit, linear between."""
    limit, buffer = 20, 8
    lengths = [1, 11, 12, 13, 16, 19, 20, 5]
    config = RewardConfig(overlong_buffer=buffer, overlong_penalty=0.5)
    got = overlong_penalty(responses_of(lengths, 2), config, max_new_tokens=limit)
    want = []
    for n in lengths:
        if n <= limit - buffer:
            want.append(0.0)
        else:
            want.append(-0.5 * ((limit - buffer) - n) / buffer)
    assert got.shape == (4, 2) and got.dtype == torch.float32
    torch.testing.assert_close(got.double().flatten(), torch.tensor(want, dtype=torch.float64), rtol=2.0**-22, atol=0)
    assert float(got.max()) == 0.5
    none = overlong_penalty(responses_of(lengths, 2), RewardConfig(), max_new_tokens=limit)
    assert torch.equal(none, torch.zeros(4, 2))


def test_a_buffer_longer_than_the_limit_is_refused():
    with pytest.raises(ValueError, match="reward.overlong_buffer=17 must be at most rollout.max_new_tokens=16"):
        RunConfig(reward={"overlong_buffer": 17})


def test_groups_are_not_replaced_where_equal_rewards_have_a_gradient():
    RunConfig(batch={"sampling_rounds": 2}, advantage={"estimator": "rloo"})
    with pytest.raises(
        ValueError, match="batch.sampling_rounds=2 replaces groups of equal reward, which have a gradient with"
    ):
        RunConfig(batch={"sampling_rounds": 2}, advantage={"estimator": "reinforce_pp"})
