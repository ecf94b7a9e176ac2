"""What a run leaves behind: typed records, one JSON object a line, and nothing else.

A run directory holds

    run.json        what was run: resolved configuration, commit, versions, hardware, model, method
    steps.jsonl     one `StepRecord` a line: deterministic, bit-identical after a kill and a resume
    evals.jsonl     one `EvalRecord` a line: deterministic as well
    timings.jsonl   one `TimingRecord` a line: wall-clock, different in every run; only cost figures read it
    order.txt       uid of every training prompt in the order they are seen, one a line; `groups` lines are a step
    checkpoint/     written by `grpo_engine.train.checkpoint`
    summary.json    written last: a run with a summary is complete

Every object carries `"schema": 2`; records of schema 1, which lack `EvalRecord.right`, are read too. A value
that was not measured is `null`. JSON has no NaN and no infinity, so a value that is not finite is written as `null`
*and named*, with what it was, under the key `"non_finite"` of the same object:
`{"loss": null, "non_finite": {"loss": "nan"}}`. An absent number and a broken one never look alike.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_engine.records.jsonl import Record, from_json, read_json, read_jsonl

RUN_FILE = "run.json"
STEPS_FILE = "steps.jsonl"
EVALS_FILE = "evals.jsonl"
TIMINGS_FILE = "timings.jsonl"
ORDER_FILE = "order.txt"
SUMMARY_FILE = "summary.json"
CELL_FILE = "cell.json"  # written by a study beside the run's own files: which cell this run is
PHASES = (
    "prefill",
    "decode",
    "reference",
    "forward",
    "backward",
    "optimizer",
    "reward",
    "evaluation",
    "checkpoint",
)


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run has come: what steps and evaluations begin with."""

    step: int  # 1 is the first step; 0, in an evaluation, is the model as it came
    prompts_seen: int  # D: prompts drawn so far, repeats included; 0 for pretraining
    unique_prompts: int  # different prompts drawn so far; prompts_seen / unique_prompts is the reuse so far
    trained_tokens: int  # T: prompt and response of all sequences trained on, so far; a shared prompt counts for each
    compute_6nt: float  # FLOPs so far, 6 x non-embedding parameters x trained_tokens
    compute_ledger: float  # FLOPs so far, all phases but evaluation summed


@dataclass(frozen=True, kw_only=True)
class StepRecord(Position):
    """One optimisation step. Everything here is a function of the configuration alone, never of the clock.

    Counters whose comment says "so far" include this step. `None` means that the quantity does not exist in
    this run (no KL term, or a pretraining step, which has no reward), never that it was zero.
    """

    reward_mean: float | None = None  # over all responses of the step
    reward_std: float | None = None  # over all responses of the step, divided by n - 1
    reward_failures: int | None = None  # responses whose verifier timed out, crashed or raised (scored 0)
    groups: int | None = None  # prompts of the step, those of further rounds of sampling included
    zero_variance_groups: int | None = None  # groups whose responses all got one reward: no gradient, but of a penalty
    overlong_penalty_mean: float | None = None  # over all responses of the step; reward_mean is without it
    masked_responses: int | None = None  # left out of the loss, of those trained on; None: loss.mask_truncated is off
    response_len_mean: float | None = None  # tokens
    finished_share: float | None = None  # responses that ended by themselves, not at the length limit
    prompt_tokens: int | None = None  # of this step, counted once a response
    response_tokens: int | None = None  # of this step
    loss: float | None = None  # mean over the step's minibatches
    kl: float | None = None  # estimate of the KL to the reference policy; None without a reference
    entropy: float | None = None  # nats a token, mean over response tokens as they were sampled
    clip_low_share: float | None = None  # response tokens whose ratio was clipped from below
    clip_high_share: float | None = None
    ratio_max: float | None = None
    grad_norm: float | None = None  # before clipping, mean over minibatches
    lr: float | None = None
    logprob_mismatch_max: float | None = None  # max |sampler's - trainer's log-prob|; 0.0 if batch-invariant


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One set, answered in one mode."""

    eval_set: str
    in_domain: bool
    mode: str  # "sample" or "greedy"
    temperature: float  # 0.0 for greedy
    num_problems: int
    num_samples: int  # responses to each problem
    pass1: float  # mean over problems of the share of right responses
    loss: float  # 1 - pass1, the test loss of the scaling laws
    stderr: float | None  # of pass1, over problems; None for a single problem
    by_grade: dict[str, dict[str, float]] | None = None  # {grade: {"pass1": float, "n": int}}
    right: list[int] | None = None  # right responses to each problem, in the set's order; None where rewards are not 0 or 1


@dataclass(frozen=True, kw_only=True)
class EvalRecord(EvalResult, Position):
    """One evaluation of one set in one mode, and after how much training. Its fields begin with the position's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseCost:
    """What one phase of one step took. `tokens` and `flops` are None where the phase has none (reward)."""

    seconds: float
    tokens: int | None = None
    flops: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TimingRecord:
    """The cost of one step by phase; phases that did not happen are absent. Names are those of `PHASES`.

    The first record of a process includes what came before its first step; what comes after a record, such as a
    checkpoint, is in the next one, and at the end of the run in one more record of the last step.
    """

    step: int
    phase: dict[str, PhaseCost]
    seconds: float | None = None  # wall-clock since the record before, booked or not; None in records of old versions


