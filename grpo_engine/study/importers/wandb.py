"""A CSV file exported from Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_engine.study.importers.csv_file import read_lines
from grpo_engine.study.importers.rows import (
    Metric,
    Rows,
    RunInfo,
    check_sets,
    keys_of,
    metric_of,
    number,
    row_of,
    step_number,
)

if TYPE_CHECKING:
    import pyarrow


def read_wandb_csv(
    path: str | os.PathLike[str],
    *,
    runs: RunInfo | Mapping[str, RunInfo],
    metrics: Mapping[str, Metric],
    step: str | None = None,
    tokens: str | None = None,
    out_of_domain: Sequence[str] = (),
) -> pyarrow.Table:
    """Reads a CSV file exported from Weights & Biases.

    Two forms are told apart by `runs`. A single `RunInfo` means a run's history (`run.history().to_csv(...)`): a line a
    step, a column a metric. A mapping from run names means the export of a chart: one step column, and columns
    "<run> - <metric>", beside which "__MIN" and "__MAX" are ignored.

    Args:
        path: the file.
        runs: the run, or the runs by the names that the chart shows.
        metrics: evaluation set -> name of the metric.
        step: the step column; None takes "_step" or "Step", whichever is there. Name "train/global_step" or the like
            where wandb's own step does not count optimizer steps.
        tokens: metric with the running count of tokens; None leaves tokens and compute null.
        out_of_domain: which of the sets are out of domain.

    Returns:
        The table; a cell that is empty was not logged at that step.

    Raises:
        ValueError: a column or run that is not there, a cell that is no such value, a step that was evaluated twice, or a
            count of tokens that falls; file, line and column are named.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    check_sets(metrics, out_of_domain)
    header, lines = read_lines(path)
    if step is None:
        step = next((c for c in ("_step", "Step", "step") if c in header), None)
        if step is None:
            raise ValueError(f"{path}: no column '_step' or 'Step'; name the step column of {', '.join(header)}")
    by_run = {None: runs} if isinstance(runs, RunInfo) else dict(runs)
    seen = {info.dataset_prompts for info in by_run.values()}
    rows, wanted = Rows(seen.pop() if len(seen) == 1 else None), keys_of(metrics)
    for name, info in by_run.items():
        prefix = "" if name is None else f"{name} - "
        for column in [step, *(prefix + k for k in wanted), *([prefix + tokens] if tokens else [])]:
            if column not in header:
                raise ValueError(f"{path}: no column {column!r}; there are {', '.join(header)}")
        count: int | None = None
        counted_at = 0
        for line, cells in lines:
            where = f"{path}:{line}"
            data = {k: cells[prefix + k].strip() or None for k in wanted}
            data = {k: None if v == "NaN" else v for k, v in data.items()}  # how pandas writes "not logged"
            if tokens and cells[prefix + tokens].strip() not in ("", "NaN"):
                at = f"{where}: column {prefix + tokens!r}"
                now = round(number(cells[prefix + tokens], at))
                if count is not None and now < count:
                    raise ValueError(
                        f"{at}: must not fall while a run trains, got {now} after {count} at line {counted_at}; correct "
                        "it, or import without tokens"
                    )
                count, counted_at = now, line
            for eval_set, metric in metrics.items():
                value = metric_of(data, metric, where)
                if value is None:
                    continue
                at_step = step_number(cells[step], f"{where}: column {step!r}")
                row = row_of(info, run_id=name or path.stem, step=at_step, eval_set=eval_set,
                             in_domain=eval_set not in out_of_domain, pass1=value,
                             tokens=0 if at_step == 0 and tokens else count)  # fmt: skip
                rows.add(row, where)
    return rows.table(str(path))
