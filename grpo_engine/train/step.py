"""One GRPO step, top to bottom: sample, score, estimate advantages, update the policy.

How this differs from the GRPO of a textbook:

- Responses are scored while others are still being sampled.
- The responses of a group share their prompt: its keys and values are kept once in sampling, and its tokens are computed
  once in training.
- A minibatch is one optimizer step. A micro-batch is what goes through the model at once. The loss divides by the
  minibatch's response tokens or sequences (`loss.aggregation`), masked ones left out. So the cut into micro-batches
  changes memory and rounding only.
- Each response is trained on once: there is no second epoch over a rollout.
- Options of DAPO: groups of equal reward are replaced, in at most `batch.sampling_rounds` rounds, the first one included.
  Responses that the length limit cut off are masked (`loss.mask_truncated`). Long ones lose reward
  (`reward.overlong_buffer`).
- In the first minibatch the weights are still those that sampled. The trainer must then compute the sampler's log-probs
  bit for bit. A step in which it does not is an error, unless `model.batch_invariant` is false: then it is recorded.

P prompts (all that were sampled; from stage 2 on `batch.prompts`), G responses each, N = P*G sequences, R response tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from grpo_engine import ops
from grpo_engine.config import OptimizerConfig, RunConfig
from grpo_engine.model.decoder import Model
from grpo_engine.model.flops import forward_flops
from grpo_engine.model.tokenizer import Tokenizer
from grpo_engine.records.ledger import Ledger
from grpo_engine.rewards.pool import RewardPool
from grpo_engine.rollout.engine import Engine, Progress, SamplingRequest, derive_seeds
from grpo_engine.system.device import move
from grpo_engine.train.advantages import estimate_advantages, overlong_penalty, reward_matrix, varies
from grpo_engine.train.batch import Minibatch, minibatches
from grpo_engine.train.loss import logprobs, policy_loss
from grpo_engine.train.optimizer import update
from grpo_engine.types import Problem, Reward, RolloutBatch, TrainBatch

ROLLOUT_STREAM = 1  # of random numbers; those of evaluations are `evaluate.EVALUATION_STREAM`


def grpo_step(
    engine: Engine,
    reference: Model | None,
    optimizer: torch.optim.Optimizer,
    problems: Iterator[Problem],
    *,
    tokenizer: Tokenizer,
    encode: Callable[[Problem], Sequence[int]],
    pool: RewardPool,
    config: RunConfig,
    step: int,
    ledger: Ledger,
    progress: Progress | None = None,
) -> StepOutcome:
    """Samples G responses to each of P problems, scores them, and moves the policy towards the better ones.

    Args:
        engine: samples; its model is the policy, which is trained in place.
        reference: frozen; None exactly when config.loss.kl_coef is 0.
        optimizer: over the policy's parameters.
        problems: the run's training problems from here on, without end. The caller advances by as many as the outcome
            has groups.
        tokenizer: decodes responses, and has the tokens that end them.
        encode: a problem's prompt in tokens.
        pool: scores responses.
        config: of the run.
        step: number of this step, 1 is the first; part of the random seeds.
        ledger: books tokens, FLOPs and seconds by phase.
        progress: of the rollout.

    Returns:
        A `StepOutcome`.

    Raises:
        RuntimeError: the sampler's and the trainer's log-probs differ before any update (the sequence and
            position are named) although the policy is batch-invariant, or the weights have diverged.
        ValueError: an estimator or objective of the user's returned another shape than asked for.
    """
    policy, batch = engine.model, config.batch

    def sample(count: int, *round_: int) -> Scored:
        return sample_and_score(
            engine, list(islice(problems, count)), tokenizer=tokenizer, encode=encode, pool=pool, config=config,
            seed=(step, *round_), ledger=ledger, progress=progress,
        )  # fmt: skip

    # 1. Sample G responses to each prompt and score them. Further rounds replace groups that teach nothing.
    scored = sample(batch.prompts)
    for round_ in range(1, batch.sampling_rounds):  # round 0 is above
        missing = batch.prompts - int(informative(scored, config).sum())  # >= 0: a round asks for no more than is missing
        if not missing:
            break
        scored = scored.join(sample(missing, round_))

    # 2. One advantage for each response to P prompts.
    groups = groups_to_train(informative(scored, config), batch.prompts)
    nothing_left_out = len(groups) == len(scored.rewards_PG)
    rollout = scored.rollout if nothing_left_out else scored.rollout.take(groups)
    penalty_PG = overlong_penalty(scored.rollout, config.reward, max_new_tokens=config.rollout.max_new_tokens)
    advantage_N = estimate_advantages((scored.rewards_PG - penalty_PG)[groups], rollout, config.advantage)

    # 3. One optimizer step for each minibatch: whole groups, in the order in which they were sampled.
    cut = minibatches(
        rollout,
        advantage_N,
        count=batch.minibatches,
        tokens_per_micro_batch=batch.tokens_per_micro_batch,
        mask_truncated=config.loss.mask_truncated,
    )
    updates: list[Update] = []
    for minibatch in cut:
        if minibatch.num_sequences:  # 0: all of its responses are masked
            on_policy = not updates  # no minibatch has moved the weights yet
            updates.append(
                train_minibatch(
                    policy, reference, optimizer, minibatch, config, step=step, on_policy=on_policy, ledger=ledger
                )
            )
    return StepOutcome.of(scored, penalty_PG, rollout, updates)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Responses with their rewards."""

    rollout: RolloutBatch
    rewards: tuple[Reward, ...]  # N

    @property
    def rewards_PG(self) -> Tensor:
        """[P, G] float32."""
        return reward_matrix(self.rewards, self.rollout.group_size)

    def join(self, more: Scored) -> Scored:
        """Both, one behind the other."""
        return Scored(rollout=RolloutBatch.join([self.rollout, more.rollout]), rewards=self.rewards + more.rewards)


