"""The log of a TRL trainer, or of another one of transformers."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_engine.study.importers.rows import (
    Metric,
    Rows,
    RunInfo,
    check_sets,
    metric_of,
    number,
    read_log,
    row_of,
    step_number,
)

if TYPE_CHECKING:
    import pyarrow

_log = logging.getLogger(__name__)


def read_trl(
    path: str | os.PathLike[str],
    *,
    run: RunInfo,
    metrics: Mapping[str, Metric] | None = None,
    out_of_domain: Sequence[str] = (),
) -> pyarrow.Table:
    """Reads the log of a TRL (or other transformers) trainer.

    Tokens are TRL's running count `num_tokens` (prompt and completion tokens, padding excluded) at the last training
    line at or before the evaluation. Where a restart began the count anew, it is carried on from the checkpoint.

    A step that was evaluated twice (by the trainer, and by the script when the training ended) counts as it was the last
    time. Where training goes back to an earlier step, what followed that step is run again and does not count.

    Args:
        path: trainer_state.json, a JSON list of log entries, or a folder: of its trainer_state.json files (a checkpoint
            folder has its own) the one with the most steps is read.
        run: what the log does not say. TRL's `step` counts optimizer steps, so prompts_per_step is
            per_device_train_batch_size x processes x gradient_accumulation_steps / num_generations.
        metrics: evaluation set -> key of the log. None takes the only key `eval_rewards/<name>/mean`, as set <name>.
        out_of_domain: which of the sets are out of domain.

    Returns:
        The table.

    Raises:
        ValueError: not such a file, no evaluation, several reward keys and no `metrics`, a value that is no pass rate, or
            a count that began anew at a step which the log does not tell; the message names file, entry and key.
        FileNotFoundError: nothing there.
    """
    path = Path(path)
    if path.is_dir():
        found = [*path.glob("trainer_state.json"), *path.glob("checkpoint-*/trainer_state.json")]
        if not found:
            raise FileNotFoundError(f"{path}: no trainer_state.json in it or in its checkpoints")
        path = max(found, key=lambda p: len(_state(p)[0]))
    entries, save_steps = _state(path)
    if metrics is None:
        keys = sorted({k for e in entries for k in e if re.fullmatch(r"eval_rewards/.+/mean", k)})
        if len(keys) != 1:
            raise ValueError(f"{path}: metrics must be named; of eval_rewards/*/mean the log has {len(keys)}: {keys}")
        metrics = {keys[0].split("/", 1)[1].removesuffix("/mean"): keys[0]}
    check_sets(metrics, out_of_domain)
    run_id = path.parent.name if path.name == "trainer_state.json" else path.stem
    count = _RunningCount(save_steps)
    found_rows: dict[tuple[str, int], tuple[dict[str, Any], str]] = {}
    last, again, lost = 0, 0, 0
    for i, entry in enumerate(entries):
        where = f"{path}: log_history[{i}]"
        if "step" not in entry:
            raise ValueError(f"{where}: no step")
        step = step_number(entry["step"], f"{where}, step")
        if not any(k.startswith("eval_") for k in entry):
            if step < last:  # resumed from a checkpoint before it
                gone = [key for key in found_rows if key[1] >= step]
                lost += len(gone)
                for key in gone:
                    del found_rows[key]
            last = step
        if entry.get("num_tokens") is not None:
            count.add(step, round(number(entry["num_tokens"], f"{where}, num_tokens")), f"{where}, num_tokens")
        for eval_set, metric in metrics.items():
            value = metric_of(entry, metric, where)
            if value is None:
                continue
            again += (eval_set, step) in found_rows
            row = row_of(run, run_id=run_id, step=step, eval_set=eval_set, in_domain=eval_set not in out_of_domain,
                         pass1=value, tokens=0 if step == 0 else count.at(step))  # fmt: skip
            found_rows[eval_set, step] = row, where
    if again:
        _log.warning("%s: evaluations of a step that was evaluated before: %d; the last of a step counts", path, again)
    if lost:
        _log.warning("%s: evaluations of steps that were run again later: %d; they do not count", path, lost)
    rows = Rows(run.dataset_prompts)
    for row, where in found_rows.values():
        rows.add(row, where)
    return rows.table(f"{path} ({', '.join(str(m) for m in metrics.values())})")


@dataclass(slots=True)
class _RunningCount:
    """A count that rises with the steps, and that older trainers begin anew when they are resumed."""

    save_steps: int | None  # checkpoints are at its multiples; None: not known
    _known: list[tuple[int, int, int]] = field(default_factory=list)  # step, count, what earlier starts had counted

    def at(self, step: int) -> int | None:
        """The count at the last entry at or before a step; None before the first."""
        return next((total for s, total, _ in reversed(self._known) if s <= step), None)

    def add(self, step: int, count: int, where: str) -> None:
        """Takes what the log has at a step.

        Raises:
            ValueError: the count fell, and the log does not have the step from which the run went on.
        """
        while self._known and self._known[-1][0] >= step:  # run again
            self._known.pop()
        before, total, base = self._known[-1] if self._known else (0, 0, 0)
        if base + count < total:
            if step - before != 1 and not (self.save_steps and before % self.save_steps == 0):
                raise ValueError(
                    f"{where}: must not fall while a run trains, got {count} at step {step} after {total - base} at step "
                    f"{before}: a restart began it anew, from a step that the log does not have. Leave num_tokens out of "
                    "the log to import it without compute"
                )
            base = total
        self._known.append((step, base + count, base))


def _state(path: Path) -> tuple[list[dict[str, Any]], int | None]:
    """The entries of a log, and how many steps lie between checkpoints where it says so."""
    try:
        obj = json.loads(read_log(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error})") from None
    entries = obj.get("log_history") if isinstance(obj, dict) else obj
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ValueError(f"{path}: must hold an object with a list log_history, or such a list")
    every = obj.get("save_steps") if isinstance(obj, dict) else None
    return entries, every if isinstance(every, int) and every > 0 else None