def run_id(config: Mapping[str, Any]) -> str:
    """The name of a run: the first 12 hexadecimal digits of the SHA-256 of its resolved configuration.

    Args:
        config: the resolved configuration as JSON-like values; the order of keys does not matter.

    Returns:
        12 lower-case hexadecimal digits.
    """
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run directory, read. `notes` says what was left out (torn last lines of a run that is under way)."""

    path: Path
    header: dict[str, Any]
    cell: dict[str, Any] | None  # cell.json, when a study made this run
    steps: list[StepRecord]
    evals: list[EvalRecord]
    timings: list[TimingRecord]
    summary: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the run reached its end: a summary, and its last step among the records."""
        return self.summary is not None


def is_complete(run_dir: str | os.PathLike[str]) -> bool:
    """Whether the directory holds a run that reached its end (`summary.json`, which is written last).

    Args:
        run_dir: a run directory; it need not exist.

    Returns:
        True or False.
    """
    return (Path(run_dir) / SUMMARY_FILE).is_file() and (Path(run_dir) / RUN_FILE).is_file()


def read_run(run_dir: str | os.PathLike[str], *, allow_incomplete: bool = False) -> Run:
    """Reads a run directory and checks that its parts agree.

    Args:
        run_dir: the directory.
        allow_incomplete: whether a run without `summary.json` is read as far as it got.

    Returns:
        The run. Of a run that is not complete, a torn last line is left out and named in `notes`.

    Raises:
        FileNotFoundError: `run.json`, or a file that a complete run must have, is missing.
        ValueError: the run is not complete, a record is malformed, or steps.jsonl does not hold the last step.
    """
    path = Path(run_dir)
    if not (path / RUN_FILE).is_file():
        raise FileNotFoundError(f"{path}: no {RUN_FILE}, so this is not a run directory")
    header = read_json(path / RUN_FILE)
    summary = read_json(path / SUMMARY_FILE) if (path / SUMMARY_FILE).is_file() else None
    if summary is None and not allow_incomplete:
        raise ValueError(f"{path}: the run is not complete (no {SUMMARY_FILE})")
    notes: list[str] = []

    def load(name: str, cls: type[Record]) -> list[Record]:
        file = path / name
        if summary is None and not file.is_file():
            return []
        read = read_jsonl(file, allow_torn=summary is None)
        if read.torn:
            notes.append(read.torn)
        return [from_json(cls, o, where=f"{file}:{n}") for n, o in enumerate(read.records, start=1)]

    run = Run(
        path=path,
        header=header,
        cell=read_json(path / CELL_FILE) if (path / CELL_FILE).is_file() else None,
        steps=load(STEPS_FILE, StepRecord),
        evals=load(EVALS_FILE, EvalRecord),
        timings=load(TIMINGS_FILE, TimingRecord),
        summary=summary,
        notes=notes,
    )
    for name, rows in ((STEPS_FILE, run.steps), (TIMINGS_FILE, run.timings)):
        seen = [r.step for r in rows]
        if seen != sorted(seen) or (name == STEPS_FILE and len(seen) != len(set(seen))):
            raise ValueError(f"{path / name}: steps must rise, got {seen[:20]}")
    if summary is not None and summary.get("steps", 0) > 0:
        last = run.steps[-1].step if run.steps else 0
        if last != summary["steps"]:
            raise ValueError(f"{path / STEPS_FILE}: the last step must be {summary['steps']} (summary.json), got {last}")
    return run
