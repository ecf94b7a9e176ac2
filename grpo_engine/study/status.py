"""How far a study is, read from its folder."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_engine.records import jsonl, records
from grpo_engine.records.cost import total_cost
from grpo_engine.study.design import STUDY_FILE, Cell, load_study, plan
from grpo_engine.study.importers import read_table
from grpo_engine.study.job import LOG_FILE
from grpo_engine.study.jobs import failure_file
from grpo_engine.system.locks import LOCK_FILE, is_locked


def read_progress(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """How far a run has come, from the ends of its record files; never raises for a file that is being written.

    Args:
        run_dir: the run directory.

    Returns:
        {"step", "reward", "loss"}: the last step, its mean reward, and the last sampled test loss of an in-domain
        set; keys are absent where there is no record yet.
    """
    out: dict[str, Any] = {}
    path = Path(run_dir)
    for record in _tail(path / records.STEPS_FILE):
        out |= {"step": record.get("step"), "reward": record.get("reward_mean")}
    for record in _tail(path / records.EVALS_FILE):
        if record.get("mode") == "sample" and record.get("in_domain"):
            out.setdefault("eval_set", record.get("eval_set"))
            if record.get("eval_set") == out["eval_set"]:
                out["loss"] = record.get("loss")
    return {k: v for k, v in out.items() if v is not None}


def _tail(path: Path, num_bytes: int = 16384) -> list[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - num_bytes))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return []
    out = []
    for line in lines[1 if size > num_bytes else 0 :]:
        with contextlib.suppress(ValueError):
            obj = json.loads(line)
            if isinstance(obj, dict):
                out.append(obj)
    return out


def last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1] if lines and not lines[-1].startswith("---") else ""


CellState = Literal["done", "running", "failed", "partial", "missing", "imported"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CellStatus:
    """How far one cell is, or one run of another trainer."""

    name: str
    cell: Cell | None  # None: imported
    state: CellState
    step: int
    seconds: float | None  # of its recorded steps; None before the first step
    loss: float | None = None  # the last sampled test loss of the first set in domain
    reason: str | None = None  # of a failure

    def __str__(self) -> str:
        if self.cell is None:
            return f"{self.state}, {self.step} steps"
        steps = self.cell.config.steps
        if self.state in ("running", "partial"):
            return f"{self.state} {self.step} of {steps}"
        return self.state if self.reason is None else f"failed at {self.step} of {steps} ({self.reason})"


def study_status(study_dir: str | os.PathLike[str]) -> tuple[CellStatus, ...]:
    """What of a study is done, running, failed, begun or missing, from its records alone.

    Args:
        study_dir: a folder that `run_study` was given, or that logs were imported into.

    Returns:
        One status a cell, in the plan's order; of imported logs one a run, in the order of their names.

    Raises:
        FileNotFoundError: neither a study.yaml nor imported runs there.
        ValueError: a wrong study.yaml.
    """
    folder = Path(study_dir)
    if not (folder / STUDY_FILE).is_file() and (table := read_table(folder)) is not None:
        return _imported(table.to_pylist())
    out = []
    for cell in plan(load_study(folder / STUDY_FILE)).cells:
        path = folder / cell.folder
        progress, reason = read_progress(path), None
        step = progress.get("step", 0)
        failed = failure_file(path / LOG_FILE)
        state: CellState
        if records.is_complete(path):
            state = "done"
        elif is_locked(path / LOCK_FILE):
            state = "running"
        elif failed.is_file():
            state, reason = "failed", jsonl.read_json(failed)["reason"]
        else:
            state = "partial" if step else "missing"
        seconds = None
        if (path / records.TIMINGS_FILE).is_file():
            found = jsonl.read_jsonl(path / records.TIMINGS_FILE, allow_torn=True).records
            timings = [jsonl.from_json(records.TimingRecord, o, where=str(path)) for o in found]
            seconds = sum(c.seconds for c in total_cost(timings).values()) if timings else None
        out.append(
            CellStatus(
                name=cell.name, cell=cell, state=state, step=step, seconds=seconds, loss=progress.get("loss"), reason=reason
            )
        )
    return tuple(out)


def _imported(rows: list[dict[str, Any]]) -> tuple[CellStatus, ...]:
    """A status for each run of other trainers' logs."""
    out = []
    for name in sorted({r["run_id"] for r in rows}):
        mine = sorted((r for r in rows if r["run_id"] == name), key=lambda r: r["step"])
        tests = [r for r in mine if r["mode"] == "sample" and r["in_domain"]]
        last = next((r["loss"] for r in reversed(tests) if r["eval_set"] == tests[0]["eval_set"]), None)
        out.append(CellStatus(name=name, cell=None, state="imported", step=mine[-1]["step"], seconds=None, loss=last))
    return tuple(out)
