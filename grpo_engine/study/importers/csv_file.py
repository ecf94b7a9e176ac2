"""Any CSV file: one evaluation a row, or one step a row and one size a column."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_engine.records.table import TABLE_COLUMNS
from grpo_engine.study.importers.rows import Metric, Rows, RunInfo, check_sets, number, read_log, share, step_number, whole

if TYPE_CHECKING:
    import pyarrow

_INTEGERS = (
    "params_non_embedding", "seed", "group_size", "prompts_seen", "unique_prompts", "trained_tokens", "num_problems",
    "num_samples",
)  # fmt: skip
_FLOATS = (
    "params_nominal", "tau", "compute_6nt", "compute_ledger", "temperature", "pass1", "loss", "stderr",
)  # fmt: skip
Lines = list[tuple[int, dict[str, str]]]  # line number, and its cells by column


def read_lines(path: Path) -> tuple[list[str], Lines]:
    """Header, and rows with their line numbers. A header of tabs without a comma means tabs."""
    text = read_log(path)
    head = text.partition("\n")[0]
    delimiter = "\t" if "\t" in head and "," not in head else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header: list[str] | None = None
    rows = []
    try:
        header = next(reader, None)
        if not header:
            raise ValueError(f"{path}: is empty, and a header line was wanted")
        if twice := sorted({c for c in header if header.count(c) > 1}):
            raise ValueError(f"{path}: the header names {', '.join(map(repr, twice))} twice")
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: has {len(values)} fields, the header {len(header)}")
            rows.append((reader.line_num, dict(zip(header, values, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: must be a line of CSV, got one that is not ({error})") from None
    return header, rows


def read_csv(
    path: str | os.PathLike[str],
    *,
    columns: Mapping[str, str],
    constants: Mapping[str, Any] | None = None,
    prompts_per_step: int | None = None,
) -> pyarrow.Table:
    """Reads any CSV file with one evaluation a row.

    Args:
        path: the file, with a header line.
        columns: column of our table -> column of the file, {"step": "global_step", "pass1": "val/acc", ...}.
        constants: column of our table -> value, for what is the same in all rows.
        prompts_per_step: gives prompts_seen from step, where that is not a column.

    Returns:
        The table. `size`, `step` and one of `pass1` and `loss` must be given. Defaults: method "grpo", kind "base",
        mode "sample", eval_set "eval", in domain; run_id is file name and size. compute_6nt is made from trained_tokens
        and params_non_embedding where it is not given. An empty cell is null.

    Raises:
        ValueError: an unknown column on either side, a cell that is no such value, or a step that a run has twice:
            file, line and column are named.
        FileNotFoundError: no such file.
    """
    path, rows = Path(path), Rows()
    header, lines = read_lines(path)
    for row, where in _evaluations(path, header, lines, columns, constants or {}, prompts_per_step):
        rows.add(row, where)
    return rows.table(str(path))


def read_csv_of_runs(
    path: str | os.PathLike[str],
    runs: RunInfo | Mapping[str, RunInfo],
    *,
    columns: Mapping[str, str],
    metrics: Mapping[str, Metric] | None = None,
    out_of_domain: Sequence[str] = (),
    eval_set: str | None = None,
) -> pyarrow.Table:
    """Reads a CSV file of runs that are described apart.

    Three forms are told apart. A single `RunInfo` is the run of the file, or what its runs have in common. A mapping is
    from the values of the column that `columns` calls size. Where `columns` has no size, the mapping is from columns: the
    table is wide, each of its columns is the pass rate of one run, and an empty cell is a step that was not evaluated.

    Args:
        path: the file.
        runs: see above.
        columns: column of our table -> column of the file.
        metrics: evaluation set -> column of its pass rate; not for a wide table, which has one set.
        out_of_domain: which of the sets are out of domain.
        eval_set: name of the set, where neither metrics nor a column says it.

    Returns:
        The table.

    Raises:
        ValueError, FileNotFoundError: see `read_csv`.
    """
    path = Path(path)
    header, lines = read_lines(path)
    if eval_set is not None and (metrics or "eval_set" in columns):
        raise ValueError(f"eval_set: the sets are named by metrics or by a column, got {eval_set!r} too")
    sets: list[tuple[dict[str, str], dict[str, Any]]] = [({}, {"eval_set": eval_set})]
    if metrics:
        check_sets(metrics, out_of_domain)
        if bad := sorted(name for name, key in metrics.items() if not isinstance(key, str)):
            raise ValueError(f"metrics: {', '.join(bad)} must be one column of {path}, got several")
        sets = [
            ({"pass1": str(key)}, {"eval_set": name, "in_domain": name not in out_of_domain})
            for name, key in metrics.items()
        ]
    parts: list[tuple[RunInfo, Lines, dict[str, str], str | None]]  # run, its lines, its own columns, run_id
    if isinstance(runs, RunInfo):
        parts = [(runs, lines, {}, None if "size" in columns else path.stem)]
    elif "size" in columns:
        parts = [
            (runs[value], mine, {}, f"{path.stem}-{runs[value].size}")
            for value, mine in _by_value(path, header, lines, columns["size"], runs).items()
        ]
        columns = {ours: theirs for ours, theirs in columns.items() if ours != "size"}
    else:
        if metrics or {"pass1", "loss"} & set(columns):
            raise ValueError(
                "metrics: a table with one column a size has one evaluation set, got "
                f"{', '.join(metrics or {}) or 'a column of pass1 or loss'} besides; name the set by eval_set"
            )
        parts = [(run, lines, {"pass1": column}, f"{path.stem}-{run.size}") for column, run in runs.items()]
    seen = {run.dataset_prompts for run, *_ in parts}
    rows = Rows(seen.pop() if len(seen) == 1 else None)
    for run, mine, own, run_id in parts:
        for theirs, of_set in sets:
            named = {**columns, **own, **theirs}
            about = _about(run, run.run_id or run_id) | of_set
            constants = {k: v for k, v in about.items() if v is not None and k not in named}
            per_step = None if "prompts_seen" in named else run.prompts_per_step
            for row, where in _evaluations(path, header, mine, named, constants, per_step):
                rows.add(row, where)
    return rows.table(str(path))


def _about(run: RunInfo, run_id: str | None) -> dict[str, Any]:
    return {
        "size": run.size, "kind": run.kind, "method": run.method, "mode": run.mode, "run_id": run_id,
        "params_non_embedding": run.params_non_embedding, "params_nominal": run.params_nominal, "seed": run.seed,
        "group_size": run.group_size, "temperature": run.temperature, "num_problems": run.num_problems,
        "num_samples": run.num_samples, "study": run.study,
    }  # fmt: skip


def _by_value(path: Path, header: Sequence[str], lines: Lines, column: str, runs: Mapping[str, RunInfo]) -> dict[str, Lines]:
    """The lines of each run, by the value of the column of sizes."""
    if column not in header:
        raise ValueError(f"{path}: no column {column!r} (wanted for size); there are {', '.join(header)}")
    out: dict[str, Lines] = {value: [] for value in runs}
    for line, cells in lines:
        value = cells[column].strip()
        if value not in out:
            raise ValueError(f"{path}:{line}: column {column!r}: must be one of {', '.join(out)}, got {value!r}")
        out[value].append((line, cells))
    if empty := [value for value, mine in out.items() if not mine]:
        raise ValueError(f"{path}: column {column!r}: no line has {', '.join(map(repr, empty))}")
    return out


def _evaluations(
    path: Path, header: Sequence[str], lines: Lines, columns: Mapping[str, str], constants: Mapping[str, Any],
    prompts_per_step: int | None,
) -> Iterator[tuple[dict[str, Any], str]]:  # fmt: skip
    """Rows of the table, and where each comes from."""
    for ours, theirs in columns.items():
        if ours not in TABLE_COLUMNS:
            names = ", ".join(TABLE_COLUMNS)
            raise ValueError(f"columns: {ours!r} is no column of the table; those are {names}")
        if theirs not in header:
            raise ValueError(f"{path}: no column {theirs!r} (wanted for {ours}); there are {', '.join(header)}")
    for ours in constants:
        if ours not in TABLE_COLUMNS:
            raise ValueError(f"constants: {ours!r} is no column of the table")
        if ours in columns:
            raise ValueError(f"constants: {ours!r} is given by columns too")
    given = set(columns) | set(constants)
    if missing := [c for c in ("size", "step") if c not in given]:
        raise ValueError(f"columns: {' and '.join(missing)} must be given, by columns or by constants")
    if not given & {"pass1", "loss"}:
        raise ValueError("columns: one of pass1 and loss must be given")
    if prompts_per_step is not None and "prompts_seen" in given:
        raise ValueError("prompts_per_step: prompts_seen is given too")
    for line, cells in lines:
        row: dict[str, Any] = dict.fromkeys(TABLE_COLUMNS)
        row |= {"method": "grpo", "kind": "base", "mode": "sample", "eval_set": "eval", "in_domain": True}
        row |= constants
        for ours, theirs in columns.items():
            row[ours] = _cell(ours, cells[theirs], f"{path}:{line}: column {theirs!r}")
        where = f"{path}:{line}: column {columns.get('pass1', columns.get('loss', 'pass1'))!r}"
        if row["pass1"] is None and row["loss"] is None:
            continue  # a line of a step that was not evaluated
        for name in ("size", "step"):
            if row[name] is None:
                raise ValueError(f"{path}:{line}: column {columns.get(name, name)!r}: {name} must not be empty")
        if row["pass1"] is None:
            row["pass1"] = 1.0 - share(row["loss"], where)
        elif row["loss"] is None:
            row["loss"] = 1.0 - share(row["pass1"], where)
        elif abs(share(row["pass1"], where) + row["loss"] - 1.0) > 1e-6:
            raise ValueError(f"{where}: pass1 {row['pass1']:g} and loss {row['loss']:g} must add up to 1")
        if row["prompts_seen"] is None and prompts_per_step is not None:
            row["prompts_seen"] = prompts_per_step * row["step"]
        if row["compute_6nt"] is None and row["trained_tokens"] is not None and row["params_non_embedding"] is not None:
            row["compute_6nt"] = 6.0 * row["params_non_embedding"] * row["trained_tokens"]
        if row["run_id"] is None:
            row["run_id"] = f"{path.stem}-{row['size']}-{row['kind']}" + ("" if row["seed"] is None else f"-{row['seed']}")
        row["cell"] = row["cell"] or row["run_id"]
        yield row, f"{path}:{line}"


def _cell(column: str, text: str, where: str) -> Any:
    text = text.strip()
    if text == "":
        return None
    if column == "step":
        return step_number(text, where)
    if column in _INTEGERS:
        return whole(text, where)
    if column in _FLOATS:
        return number(text, where)
    if column == "in_domain":
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{where}: must be true or false, got {text!r}")
        return text.lower() in ("true", "1")
    return text
