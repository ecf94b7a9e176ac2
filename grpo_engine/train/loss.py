"""The policy loss of a micro-batch: the fused op, or an objective of your own around the op's denominators.

An objective of your own is a function that `loss.objective` names as "module:function". It returns one value a token, which
is minimised. It is written in torch, so autograd gives its gradient:

    def reinforce(logprob, *, advantage, **_):
        return -advantage * logprob

The aggregation, its denominators, the KL penalty and the statistics of a step stay those of `ops.policy_loss`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_engine import ops
from grpo_engine.config import LossConfig
from grpo_engine.model.decoder import Model
from grpo_engine.system import plugins
from grpo_engine.train.batch import Minibatch
from grpo_engine.types import TrainBatch

# (logprob [R], *, old_logprob [R], ref_logprob [R] or None, advantage [R], cu_seqlens [N+1] int32, config) -> [R]
Objective = Callable[..., Tensor]


def logprobs(model: Model, micro: TrainBatch, *, activation_checkpointing: bool = False) -> Tensor:
    """[R] float32, the log-probs of a micro-batch's response tokens at the temperature that sampled them."""
    return model.logprobs(
        micro.tokens,
        micro.cu_seqlens,
        cu_groups=micro.cu_groups,
        rows=micro.rows,
        target=micro.target,
        positions_T=micro.positions,
        temperature=micro.temperature,
        activation_checkpointing=activation_checkpointing,
    )[0]


def objective(config: LossConfig) -> Objective | None:
    """The function that a configuration names; None: it is one of the op's.

    Raises:
        ValueError: a "module:function" that cannot be loaded (see `plugins.load`).
    """
    return plugins.load(config.objective, "loss.objective") if plugins.is_target(config.objective) else None


def policy_loss(logprob: Tensor, micro: TrainBatch, minibatch: Minibatch, config: LossConfig) -> ops.PolicyLoss:
    """The loss of a micro-batch, divided by what the whole minibatch counts.

    Args:
        logprob: [R] float32, under the policy that is trained.
        micro: the micro-batch.
        minibatch: it is part of; gives the denominators.
        config: the objective with its settings.

    Returns:
        The loss, differentiable in logprob, and the statistics. With an objective of your own they are those of "clip"
        with the same settings, but for policy_loss, which is the objective's.

    Raises:
        ValueError: an objective of your own returned another shape.
    """
    own = objective(config)
    if own is None:
        return _op(logprob, micro, minibatch, config)
    values = own(
        logprob, old_logprob=micro.old_logprob, ref_logprob=micro.ref_logprob, advantage=micro.advantage,
        cu_seqlens=micro.cu_responses, config=config,
    )  # fmt: skip
    if not isinstance(values, Tensor) or values.shape != logprob.shape:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"loss.objective={config.objective}: must return a tensor [R] = {list(logprob.shape)}, one value a response "
            f"token, got {got}"
        )
    settings = config.model_copy(update={"objective": "clip"})
    loss = surrogate = (values * token_weights(micro, minibatch, config)).sum()
    if config.kl_coef > 0:  # with advantages of 0 the op's loss is the penalty alone
        loss = loss + _op(logprob, micro, minibatch, settings, advantage=torch.zeros_like(micro.advantage)).loss
    with torch.no_grad():
        statistics = _op(logprob.detach(), micro, minibatch, settings).stats
        statistics[ops.PolicyStats._fields.index("policy_loss")] = surrogate
    return ops.PolicyLoss(loss, statistics)


def token_weights(micro: TrainBatch, minibatch: Minibatch, config: LossConfig) -> Tensor:
    """[R] float32, what `ops.policy_loss` multiplies each token's value by; summed over a minibatch they are 1.

    With aggregation "constant" the sum is the mean response length over constant_length.
    """
    lengths = (micro.cu_responses[1:] - micro.cu_responses[:-1]).long()
    if config.aggregation == "token_mean":
        each = torch.full_like(lengths, minibatch.num_tokens)
    elif config.aggregation == "sequence_mean":
        each = minibatch.num_sequences * lengths
    else:
        assert config.constant_length is not None  # LossConfig demands it
        each = torch.full_like(lengths, minibatch.num_sequences * config.constant_length)
    return (1.0 / each.double()).float().repeat_interleave(lengths)


def _op(
    logprob: Tensor, micro: TrainBatch, minibatch: Minibatch, c: LossConfig, *, advantage: Tensor | None = None
) -> ops.PolicyLoss:
    return ops.policy_loss(
        logprob,
        advantage=micro.advantage if advantage is None else advantage,
        cu_seqlens=micro.cu_responses,
        old_logprob=micro.old_logprob,
        ref_logprob=micro.ref_logprob,
        ratio=c.ratio,
        objective=c.objective,  # type: ignore[arg-type]  # a function of your own does not come here
        clip_low=c.clip_low,
        clip_high=c.clip_high,
        dual_clip=c.dual_clip,
        kl=c.kl,
        kl_coef=c.kl_coef,
        kl_ratio=c.kl_ratio,
        aggregation=c.aggregation,
        num_tokens=minibatch.num_tokens,
        num_sequences=minibatch.num_sequences,
        constant_length=c.constant_length,
    )