def sample_and_score(
    engine: Engine,
    problems: Sequence[Problem],
    *,
    tokenizer: Tokenizer,
    encode: Callable[[Problem], Sequence[int]],
    pool: RewardPool,
    config: RunConfig,
    seed: tuple[int, ...],
    ledger: Ledger,
    progress: Progress | None = None,
) -> Scored:
    """Samples G responses to each problem, and scores each response as soon as it ends.

    Args:
        problems: P of them.
        seed: what tells this rollout from the run's others.

    For the other arguments, and for errors, see `grpo_step`.
    """
    G = config.batch.group_size
    request = SamplingRequest(
        prompts=[encode(p) for p in problems],
        group_size=G,
        seeds=derive_seeds(config.seed, ROLLOUT_STREAM, *seed, count=len(problems) * G),
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    with pool.begin([p for p in problems for _ in range(G)]) as scoring:
        sampling = engine.stream(
            [request], stop_ids=tokenizer.stop_ids, config=config.rollout, ledger=ledger, progress=progress
        )
        for sequences, responses in sampling:
            with ledger.timed("reward"):
                scoring.add(sequences, map(tokenizer.decode, responses))
        with ledger.timed("reward"):
            rewards = scoring.finish()
    (rollout,) = sampling.batches
    return Scored(rollout=rollout, rewards=tuple(rewards))


def informative(scored: Scored, config: RunConfig) -> Tensor:
    """[P] bool, whether a group teaches: its responses got different rewards, and not all of them will be masked.

    The scorer's reward decides, as in DAPO: with the penalty of long responses nearly every group would differ.
    """
    differ = varies(scored.rewards_PG)
    if not config.loss.mask_truncated:
        return differ
    ended = torch.tensor([finish == "stop" for finish in scored.rollout.finish], device="cpu")
    return differ & ended.view_as(scored.rewards_PG).any(dim=1)


def groups_to_train(informative_P: Tensor, count: int) -> list[int]:
    """Which groups a step trains on, in the order in which they were sampled.

    Those that teach; where they are fewer than `count`, the first of the others too. So a batch always has P groups:
    the others count in its denominators, and the KL penalty acts on them.
    """
    others = (~informative_P).nonzero().flatten()[: count - int(informative_P.sum())]
    return sorted([*informative_P.nonzero().flatten().tolist(), *others.tolist()])


def train_minibatch(
    policy: Model,
    reference: Model | None,
    optimizer: torch.optim.Optimizer,
    minibatch: Minibatch,
    config: RunConfig,
    *,
    step: int,
    on_policy: bool,
    ledger: Ledger,
) -> Update:
    """One optimizer step. With on_policy the weights are those that sampled, and the log-probs must have the same bits."""
    logprobs_of = functools.partial(logprobs, activation_checkpointing=config.batch.activation_checkpointing)
    results, recomputed, trained_tokens = [], [], 0
    for micro in minibatch.micro_batches:
        T, flops = micro.tokens.numel(), training_flops(policy, micro)  # num_inputs counts a shared prompt for each response
        trained_tokens += micro.num_inputs
        micro = move(micro, policy.device)
        if reference is not None:
            with ledger.timed("reference", tokens=T, flops=flops), torch.no_grad():
                micro = dataclasses.replace(micro, ref_logprob=logprobs_of(reference, micro))
        with ledger.timed("forward", tokens=T, flops=flops):
            logprob = logprobs_of(policy, micro)
            loss, stats = policy_loss(logprob, micro, minibatch, config.loss)
        with ledger.timed("backward", tokens=T, flops=2 * flops):
            loss.backward()  # gradients add up over micro-batches; `update` clears them
        results.append((loss.detach(), stats))
        recomputed.append((logprob.detach(), micro))
    # Only from here on does the host wait for the device: so the bits are compared once, after all micro-batches.
    mismatch = 0.0
    if on_policy and not _same_bits(recomputed):
        mismatch = max(_on_policy_mismatch(logprob, micro, policy.batch_invariant) for logprob, micro in recomputed)
    with ledger.timed("optimizer"):
        lr = learning_rate(config.optimizer, step)
        grad_norm = update(optimizer, lr=lr, clip_norm=config.optimizer.clip_norm)
    losses, stats = (torch.stack(parts).tolist() for parts in zip(*results, strict=True))
    return Update(
        loss=functools.reduce(operator.add, losses),
        grad_norm=grad_norm,
        stats=tuple(ops.PolicyStats(*part) for part in stats),
        num_sequences=minibatch.num_sequences,
        trained_tokens=trained_tokens,
        mismatch_max=mismatch,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What one optimizer step did."""

    loss: float
    grad_norm: float  # before clipping
    stats: tuple[ops.PolicyStats, ...]  # of each micro-batch
    num_sequences: int
    trained_tokens: int
    mismatch_max: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """What one step sampled, was rewarded with and did to the weights."""

    scored: Scored  # all rounds of sampling
    zero_variance_groups: int  # of all that were sampled, groups whose responses got one reward of the scorer
    overlong_penalty: float  # mean over all responses
    masked_responses: int  # of the groups chosen, responses left out of the loss
    trained_tokens: int  # inputs of the training pass as 6 N T counts them, each sequence with a prompt of its own
    stats: ops.PolicyStats | None  # over the step's minibatches; None: all responses were masked, and nothing was trained
    loss: float | None  # mean over minibatches
    grad_norm: float | None  # before clipping, mean over minibatches
    mismatch_max: float | None  # max |sampler's - trainer's log-prob| in the first minibatch; later ones compare nothing

    @classmethod
    def of(cls, scored: Scored, penalty_PG: Tensor, trained: RolloutBatch, updates: Sequence[Update]) -> StepOutcome:
        """From what the stages of a step returned."""
        count = len(updates)
        return cls(
            scored=scored,
            zero_variance_groups=int((~varies(scored.rewards_PG)).sum()),
            overlong_penalty=float(penalty_PG.mean()),
            masked_responses=trained.num_sequences - sum(u.num_sequences for u in updates),
            trained_tokens=sum(u.trained_tokens for u in updates),
            stats=functools.reduce(ops.PolicyStats.merge, (s for u in updates for s in u.stats)) if count else None,
            loss=sum(u.loss for u in updates) / count if count else None,
            grad_norm=sum(u.grad_norm for u in updates) / count if count else None,
            mismatch_max=max(u.mismatch_max for u in updates) if count else None,
        )


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate at a GRPO step (1 is the first), for all its minibatches: linear over the warm-up steps, then constant."""
    return config.lr * min(1.0, step / config.warmup_steps) if config.warmup_steps else config.lr


def training_flops(model: Model, micro: TrainBatch) -> float:
    """FLOPs of the forward pass of a micro-batch on the CPU; backward takes twice that.

    What backward computes again, with activation checkpointing, is not counted.
    """
    pairs = int((micro.positions + 1).sum())  # each token sees itself and all before it
    return forward_flops(model, tokens=micro.tokens.numel(), pairs=pairs, head_rows=micro.num_response_tokens)


def _same_bits(recomputed: Sequence[tuple[Tensor, TrainBatch]]) -> bool:
    trained, sampled = zip(*((logprob, micro.old_logprob) for logprob, micro in recomputed), strict=True)
    return torch.equal(torch.cat(trained), torch.cat(sampled))  # one comparison, hence one wait, for all micro-batches


def _on_policy_mismatch(logprob: Tensor, micro: TrainBatch, batch_invariant: bool) -> float:
    """The weights have not moved since the rollout, so batch-invariant matmuls must have given the same bits."""
    if torch.equal(logprob, micro.old_logprob):
        return 0.0
    difference = (logprob - micro.old_logprob).abs().nan_to_num(nan=float("inf"))
    if not batch_invariant:
        return float(difference.max())
    row = int(difference.argmax())
    sequence = int(torch.searchsorted(micro.cu_responses, row, right=True)) - 1
    raise RuntimeError(
        f"rollout and trainer disagree: sequence {sequence} of a micro-batch, response token "
        f"{row - int(micro.cu_responses[sequence])}: sampled with log-prob {float(micro.old_logprob[row])!r}, recomputed "
        f"as {float(logprob[row])!r}"
    )
