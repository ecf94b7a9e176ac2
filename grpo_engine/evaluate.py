"""Answers held-out problems and counts what is right."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from grpo_engine.config import RunConfig
from grpo_engine.ledger import Ledger
from grpo_engine.model import Model
from grpo_engine.rewards.pool import RewardPool
from grpo_engine.rollout import Progress, derive_seeds, generate
from grpo_engine.tokenizer import Tokenizer
from grpo_engine.types import EvalSet, Problem

EVALUATION_STREAM = 2  # keeps the draws of evaluation apart from those of training


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """One set, answered in one mode."""

    eval_set: str
    in_domain: bool
    mode: str  # "sample" or "greedy"
    temperature: float  # 0.0 for greedy
    num_problems: int
    num_samples: int  # answers to each problem
    pass1: float  # mean over problems of the mean reward of its answers
    stderr: float | None  # of pass1 over problems; None for a single problem
    by_grade: Mapping[str, Mapping[str, float]] | None  # {grade: {"pass1", "n"}}; None when ungraded

    @property
    def loss(self) -> float:
        """1 - pass@1, the test loss of the scaling laws."""
        return 1.0 - self.pass1


def eval_steps(config: RunConfig) -> list[int]:
    """The steps after which a run evaluates: 0, the last, and evenly in log(step) between.

    Args:
        config: steps and evaluation.count count; 0 evaluates never, 1 only at the end.

    Returns:
        Increasing step numbers, without repeats: small studies may get fewer than `count`.
    """
    count, last = config.evaluation.count, config.steps
    if count <= 1:
        return [last] * count
    between = {round(last ** (i / (count - 2))) for i in range(count - 1)} if count > 2 else {last}
    return sorted({0} | between)


def evaluate(
    model: Model,
    eval_set: EvalSet,
    *,
    tokenizer: Tokenizer,
    pool: RewardPool,
    config: RunConfig,
    greedy: bool,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Answers every problem of a set and scores the answers.

    The draws depend on the run's seed, the set and the problem's place in it, not on the step: every evaluation of a
    run uses the same random numbers, so that curves move with the weights.

    Args:
        model: the policy.
        eval_set: problems.
        tokenizer: text to tokens and back.
        pool: scores answers.
        config: evaluation.temperature and .samples, rollout limits, seed, and model.kind for the prompt's form.
        greedy: one answer each at temperature 0 instead.
        ledger: books the cost under "evaluation".
        progress: of the rollout.

    Returns:
        An `EvalResult`.

    Raises:
        ValueError: an empty set, or what `generate` raises.
    """
    problems = eval_set.problems
    if not problems:
        raise ValueError(f"evaluate: set {eval_set.name!r} holds no problem")
    P, samples = len(problems), 1 if greedy else config.evaluation.samples
    temperature = 0.0 if greedy else config.evaluation.temperature
    chat = config.model.kind == "instruct"
    name = int.from_bytes(eval_set.name.encode()[:8], "little")
    rollout = generate(
        model,
        [tokenizer.encode_prompt(p.prompt, chat) for p in problems],
        group_size=samples,
        seeds=derive_seeds(config.seed, EVALUATION_STREAM, name, count=P * samples),
        stop_ids=tokenizer.stop_ids,
        config=config.rollout,
        temperature=temperature,
        ledger=ledger,
        phase="evaluation",
        progress=progress,
    )
    answers = [tokenizer.decode(ids) for ids in rollout.answers()]
    rewards = pool.score(answers, [p for p in problems for _ in range(samples)])
    by_problem = torch.tensor([r.value for r in rewards], dtype=torch.float64).view(P, samples).mean(dim=1)
    return EvalResult(
        eval_set=eval_set.name,
        in_domain=eval_set.in_domain,
        mode="greedy" if greedy else "sample",
        temperature=temperature,
        num_problems=P,
        num_samples=samples,
        pass1=by_problem.mean().item(),
        stderr=by_problem.std(correction=1).item() / math.sqrt(P) if P > 1 else None,
        by_grade=_by_grade(problems, by_problem.tolist()),
    )


def _by_grade(problems: Sequence[Problem], pass1: Sequence[float]) -> dict[str, dict[str, float]] | None:
    grades: dict[int, list[float]] = defaultdict(list)
    for problem, value in zip(problems, pass1, strict=True):
        if problem.grade is not None:
            grades[problem.grade].append(value)
    return {str(g): {"pass1": sum(v) / len(v), "n": len(v)} for g, v in sorted(grades.items())} or None
