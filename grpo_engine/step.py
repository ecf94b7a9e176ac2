"""One GRPO step, top to bottom."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_engine import ops
from grpo_engine.batch import Minibatch, minibatches
from grpo_engine.config import RunConfig
from grpo_engine.ledger import Ledger, forward_flops
from grpo_engine.model import Model
from grpo_engine.optimizer import update
from grpo_engine.rewards.pool import RewardPool
from grpo_engine.rollout import Progress, derive_seeds, generate
from grpo_engine.tokenizer import Tokenizer
from grpo_engine.types import Problem, Reward, RolloutBatch, TrainBatch

ROLLOUT_STREAM = 1  # keeps the draws of training apart from those of evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """What one step sampled, was rewarded with and did to the weights."""

    rollout: RolloutBatch
    rewards: tuple[Reward, ...]  # N
    equal_groups: int  # groups whose answers all got one reward: advantage exactly 0
    trained_tokens: int  # inputs of the training pass, each sequence counted whole
    stats: ops.PolicyStats  # over the step's minibatches
    loss: float  # mean over minibatches
    grad_norm: float  # before clipping, mean over minibatches
    mismatch_max: float  # max |sampler's - trainer's log-prob| in the first minibatch


def grpo_step(
    policy: Model,
    reference: Model | None,
    optimizer: torch.optim.Optimizer,
    problems: Sequence[Problem],
    *,
    tokenizer: Tokenizer,
    pool: RewardPool,
    config: RunConfig,
    step: int,
    ledger: Ledger,
    progress: Progress | None = None,
) -> StepOutcome:
    """Samples G answers to each problem, scores them, and moves the policy towards the better ones.

    Args:
        policy: trained in place.
        reference: frozen; None exactly when config.loss.kl_coef is 0.
        optimizer: over policy's parameters.
        problems: P of them.
        tokenizer: text to tokens and back.
        pool: scores answers.
        config: of the run.
        step: number of this step, 1 is the first; part of the random seeds.
        ledger: books the cost by phase.
        progress: of the rollout.

    Returns:
        A `StepOutcome`.

    Raises:
        RuntimeError: the sampler's and the trainer's log-probs differ before any update (the sequence and
            position are named) although the policy is batch-invariant, or the weights have diverged.
    """
    P, G = len(problems), config.batch.group_size
    chat = config.model.kind == "instruct"
    prompts = [tokenizer.encode_prompt(p.prompt, chat) for p in problems]
    seeds = derive_seeds(config.seed, ROLLOUT_STREAM, step, count=P * G)
    with pool.begin([p for p in problems for _ in range(G)]) as scoring:

        def answered(sequences: list[int], answers: list[list[int]]) -> None:
            with ledger.timed("reward"):
                scoring.add(sequences, map(tokenizer.decode, answers))

        rollout = generate(policy, prompts, group_size=G, seeds=seeds, stop_ids=tokenizer.stop_ids,
                           config=config.rollout, ledger=ledger, progress=progress, answered=answered)  # fmt: skip
        with ledger.timed("reward"):
            rewards = scoring.finish()
    rewards_PG = torch.tensor([r.value for r in rewards]).view(P, G)
    advantage_PG = ops.group_advantages(rewards_PG, std=config.advantage.std, eps=config.advantage.eps)

    losses, norms, trained_tokens, mismatch, stats = [], [], 0, 0.0, None
    for index, minibatch in enumerate(_minibatches(rollout, advantage_PG, reference, config, ledger)):
        loss = 0.0
        for micro in minibatch.micro_batches:
            T = micro.tokens.numel()  # fewer than micro.num_inputs: prompts are shared
            flops = training_flops(policy, micro)
            with ledger.timed("forward", tokens=T, flops=flops):
                logprob = logprobs(policy, micro, config)
                result = policy_loss(logprob, micro, minibatch, config)
            if index == 0:
                mismatch = max(mismatch, _on_policy_mismatch(logprob.detach(), micro, policy.batch_invariant))
            with ledger.timed("backward", tokens=T, flops=2 * flops):
                result.loss.backward()
            loss += result.loss.item()
            part = ops.PolicyStats(*result.stats.tolist())
            stats = part if stats is None else stats.merge(part)
            trained_tokens += micro.num_inputs
        with ledger.timed("optimizer"):
            lr = learning_rate(config, step)
            norms.append(update(optimizer, lr=lr, clip_norm=config.optimizer.clip_norm))
        losses.append(loss)

    return StepOutcome(
        rollout=rollout,
        rewards=tuple(rewards),
        equal_groups=int((rewards_PG == rewards_PG[:, :1]).all(dim=1).sum()),
        trained_tokens=trained_tokens,
        stats=stats,
        loss=sum(losses) / len(losses),
        grad_norm=sum(norms) / len(norms),
        mismatch_max=mismatch,
    )


def logprobs(model: Model, micro: TrainBatch, config: RunConfig) -> Tensor:
    """[R] float32, the log-probs of a micro-batch's answer tokens at the temperature that sampled them."""
    return model.logprobs(
        micro.tokens,
        micro.cu_seqlens,
        cu_groups=micro.cu_groups,
        rows=micro.rows,
        target=micro.target,
        positions_T=micro.positions,
        temperature=config.rollout.temperature,
    )[0]


