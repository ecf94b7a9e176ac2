"""step: what happens when sampling and training disagree about a log-prob, and the learning rate of each step."""

from types import SimpleNamespace

import pytest
import torch

from grpo_engine.config import OptimizerConfig
from grpo_engine.train.step import _on_policy_mismatch, learning_rate

SAMPLED = torch.tensor([-1.0, -2.0, -3.0])
MICRO = SimpleNamespace(old_logprob=SAMPLED, cu_responses=torch.tensor([0, 1, 3]))


def test_equal_bits_are_no_mismatch():
    assert _on_policy_mismatch(SAMPLED.clone(), MICRO, True) == _on_policy_mismatch(SAMPLED.clone(), MICRO, False) == 0.0


@pytest.mark.parametrize("wrong,by", [(-2.5, 0.5), (float("nan"), float("inf"))])
def test_a_mismatch_is_an_error_that_names_its_token_or_is_measured(wrong, by):
    trained = torch.tensor([-1.0, wrong, -3.0])
    with pytest.raises(RuntimeError, match=r"disagree: sequence 1 .*response token 0: sampled with log-prob -2\.0"):
        _on_policy_mismatch(trained, MICRO, True)
    assert _on_policy_mismatch(trained, MICRO, False) == by  # products by cuBLAS may differ


def test_the_learning_rate_rises_from_the_first_step_and_then_stays():
    def rates(**optimizer):
        config = OptimizerConfig(lr=0.4, **optimizer)
        return [learning_rate(config, step) for step in range(1, 7)]

    assert rates(warmup_steps=4) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert rates(warmup_steps=1) == rates(warmup_steps=0) == [0.4] * 6
