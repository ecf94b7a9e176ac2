"""One GRPO step, top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_engine import ops
from grpo_engine.batch import Minibatch, minibatches
from grpo_engine.config import RunConfig
from grpo_engine.device import move
from grpo_engine.ledger import Ledger, forward_flops
from grpo_engine.model import Model
from grpo_engine.optimizer import update
from grpo_engine.rewards.pool import RewardPool
from grpo_engine.rollout import Engine, Progress, derive_seeds
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
    engine: Engine,
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
        engine: samples; its model is the policy, which is trained in place.
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
    policy, P, G = engine.model, len(problems), config.batch.group_size
    chat = config.model.kind == "instruct"
    prompts = [tokenizer.encode_prompt(p.prompt, chat) for p in problems]
    seeds = derive_seeds(config.seed, ROLLOUT_STREAM, step, count=P * G)
    with pool.begin([p for p in problems for _ in range(G)]) as scoring:

        def answered(sequences: list[int], answers: list[list[int]]) -> None:
            with ledger.timed("reward"):
                scoring.add(sequences, map(tokenizer.decode, answers))

        rollout = engine.generate(prompts, group_size=G, seeds=seeds, stop_ids=tokenizer.stop_ids,
                                  config=config.rollout, ledger=ledger, progress=progress, answered=answered)  # fmt: skip
        with ledger.timed("reward"):
            rewards = scoring.finish()
    rewards_PG = torch.tensor([r.value for r in rewards], device=rollout.tokens.device).view(P, G)
    advantage_PG = ops.group_advantages(rewards_PG, std=config.advantage.std, eps=config.advantage.eps)

    losses, norms, stats, trained_tokens, mismatch = [], [], [], 0, 0.0
    for index, minibatch in enumerate(
        minibatches(rollout, advantage_PG.flatten(), count=config.batch.minibatches,
                    tokens_per_micro_batch=config.batch.tokens_per_micro_batch)
    ):  # fmt: skip
        results, scored = [], []
        for micro in minibatch.micro_batches:
            T = micro.tokens.numel()  # fewer than micro.num_inputs: prompts are shared
            flops = training_flops(policy, micro)
            trained_tokens += micro.num_inputs
            micro = move(micro, policy.device)
            if reference is not None:
                with ledger.timed("reference", tokens=T, flops=flops):
                    micro = _with_reference(micro, reference, config)
            with ledger.timed("forward", tokens=T, flops=flops):
                logprob = logprobs(policy, micro, config)
                result = policy_loss(logprob, micro, minibatch, config)
            with ledger.timed("backward", tokens=T, flops=2 * flops):
                result.loss.backward()
            results.append((result.loss.detach(), result.stats))
            scored.append((logprob.detach(), micro))
        # only from here on does the host wait for the device
        if index == 0 and not _same_bits(scored):
            mismatch = max(_on_policy_mismatch(logprob, micro, policy.batch_invariant) for logprob, micro in scored)
        with ledger.timed("optimizer"):
            lr = learning_rate(config, step)
            norms.append(update(optimizer, lr=lr, clip_norm=config.optimizer.clip_norm))
        loss_of_parts, stats_of_parts = (torch.stack(parts).tolist() for parts in zip(*results, strict=True))
        losses.append(functools.reduce(operator.add, loss_of_parts))
        stats += [ops.PolicyStats(*part) for part in stats_of_parts]

    return StepOutcome(
        rollout=rollout,
        rewards=tuple(rewards),
        equal_groups=int((rewards_PG == rewards_PG[:, :1]).all(dim=1).sum()),
        trained_tokens=trained_tokens,
        stats=functools.reduce(ops.PolicyStats.merge, stats),
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
        activation_checkpointing=config.batch.activation_checkpointing,
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
    """FLOPs of the forward pass of a micro-batch on the CPU; backward takes twice that.

    What backward computes again, with activation checkpointing, is not counted.
    """
    pairs = int((micro.positions + 1).sum())  # each token sees itself and all before it
    return forward_flops(model, tokens=micro.tokens.numel(), pairs=pairs, head_rows=micro.num_answer_tokens)


@torch.no_grad()
def _with_reference(micro: TrainBatch, reference: Model, config: RunConfig) -> TrainBatch:
    return dataclasses.replace(micro, ref_logprob=logprobs(reference, micro, config))


def _same_bits(scored: Sequence[tuple[Tensor, TrainBatch]]) -> bool:
    trained, sampled = zip(*((logprob, micro.old_logprob) for logprob, micro in scored), strict=True)
    return torch.equal(torch.cat(trained), torch.cat(sampled))  # one comparison, hence one wait, for all micro-batches


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
