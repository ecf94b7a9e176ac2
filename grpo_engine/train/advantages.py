"""Advantages: how much better each response is than expected, from the rewards of a step.

An estimator is a function (rewards, rollout, config) -> advantages; `advantage.estimator` chooses one of `ESTIMATORS`, or
names your own as "module:function". All tokens of a response get its advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grpo_engine import ops
from grpo_engine.config import AdvantageConfig, RewardConfig
from grpo_engine.system import plugins
from grpo_engine.types import Reward, RolloutBatch

Estimator = Callable[[Tensor, RolloutBatch, AdvantageConfig], Tensor]  # rewards [P, G], ... -> advantages [P, G]


def grpo(rewards_PG: Tensor, rollout: RolloutBatch, config: AdvantageConfig) -> Tensor:
    """(reward - mean of the group) / (std of the group + eps). Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2."""
    return ops.group_advantages(rewards_PG, std=config.std, eps=config.eps)


def dr_grpo(rewards_PG: Tensor, rollout: RolloutBatch, config: AdvantageConfig) -> Tensor:
    """reward - mean of the group. Liu et al. 2025, arXiv:2503.20783."""
    return ops.group_advantages(rewards_PG, std="none")


def rloo(rewards_PG: Tensor, rollout: RolloutBatch, config: AdvantageConfig) -> Tensor:
    """reward - mean of the group's other rewards. Ahmadian et al. 2024, arXiv:2402.14740."""
    G = rewards_PG.shape[1]
    above = (rewards_PG - rewards_PG.mean(dim=1, keepdim=True)) * (G / (G - 1))
    return above * varies(rewards_PG)[:, None]  # the mean of equal rewards is rounded


def reinforce_pp(rewards_PG: Tensor, rollout: RolloutBatch, config: AdvantageConfig) -> Tensor:
    """(reward - mean of the batch) / (std of the batch + eps). Hu et al. 2025, arXiv:2501.03262 (REINFORCE++)."""
    return (rewards_PG - rewards_PG.mean()) / (rewards_PG.std() + config.eps)


ESTIMATORS: dict[str, Estimator] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "reinforce_pp": reinforce_pp}


def estimator(config: AdvantageConfig) -> Estimator:
    """The function that a configuration names.

    Raises:
        ValueError: a "module:function" that cannot be loaded (see `plugins.load`).
    """
    return ESTIMATORS.get(config.estimator) or plugins.load(config.estimator, "advantage.estimator")


def reward_matrix(rewards: Sequence[Reward], group_size: int) -> Tensor:
    """[P, G] float32, the rewards of a step by prompt."""
    return torch.tensor([r.value for r in rewards], device="cpu").view(-1, group_size)


def varies(rewards_PG: Tensor) -> Tensor:
    """[P] bool, whether a group has two different rewards: without, estimators by group give exactly 0."""
    return (rewards_PG != rewards_PG[:, :1]).any(dim=1)


def overlong_penalty(rollout: RolloutBatch, config: RewardConfig, *, max_new_tokens: int) -> Tensor:
    """What long responses lose: nothing up to the buffer before the limit, then linearly more.

    Yu et al. 2025 (DAPO), arXiv:2503.14476, equation 13.

    Args:
        rollout: P*G responses.
        config: overlong_buffer in tokens (None: no penalty) and overlong_penalty, the most that one loses.
        max_new_tokens: the limit, at least overlong_buffer.

    Returns:
        [P, G] float32 on the CPU, in [0, overlong_penalty].
    """
    length = rollout.response_len.cpu().view(-1, rollout.group_size).float()
    if config.overlong_buffer is None:
        return torch.zeros_like(length)
    past = length - (max_new_tokens - config.overlong_buffer)
    return config.overlong_penalty * (past / config.overlong_buffer).clamp(0, 1)


def estimate_advantages(rewards_PG: Tensor, rollout: RolloutBatch, config: AdvantageConfig) -> Tensor:
    """One advantage for each response.

    Args:
        rewards_PG: [P, G] float32 on the CPU.
        rollout: the responses.
        config: which estimator, with its settings.

    Returns:
        [N] float32 on the CPU, finite.

    Raises:
        ValueError: an estimator of your own returned another shape, or a number that is not finite; it is named.
    """
    advantage_PG = estimator(config)(rewards_PG, rollout, config)
    if not isinstance(advantage_PG, Tensor) or advantage_PG.shape != rewards_PG.shape:
        got = list(advantage_PG.shape) if isinstance(advantage_PG, Tensor) else type(advantage_PG).__name__
        raise ValueError(
            f"advantage.estimator={config.estimator}: must return a tensor [P, G] = {list(rewards_PG.shape)}, got {got}"
        )
    if not advantage_PG.isfinite().all():
        prompt = int((~advantage_PG.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(
            f"advantage.estimator={config.estimator}: returned {advantage_PG[prompt].tolist()} for prompt {prompt} with "
            f"rewards {rewards_PG[prompt].tolist()}"
        )
    return advantage_PG.float().flatten()