def policy_loss(logprob: Tensor, micro: TrainBatch, minibatch: Minibatch, config: RunConfig) -> ops.PolicyLoss:
    """The loss of a micro-batch, divided by what the whole minibatch counts."""
    c = config.loss
    return ops.policy_loss(
        logprob,
        advantage=micro.advantage,
        cu_seqlens=micro.cu_answers,
        old_logprob=micro.old_logprob,
        ref_logprob=micro.ref_logprob,
        ratio=c.ratio,
        objective=c.objective,
        clip_low=c.clip_low,
        clip_high=c.clip_high,
        dual_clip=c.dual_clip,
        kl=c.kl,
        kl_coef=c.kl_coef,
        aggregation=c.aggregation,
        num_tokens=minibatch.num_tokens,
        num_sequences=minibatch.num_sequences,
        constant_length=c.constant_length,
    )


def learning_rate(config: RunConfig, step: int) -> float:
    """The rate at a step (1 is the first): linear over the warm-up steps, then constant."""
    c = config.optimizer
    return c.lr * min(1.0, step / c.warmup_steps) if c.warmup_steps else c.lr


def training_flops(model: Model, micro: TrainBatch) -> float:
    """FLOPs of the forward pass of a micro-batch; backward takes twice that."""
    pairs = int((micro.positions + 1).sum())  # each token sees itself and all before it
    return forward_flops(model, tokens=micro.tokens.numel(), pairs=pairs, head_rows=micro.num_answer_tokens)


def _minibatches(rollout: RolloutBatch, advantage_PG: Tensor, reference: Model | None, config: RunConfig,
                 ledger: Ledger) -> list[Minibatch]:  # fmt: skip
    cut = minibatches(rollout, advantage_PG.flatten(), count=config.batch.minibatches,
                      tokens_per_micro_batch=config.batch.tokens_per_micro_batch)  # fmt: skip
    if reference is None:
        return list(cut)
    return [
        dataclasses.replace(
            m, micro_batches=tuple(_with_reference(micro, reference, config, ledger) for micro in m.micro_batches)
        )
        for m in cut
    ]


@torch.no_grad()
def _with_reference(micro: TrainBatch, reference: Model, config: RunConfig, ledger: Ledger) -> TrainBatch:
    with ledger.timed("reference", tokens=micro.tokens.numel(), flops=training_flops(reference, micro)):
        return dataclasses.replace(micro, ref_logprob=logprobs(reference, micro, config))


def _on_policy_mismatch(logprob: Tensor, micro: TrainBatch, batch_invariant: bool) -> float:
    """The weights have not moved since the rollout, so batch-invariant products must have given the same bits."""
    if torch.equal(logprob, micro.old_logprob):
        return 0.0
    difference = (logprob - micro.old_logprob).abs().nan_to_num(nan=float("inf"))
    if not batch_invariant:
        return float(difference.max())
    row = int(difference.argmax())
    sequence = int(torch.searchsorted(micro.cu_answers, row, right=True)) - 1
    raise RuntimeError(
        f"rollout and trainer disagree: sequence {sequence} of a micro-batch, answer token "
        f"{row - int(micro.cu_answers[sequence])}: sampled with log-prob {float(micro.old_logprob[row])!r}, recomputed "
        f"as {float(logprob[row])!r}"
    )
