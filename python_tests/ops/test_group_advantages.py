"""group_advantages: reference, exact cases, contract, registration."""

import pytest
import reference
import torch

from grpo_engine.ops import group_advantages

pytestmark = pytest.mark.usefixtures("device")

MODES = ["unbiased", "population", "none"]


@pytest.mark.parametrize("std", MODES)
@pytest.mark.parametrize("P,G", [(0, 2), (1, 2), (3, 7), (64, 16), (1000, 8)])
def test_matches_float64_reference(std, P, G):
    rewards = torch.randn(P, G, generator=torch.Generator().manual_seed(P * 1000 + G))
    out = group_advantages(rewards, std=std)
    assert out.dtype == torch.float32
    # the op works in double, so the only rounding is the last cast: one float32 ulp
    torch.testing.assert_close(out.double(), reference.group_advantages(rewards, std, 1e-6), rtol=2**-23, atol=1e-12)


@pytest.mark.parametrize("std", MODES)
@pytest.mark.parametrize("G", [2, 3, 7, 10])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, -3.5, 1e30])
def test_equal_rewards_give_exactly_zero(std, G, value):
    for dtype in (torch.float32, torch.float64):
        out = group_advantages(torch.full((2, G), value, dtype=dtype), std=std, eps=0.0)
        assert torch.equal(out, torch.zeros(2, G, dtype=dtype))


def test_the_two_divisors_differ_as_they_should():
    r = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    population = group_advantages(r, std="population", eps=0.0)
    torch.testing.assert_close(population, torch.tensor([[-1.0, -1.0, 1.0, 1.0]]))
    unbiased = group_advantages(r, std="unbiased", eps=0.0)
    torch.testing.assert_close(unbiased, population * (3 / 4) ** 0.5)


def test_a_bad_reward_stays_in_its_group():
    r = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0], [1.0, 0.0]])
    out = group_advantages(r)
    assert torch.isfinite(out).all(dim=1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "make,kwargs,error,says",
    [
        (lambda d: torch.zeros(4, device=d), {}, ValueError, r"rewards must be \[P, G\].*got \[4\]"),
        (lambda d: torch.zeros(4, 1, device=d), {}, ValueError, r"G >= 2 responses.*got \[4, 1\]"),
        (lambda d: torch.zeros(4, 3, dtype=torch.int64, device=d), {}, TypeError, "got Long"),
        (lambda d: torch.zeros(3, 4, device=d).t(), {}, ValueError, r"contiguous.*strides \[1, 4\]"),
        (lambda d: torch.zeros(3, 4, device=d), {"eps": -1.0}, ValueError, "eps must be .* got -1"),
        (lambda d: torch.zeros(3, 4, device=d), {"std": "both"}, ValueError, "std must be .* both"),
    ],
)
def test_a_bad_input_is_told_what_was_wanted_and_what_came(device, make, kwargs, error, says):
    with pytest.raises(error, match="group_advantages: .*" + says):
        group_advantages(make(device), **kwargs)


def test_registration():
    op = torch.ops.grpo_engine.group_advantages.default
    torch.library.opcheck(op, (torch.randn(3, 4), "unbiased", 1e-6))
