"""Logs into the table of a folder, which `study fit` and `study report` read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_engine.records.table import table_schema
from grpo_engine.study.design import STUDY_FILE
from grpo_engine.study.importers.csv_file import read_csv_of_runs
from grpo_engine.study.importers.rows import Metric, RunInfo
from grpo_engine.study.importers.trl import read_trl
from grpo_engine.study.importers.verl import read_verl
from grpo_engine.study.importers.wandb import read_wandb_csv
from grpo_engine.system import files
from grpo_engine.system.locks import LOCK_FILE, locked

if TYPE_CHECKING:
    import pyarrow

TABLE_FILE = "runs.parquet"
FORMATS = ("csv", "verl", "trl", "wandb")
WAIT_S = 60.0  # for another import into the same folder

_LABEL = re.compile(r"(\d+(?:\.\d+)?)([MB])", re.IGNORECASE)


def import_logs(
    out: str | os.PathLike[str],
    log_format: str,
    paths: Sequence[str | os.PathLike[str]],
    *,
    run: RunInfo | Mapping[str, RunInfo],
    metrics: Mapping[str, Metric] | None = None,
    out_of_domain: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    eval_set: str | None = None,
    step: str | None = None,
    tokens: str | None = None,
) -> pyarrow.Table:
    """Adds the evaluations in some logs to the table of a folder, for `study fit` and `study report`.

    A study is imported in several calls where its sizes have logs of their own, as each call tells the size of what it
    reads. A run that is there already is replaced. Calls for one folder at once wait for each other.

    Args:
        out: folder; made when absent, and no study that was run here.
        log_format: one of `FORMATS`.
        paths: logs of runs that `run` describes; each is a run, named by its file (see the readers).
        run: what the logs do not say. For csv it gives the columns that are not in the file. A mapping where one file has
            several runs: from the columns, or the values of the column of sizes, of a CSV file (`read_csv_of_runs`), or
            from the names of a chart of wandb's. A size such as 7B or 500M is taken for the nominal parameters where
            none are given.
        metrics, out_of_domain: see the readers; for csv the columns of the sets' pass rates.
        columns: csv only: column of our table -> column of the file.
        eval_set: csv only: name of the evaluation set where the file has one and does not say it.
        step, tokens: wandb only; see `read_wandb_csv`.

    Returns:
        The whole table of the folder, `runs.parquet`.

    Raises:
        ValueError: an unknown format, an argument that is not the format's, two logs of one name, a run that is there
            already with another size, kind or seed, a folder with a study of its own, a file in the folder's place, or
            what the reader raises.
        FileNotFoundError: no such log.
        Locked: another process holds the folder for longer than a minute.
        OSError: the folder cannot be made or written.
    """
    import pyarrow as pa

    if log_format not in FORMATS:
        raise ValueError(f"log_format must be one of {', '.join(FORMATS)}, got {log_format!r}")
    for name, given, owner in (
        ("columns", columns, "csv"), ("eval_set", eval_set, "csv"), ("step", step, "wandb"), ("tokens", tokens, "wandb"),
    ):  # fmt: skip
        if given and log_format != owner:
            raise ValueError(f"{name}: only {owner} logs have it, got {given!r} for {log_format}")
    if log_format == "wandb" and not metrics:
        raise ValueError("metrics: must be named for wandb logs")
    _check_sizes(log_format, run, columns or {})
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} must be a folder, got a file")
    found = []
    for path in paths:
        if log_format == "csv":
            table = read_csv_of_runs(path, run, columns=columns or {}, metrics=metrics, out_of_domain=out_of_domain,
                                     eval_set=eval_set)  # fmt: skip
        elif log_format == "wandb":
            assert metrics is not None  # refused above
            table = read_wandb_csv(path, runs=run, metrics=metrics, step=step, tokens=tokens,
                                   out_of_domain=out_of_domain)  # fmt: skip
        else:
            assert isinstance(run, RunInfo)  # `_check_sizes` refuses several
            read = read_verl if log_format == "verl" else read_trl
            table = read(path, run=run, metrics=metrics, out_of_domain=out_of_domain)
        found.append(_with_nominal(table))
    names = [set(t.column("run_id").to_pylist()) for t in found]
    if twice := sorted(n for i, a in enumerate(names) for n in a if any(n in b for b in names[:i])):
        raise ValueError(f"two logs are called {', '.join(twice)}: import them one by one with run_id")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK_FILE, f"{folder}: another process writes into it", wait_s=WAIT_S):
            if (folder / STUDY_FILE).exists():
                raise ValueError(f"{folder}: holds a study that was run here; import into a folder of its own")
            table = _merged(folder, read_table(folder), pa.concat_tables(found))
            write_table(folder, table)
    except OSError as error:
        raise OSError(f"out: {folder} must be a folder that can be written, got: {error.strerror or error}") from error
    return table


def _check_sizes(log_format: str, run: RunInfo | Mapping[str, RunInfo], columns: Mapping[str, str]) -> None:
    if isinstance(run, RunInfo):
        if run.size is None and "size" not in columns:
            raise ValueError(f"size: must be given for {log_format} logs that have no column of sizes")
        if run.size is not None and "size" in columns:
            raise ValueError(f"size: column {columns['size']!r} has it, got {run.size!r} too")
        return
    if log_format not in ("csv", "wandb"):
        raise ValueError(f"size: a log of {log_format} is one run, got {len(run)} sizes; import them one by one")
    sizes = [r.size for r in run.values()]
    if not sizes or None in sizes:
        raise ValueError(f"size: each run must have one, got {sizes}")
    runs = [r.run_id or (r.size if log_format == "csv" else name) for name, r in run.items()]
    if twice := sorted({str(r) for r in runs if runs.count(r) > 1}):
        raise ValueError(f"run_id: the runs of a file must have different names, got {', '.join(twice)} twice")


def _with_nominal(table: pyarrow.Table) -> pyarrow.Table:
    """The table, with nominal parameters from the labels of sizes where none were given."""
    import pyarrow as pa

    rows = table.to_pylist()
    for row in rows:
        match = _LABEL.fullmatch(row["size"])
        if row["params_nominal"] is None and match:
            row["params_nominal"] = float(match[1]) * {"M": 1e6, "B": 1e9}[match[2].upper()]
    return pa.Table.from_pylist(rows, schema=table.schema)


def _merged(folder: Path, known: pyarrow.Table | None, new: pyarrow.Table) -> pyarrow.Table:
    """The table of a folder with new runs in the place of those of the same names."""
    import pyarrow as pa

    if known is None:
        return new
    about = ("run_id", "size", "kind", "method", "seed")
    there = {r["run_id"]: r for r in known.select(about).to_pylist()}
    for row in new.select(about).to_pylist():
        old = there.get(row["run_id"], row)
        if other := [name for name in about if row[name] != old[name]]:
            raise ValueError(
                f"{folder}: run_id: {row['run_id']!r} is there already with {other[0]} {old[other[0]]!r}, got "
                f"{row[other[0]]!r}: name the new run by run_id, or import into a folder of its own"
            )
    names = set(new.column("run_id").to_pylist())
    keep = [r not in names for r in known.column("run_id").to_pylist()]
    return pa.concat_tables([known.filter(pa.array(keep, type=pa.bool_())), new])


def write_table(folder: Path, table: pyarrow.Table) -> None:
    """Writes a study's `runs.parquet`, whole or not at all."""
    import io

    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    files.write_bytes_atomic(folder / TABLE_FILE, out.getvalue())


def read_table(folder: Path) -> pyarrow.Table | None:
    """A study's `runs.parquet`; None where there is none. A column that an older one lacks is null."""
    import pyarrow as pa
    import pyarrow.parquet

    if not (folder / TABLE_FILE).is_file():
        return None
    table, schema = pyarrow.parquet.read_table(folder / TABLE_FILE), table_schema()
    for field in schema:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(schema.names).cast(schema)
