"""Answers held-out problems and counts what is right."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grpo_engine.config import EvalConfig, RolloutConfig, RunConfig
from grpo_engine.load import load_policy, load_task, model_files
from grpo_engine.model.tokenizer import Tokenizer
from grpo_engine.records.ledger import Ledger
from grpo_engine.records.records import EvalResult
from grpo_engine.rewards.pool import RewardPool, reward_pool
from grpo_engine.rollout.engine import Engine, Progress, SamplingRequest, derive_seeds
from grpo_engine.system import device
from grpo_engine.types import EvalSet, Problem

EVALUATION_STREAM = 2  # keeps the draws of evaluation apart from those of training


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
    engine: Engine,
    eval_sets: Sequence[EvalSet],
    *,
    tokenizer: Tokenizer,
    encode: Callable[[Problem], Sequence[int]],
    pool: RewardPool,
    evaluation: EvalConfig,
    rollout: RolloutConfig,
    seed: int,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> list[EvalResult]:
    """Samples responses to every problem of some sets in every mode, all in one rollout, and scores them.

    The modes are sampled responses and, with evaluation.greedy, one response each at temperature 0. The random numbers
    depend on the run's seed, the set and the problem's index in it, not on the step, nor on what else is evaluated:
    every evaluation of a run uses the same ones, so that curves move with the weights.

    Args:
        engine: samples with its model, the policy.
        eval_sets: problems.
        tokenizer: decodes responses, and has the tokens that end them.
        encode: a problem's prompt in tokens.
        pool: scores responses.
        evaluation: temperature, samples and greedy are read.
        rollout: lengths, filters, pages and batch limits.
        seed: of the run.
        ledger: books the cost under "evaluation".
        progress: of the rollout.

    Returns:
        An `EvalResult` for each set and mode: set by set, sampled before greedy.

    Raises:
        ValueError: an empty set, or what `Engine.stream` raises.
    """
    requests: list[tuple[EvalSet, SamplingRequest]] = []
    for eval_set in eval_sets:
        requests += [(eval_set, request) for request in _requests(eval_set, encode, evaluation, rollout, seed)]
    problems = [p for eval_set, request in requests for p in eval_set.problems for _ in range(request.group_size)]
    ledger = ledger or Ledger()
    with pool.begin(problems) as scoring:
        sampling = engine.stream(
            [request for _, request in requests], stop_ids=tokenizer.stop_ids, config=rollout, ledger=ledger,
            phase="evaluation", progress=progress,
        )  # fmt: skip
        for sequences, responses in sampling:
            with ledger.timed("evaluation"):
                scoring.add(sequences, map(tokenizer.decode, responses))
        with ledger.timed("evaluation"):
            rewards = scoring.finish()
    results, first = [], 0
    for eval_set, request in requests:
        last = first + request.num_sequences
        results.append(_result(eval_set, request, [r.value for r in rewards[first:last]]))
        first = last
    return results


def evaluation_seeds(seed: int, eval_set: str, *, count: int) -> Tensor:
    """[count] int64, one for each response to a set: of the run's seed, the set's name and the response's index alone."""
    return derive_seeds(seed, EVALUATION_STREAM, int.from_bytes(eval_set.encode()[:8], "little"), count=count)


def _requests(
    eval_set: EvalSet, encode: Callable[[Problem], Sequence[int]], evaluation: EvalConfig, rollout: RolloutConfig, seed: int
) -> list[SamplingRequest]:
    """Sampled responses, then greedy ones."""
    if not eval_set.problems:
        raise ValueError(f"evaluate: set {eval_set.name!r} holds no problem")
    prompts = [encode(p) for p in eval_set.problems]
    modes = [(evaluation.samples, evaluation.temperature), (1, 0.0)]
    return [
        SamplingRequest(
            prompts=prompts,
            group_size=samples,
            seeds=evaluation_seeds(seed, eval_set.name, count=len(prompts) * samples),
            temperature=temperature,
            max_new_tokens=rollout.max_new_tokens,
        )
        for samples, temperature in (modes if evaluation.greedy else modes[:1])
    ]


def _result(eval_set: EvalSet, request: SamplingRequest, values: Sequence[float]) -> EvalResult:
    P, samples = len(request.prompts), request.group_size
    rewards = torch.tensor(values, dtype=torch.float64, device="cpu").view(P, samples)
    by_problem = rewards.mean(dim=1)
    counted = bool(((rewards == 0) | (rewards == 1)).all())
    return EvalResult(
        eval_set=eval_set.name,
        in_domain=eval_set.in_domain,
        mode="sample" if request.temperature else "greedy",
        temperature=request.temperature,
        num_problems=P,
        num_samples=samples,
        pass1=(pass1 := by_problem.mean().item()),
        loss=1.0 - pass1,
        stderr=by_problem.std(correction=1).item() / math.sqrt(P) if P > 1 else None,
        by_grade=_by_grade(eval_set.problems, by_problem.tolist()),
        right=rewards.sum(dim=1).int().tolist() if counted else None,
    )


def _by_grade(problems: Sequence[Problem], pass1: Sequence[float]) -> dict[str, dict[str, float]] | None:
    grades: dict[int, list[float]] = defaultdict(list)
    for problem, value in zip(problems, pass1, strict=True):
        if problem.grade is not None:
            grades[problem.grade].append(value)
    return {str(g): {"pass1": sum(v) / len(v), "n": len(v)} for g, v in sorted(grades.items())} or None


def evaluate_only(config: RunConfig) -> list[EvalResult]:
    """Answers every evaluation set of a configuration with the model as it is.

    Args:
        config: model, task, evaluation, rollout limits and seed are read.

    Returns:
        One result for each set and mode.

    Raises:
        ValueError: no evaluation set, or bad input.
    """
    config = config.model_copy(update={"device": device.resolve(config.device)})
    source = model_files(config.model)
    task = load_task(config.task, seed=config.seed, needed=1, reward=config.reward)
    if not task.evals:
        raise ValueError("evaluate: task.evals names no evaluation set")
    policy = load_policy(config, source)
    with reward_pool(config.reward) as pool:
        return evaluate(
            Engine(policy.model), list(task.evals.values()), tokenizer=policy.tokenizer, encode=policy.encode, pool=pool,
            evaluation=config.evaluation, rollout=config.rollout, seed=config.seed,
        )  # fmt: skip
