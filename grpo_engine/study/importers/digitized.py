"""Points that were read off published figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_engine.study.importers.csv_file import read_lines
from grpo_engine.study.importers.rows import Rows, RunInfo, number, row_of, share, step_number, whole

if TYPE_CHECKING:
    import pyarrow


def read_digitized(path: str | os.PathLike[str], *, column: str = "test_loss") -> pyarrow.Table:
    """Reads points that were read off published figures.

    Args:
        path: CSV with columns source, N_B (nominal parameters in billions), step, D (prompts seen) and the loss.
        column: which reading of the loss: "test_loss", or "test_loss_blind" where the file has it.

    Returns:
        The table: one run a size, already an average over the authors' runs. Only nominal parameters are known, so
        fit it with params="nominal".

    Raises:
        ValueError: a missing column, or a cell that is no such value; file, line and column are named.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    header, lines = read_lines(path)
    for name in ("source", "N_B", "step", "D", column):
        if name not in header:
            raise ValueError(f"{path}: no column {name!r}; there are {', '.join(header)}")
    rows = Rows()
    for line, cells in lines:
        where = f"{path}:{line}: column"
        billions = number(cells["N_B"], f"{where} 'N_B'")
        loss = share(number(cells[column], f"{where} {column!r}"), f"{where} {column!r}")
        size = f"{billions:g}B"
        name = f"{cells['source']}-{size}"
        info = RunInfo(size=size, kind=cells["source"], params_nominal=1e9 * billions, run_id=name)
        row = row_of(info, run_id="", step=step_number(cells["step"], f"{where} 'step'"), eval_set="holdout",
                     in_domain=True, pass1=1.0 - loss, tokens=None)  # fmt: skip
        seen = whole(cells["D"], f"{where} 'D'")
        rows.add(row | {"loss": loss, "prompts_seen": seen}, f"{path}:{line}")
    return rows.table(str(path))
