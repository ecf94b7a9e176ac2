"""Writes a study whose runs follow a known law, in the files that real runs leave."""

import math
import random

from grpo_engine.records import jsonl
from grpo_engine.records.jsonl import JsonlWriter
from grpo_engine.records.records import EvalRecord, PhaseCost, StepRecord, TimingRecord
from grpo_engine.study.design import AxesConfig, SizeConfig, StudyConfig, plan
from grpo_engine.study.run import _write_plan

PARAMS = {"xxs": 6_300, "xs": 21_800, "s": 74_300, "m": 296_000, "l": 985_000}
K_MAX, N0 = 0.14, 150_000.0
SETS = (("chain", True, 1.0), ("word", True, 0.6), ("code", False, 0.0), ("logic", False, -0.15))
SECONDS = {"prefill": 0.03, "decode": 0.1, "reference": 0.12, "forward": 0.15, "backward": 0.3, "optimizer": 0.02,
           "reward": 0.01, "evaluation": 0.2}  # fmt: skip


def true_loss(params, prompts, kind="base"):
    """The planted law: log L = -k(N) log D + E(N), D in prompts."""
    k = K_MAX * params / (params + N0)
    start = 0.95 - 0.11 * math.log10(params / 6_300) - (0.05 if kind == "instruct" else 0.0)
    return start * max(prompts, 32.0) ** -k * 32.0**k


def make_study(
    folder, *, sizes=("xs", "s", "m"), steps=60, axes=None, noise=1.0, seed=0, unfinished=(), counted=False, spread=0.0
):
    """Makes the folder of a study that has run; gives back its plan.

    noise scales the binomial noise of 500 problems x 4 samples; cells named in `unfinished` have no summary. `counted`
    records each problem's right answers: problems of unequal difficulty, the same in every run. `spread` is the
    standard deviation over runs of the loss at the end.
    """
    axes = axes or (AxesConfig(kinds=("base", "instruct"), seeds=(0, 1), control=("base",)),)
    study = StudyConfig(name="synthetic", run={"steps": steps}, sizes={s: SizeConfig() for s in sizes}, axes=tuple(axes))
    the_plan = plan(study)
    folder.mkdir(parents=True, exist_ok=True)
    _write_plan(folder, the_plan)
    for number, cell in enumerate(the_plan.cells):
        _run(folder / cell.folder, cell, random.Random(1000 * seed + number), noise, cell.name not in unfinished, counted,
             spread)  # fmt: skip
    return the_plan


def _run(path, cell, rng, noise, done, counted=False, spread=0.0):
    shift = rng.gauss(0, spread) if spread else 0.0
    params, steps = PARAMS[cell.size], cell.config.steps
    tokens = 64 * cell.group_size * 12
    jsonl.write_json_atomic(
        path / "run.json",
        {
            "run_id": cell.id, "method": cell.method, "config": cell.config.model_dump(mode="json"),
            "model": {"name": f"{cell.size}-{cell.kind}", "kind": cell.kind, "size": cell.size,
                      "params_non_embedding": params, "params_nominal": None, "params_total": params + 64 * 32},
            "versions": {"python": "3.11", "torch": "2.13"}, "hardware": {"cpu": "synthetic", "cores": 2},
        },
    )  # fmt: skip

    def so_far(step):
        seen = 64 * step if cell.method == "grpo" else 0
        return {
            "step": step, "prompts_seen": seen, "unique_prompts": round(seen / cell.tau),
            "trained_tokens": tokens * step, "compute_6nt": 6.0 * params * tokens * step,
            "compute_ledger": 9.0 * params * tokens * step,
        }  # fmt: skip

    due = sorted({0, *(round(steps ** (i / 10)) for i in range(11))})
    with JsonlWriter(path / "evals.jsonl") as evals:
        for step in due:
            for name, inside, share in SETS if step in (0, steps) else SETS[:1]:
                for mode in ("sample", "greedy"):
                    evals.write(_evaluation(cell, params, step, so_far(step), name, inside, share, mode, rng, noise, counted,
                                            shift * math.log(max(step, 1)) / math.log(steps)))  # fmt: skip
    with JsonlWriter(path / "steps.jsonl") as out:
        for step in range(1, steps + 1):
            reward = 1 - true_loss(params, 64 * step, cell.kind) + rng.gauss(0, 0.02)
            grpo = cell.method == "grpo"
            extra = {
                "reward_mean": reward, "reward_std": 0.4, "reward_failures": 0, "groups": 64, "zero_variance_groups": 9,
                "response_len_mean": 3 + 2 * step / steps + rng.gauss(0, 0.1), "finished_share": 0.98,
                "prompt_tokens": 4000, "response_tokens": 2000, "kl": 0.01, "entropy": 1.1 - 0.5 * step / steps,
                "clip_low_share": 0.0, "clip_high_share": 0.0, "ratio_max": 1.1, "logprob_mismatch_max": 0.0,
            }  # fmt: skip
            out.write(StepRecord(**so_far(step), loss=0.1, grad_norm=0.5, lr=1e-4, **(extra if grpo else {})))
    with JsonlWriter(path / "timings.jsonl") as out:
        for step in range(1, steps + 1):
            phases = SECONDS if cell.method == "grpo" else {n: SECONDS[n] for n in ("forward", "backward", "optimizer")}
            cost = {
                name: PhaseCost(
                    seconds=s * (params / 74_300) ** 0.6 * rng.uniform(0.9, 1.1),
                    tokens=None if name in ("reward", "optimizer") else tokens,
                    flops=None if name in ("reward", "optimizer") else 2.0 * params * tokens,
                )
                for name, s in phases.items()
            }
            out.write(TimingRecord(step=step, phase=cost))
    if done:
        jsonl.write_json_atomic(path / "summary.json", {"run_id": cell.id, "steps": steps})


def _evaluation(cell, params, step, counters, name, inside, share, mode, rng, noise, counted=False, shift=0.0):
    start = true_loss(params, 0, cell.kind)
    gain = start - true_loss(params, 64 * step / cell.tau**0.1, cell.kind)
    gain *= share * (0.3 if cell.method == "pretrain" else 1.0)
    rate = (min(max(1 - start + gain, 0.01), 0.99) if inside else 0.3 + gain) - shift
    rate = min(max(rate, 0.01), 0.99)
    spread = math.sqrt(rate * (1 - rate) / 500 * (0.4 if mode == "sample" else 1.0))
    samples, right = 4 if mode == "sample" else 1, None
    if counted:
        ease = [(j + 0.5) / 500 for j in range(500)]
        right = [sum(rng.random() < _solved(rate, e) for _ in range(samples)) for e in ease]
        rate = sum(right) / (500 * samples)
    else:
        rate = min(max(rate + noise * rng.gauss(0, spread), 0.0), 1.0)
    return EvalRecord(
        **counters, eval_set=name, in_domain=inside, mode=mode, temperature=0.7 if mode == "sample" else 0.0,
        num_problems=500, num_samples=samples, pass1=rate, loss=1 - rate, stderr=spread, right=right,
    )  # fmt: skip


def _solved(rate, ease):
    """Probability that a problem is solved: even over `ease` in (0, 1), the rate on average."""
    width = min(rate, 1 - rate)
    return rate + width * (2 * ease - 1)
