"""The GRPO step of a run, and its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from grpo_engine.config import RunConfig
from grpo_engine.model.decoder import Model
from grpo_engine.model.tokenizer import PromptTokens, Tokenizer
from grpo_engine.records.records import StepRecord
from grpo_engine.rewards.pool import RewardPool
from grpo_engine.rollout.engine import Engine, Progress
from grpo_engine.run.counters import Odometer
from grpo_engine.train.step import StepOutcome, grpo_step, learning_rate
from grpo_engine.types import Problem


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GrpoStepper:
    """Samples, scores and trains on the problems of a step."""

    config: RunConfig
    engine: Engine
    reference: Model | None  # None without a KL term
    optimizer: torch.optim.Optimizer
    problems: Callable[[], Iterator[Problem]]  # to train on, from here on
    note_order: Callable[[Iterable[str]], None]  # is told the uids that a step sampled for
    tokenizer: Tokenizer
    encode: PromptTokens
    pool: RewardPool
    position: Odometer
    progress: Progress

    def step(self, step: int) -> StepRecord:
        """Does a step; 1 is the first."""
        outcome = grpo_step(
            self.engine,
            self.reference,
            self.optimizer,
            self.problems(),
            tokenizer=self.tokenizer,
            encode=self.encode,
            pool=self.pool,
            config=self.config,
            step=step,
            ledger=self.position.ledger,
            progress=self.progress,
        )
        groups = len(outcome.scored.rewards_PG)
        self.note_order(p.uid for p in islice(self.problems(), groups))
        self.position.advance(step, prompts=groups, tokens=outcome.trained_tokens)
        rate = learning_rate(self.config.optimizer, step)
        return StepRecord(**self.position.fields(), lr=rate, **_measured(outcome, self.config))


def _measured(outcome: StepOutcome, config: RunConfig) -> dict[str, Any]:
    rollout, stats = outcome.scored.rollout, outcome.stats
    rewards = torch.tensor([r.value for r in outcome.scored.rewards], dtype=torch.float64, device="cpu")
    response_tokens = int(rollout.response_len.sum())
    return {
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(correction=1).item(),
        "reward_failures": sum(r.status != "ok" for r in outcome.scored.rewards),
        "groups": rollout.num_sequences // rollout.group_size,
        "zero_variance_groups": outcome.zero_variance_groups,
        "overlong_penalty_mean": None if config.reward.overlong_buffer is None else outcome.overlong_penalty,
        "masked_responses": outcome.masked_responses if config.loss.mask_truncated else None,
        "response_len_mean": response_tokens / rollout.num_sequences,
        "finished_share": rollout.finish.count("stop") / rollout.num_sequences,
        "prompt_tokens": int(rollout.prompt_len.sum()),
        "response_tokens": response_tokens,
        "loss": outcome.loss,
        "kl": stats.kl / stats.tokens if stats and config.loss.kl_coef > 0 else None,
        "entropy": rollout.entropy.double().sum().item() / response_tokens,
        "clip_low_share": stats and stats.clip_low / stats.tokens,
        "clip_high_share": stats and stats.clip_high / stats.tokens,
        "ratio_max": stats and stats.ratio_max,
        "grad_norm": outcome.grad_norm,
        "logprob_mismatch_max": outcome.mismatch_max,
    }
