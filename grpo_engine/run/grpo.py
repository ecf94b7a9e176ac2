"""The GRPO step of a run, and its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from grpo_engine.config import RunConfig
from grpo_engine.model.decoder import Model
from grpo_engine.model.tokenizer import PromptTokens, Tokenizer
from grpo_engine.records.records import StepRecord
from grpo_engine.rewards.pool import RewardPool
from grpo_engine.rollout.engine import Engine, Progress
from grpo_engine.run.counters import Odometer
from grpo_engine.train.step import StepOutcome, grpo_step
from grpo_engine.types import Problem


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GrpoStepper:
    """Samples, scores and trains on the problems of a step."""

    config: RunConfig
    engine: Engine
    reference: Model | None  # None without a KL term
    optimizer: torch.optim.Optimizer
    problems: Callable[[int], Sequence[Problem]]  # of a step
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
            self.problems(step),
            tokenizer=self.tokenizer,
            encode=self.encode,
            pool=self.pool,
            config=self.config,
            step=step,
            ledger=self.position.ledger,
            progress=self.progress,
        )
        self.position.advance(step, outcome.trained_tokens)
        measured = _measured(outcome, prompts=self.config.batch.prompts, has_reference=self.reference is not None)
        return StepRecord(**self.position.fields(), lr=self.optimizer.param_groups[0]["lr"], **measured)


def _measured(outcome: StepOutcome, *, prompts: int, has_reference: bool) -> dict:
    rollout, stats = outcome.rollout, outcome.stats
    rewards = torch.tensor([r.value for r in outcome.rewards], dtype=torch.float64, device="cpu")
    lengths = (rollout.cu_seqlens[1:] - rollout.cu_seqlens[:-1]).long()
    response_tokens = int((lengths - rollout.prompt_len).sum())
    return {
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(correction=1).item(),
        "reward_failures": sum(r.status != "ok" for r in outcome.rewards),
        "groups": prompts,
        "equal_groups": outcome.equal_groups,
        "response_len_mean": response_tokens / rollout.num_sequences,
        "finished_share": rollout.finish.count("stop") / rollout.num_sequences,
        "prompt_tokens": int(rollout.prompt_len.sum()),
        "response_tokens": response_tokens,
        "loss": outcome.loss,
        "kl": stats.kl / stats.tokens if has_reference else None,
        "entropy": rollout.entropy.double().sum().item() / response_tokens,
        "clip_low_share": stats.clip_low / stats.tokens,
        "clip_high_share": stats.clip_high / stats.tokens,
        "ratio_max": stats.ratio_max,
        "grad_norm": outcome.grad_norm,
        "logprob_mismatch_max": outcome.mismatch_max,
    }
