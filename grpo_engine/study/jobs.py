"""The jobs of a study: cells and the models that they start from, and what became of them."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grpo_engine.study.design import ModelNeed, Plan
from grpo_engine.study.job import LOG_FILE, Job

MODELS = "models"
LOG_TAIL = 15  # lines of a failed cell's log that are shown
State = Literal["waiting", "running", "done", "failed", "blocked"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A cell or a model that did not come to its end."""

    name: str
    reason: str  # "exit code 1", "killed by SIGKILL"
    log: Path
    tail: str  # the last lines of the log

    def __str__(self) -> str:
        return f"{self.name} failed ({self.reason}); the end of {self.log}:\n" + "\n".join(
            f"    {line}" for line in self.tail.splitlines()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """How a run of a study ended."""

    done: tuple[str, ...]  # cells that this run finished
    skipped: tuple[str, ...]  # cells that were done before
    failures: tuple[Failure, ...]
    blocked: tuple[str, ...]  # never started, because what they need failed
    missing: tuple[str, ...]  # not finished, because the run was interrupted
    interrupted: int | None  # signal number
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 when every cell is done, 128 + signal when interrupted, else 1."""
        if self.interrupted is not None:
            return 128 + self.interrupted
        return 1 if self.failures or self.blocked else 0


@dataclass(slots=True)
class Tracked:
    job: Job
    state: State = "waiting"
    handle: Any = None
    started: float = 0.0
    seconds: float | None = None  # how long it took
    attempts: int = 0
    progress: dict[str, Any] = field(default_factory=dict)


def jobs_of(folder: Path, the_plan: Plan, skipped: set[str]) -> dict[str, Tracked]:
    """Models that are missing and cells that are not done, longest chain first."""
    wanted = [c for c in the_plan.cells if c.name not in skipped]
    needed = {c.needs for c in wanted if c.needs}
    needed |= {n.base for n in needed}
    missing = {n: cost for n, cost in the_plan.models if n in needed and not model_ready(n)}
    found: dict[str, Job] = {}
    for need, cost in missing.items():
        found[f"model {need.name}"] = Job(
            name=f"model {need.name}",
            arguments=("model", need.size, need.kind, str(need.seed)),
            log=folder / MODELS / f"{need.name}.log",
            after=(f"model {need.base.name}",) if need.kind == "instruct" and need.base in missing else (),
            seconds=cost.seconds,
        )
    for cell in wanted:
        path = folder / cell.folder
        found[cell.name] = Job(
            name=cell.name,
            arguments=("cell", os.fspath(path)),
            log=path / LOG_FILE,
            after=(f"model {cell.needs.name}",) if cell.needs in missing else (),
            seconds=cell.cost.seconds,
            cell=cell,
        )
    chain: dict[str, float] = {}

    def length(name: str) -> float:
        if name not in chain:
            chain[name] = found[name].seconds + max((length(j.name) for j in found.values() if name in j.after), default=0.0)
        return chain[name]

    ranks = {name: position for position, name in enumerate(found)}
    return {n: Tracked(found[n]) for n in sorted(found, key=lambda n: (-length(n), ranks[n]))}


def model_ready(need: ModelNeed) -> bool:
    """Whether a model of the embedded ladder lies in the cache already.

    Args:
        need: size, kind and seed.

    Returns:
        True when `grpo_engine.micro.pretrain.ensure_model` would return without training.
    """
    from grpo_engine.micro.pretrain import cached_model

    return cached_model(need.size, need.kind, seed=need.seed) is not None


def failure_file(log: Path) -> Path:
    """Beside a job's log; there while its last attempt has failed."""
    return log.with_suffix(".failed.json")


def failure_of(t: Tracked) -> Failure:
    code = t.progress.get("code")
    if code is not None and code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            reason += ", perhaps because memory ran out"
    elif code == 0:
        reason = "it ended without writing summary.json"
    else:
        reason = f"exit code {code}"
    try:
        text = t.job.log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        text = f"(no log: {error})"
    return Failure(name=t.job.name, reason=reason, log=t.job.log, tail="\n".join(text.splitlines()[-LOG_TAIL:]))
