"""All evaluations of some runs as one Arrow table."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from grpo_engine.records.jsonl import SCHEMA
from grpo_engine.records.records import RUN_FILE, Run, read_run

if TYPE_CHECKING:
    import pyarrow

_TABLE = (
    ("study", "string"),
    ("cell", "string"),
    ("run_id", "string"),
    ("method", "string"),
    ("kind", "string"),
    ("size", "string"),
    ("params_non_embedding", "int64"),
    ("params_nominal", "float64"),
    ("seed", "int64"),
    ("group_size", "int64"),
    ("tau", "float64"),
    ("step", "int64"),
    ("prompts_seen", "int64"),
    ("unique_prompts", "int64"),
    ("trained_tokens", "int64"),
    ("compute_6nt", "float64"),
    ("compute_ledger", "float64"),
    ("eval_set", "string"),
    ("in_domain", "bool_"),
    ("mode", "string"),
    ("temperature", "float64"),
    ("num_problems", "int64"),
    ("num_samples", "int64"),
    ("pass1", "float64"),
    ("loss", "float64"),
    ("stderr", "float64"),
)
TABLE_COLUMNS = tuple(name for name, _ in _TABLE)  # those of one value; right comes after them


def table_schema() -> pyarrow.Schema:
    """The Arrow schema of `runs.parquet`: one row an evaluation record, `TABLE_COLUMNS` in order and right.

    Returns:
        A pyarrow schema whose metadata holds the record schema number under b"grpo_engine_schema".
    """
    import pyarrow as pa

    fields = [pa.field(name, getattr(pa, kind)()) for name, kind in _TABLE]
    fields.append(pa.field("right", pa.list_(pa.int32())))
    return pa.schema(fields, metadata={b"grpo_engine_schema": str(SCHEMA).encode()})


def runs_table(run_dirs: Iterable[str | os.PathLike[str] | Run], *, allow_incomplete: bool = False) -> pyarrow.Table:
    """All evaluations of several runs as one long table.

    Args:
        run_dirs: run directories, or runs that were read already.
        allow_incomplete: whether runs without a summary take part with what they have.

    Returns:
        A table with `table_schema()`, one row an evaluation record. `study`, `cell`, `kind`, `size` and `tau`
        come from the study's `cell.json`; for a run outside a study `study` is null, `cell` is the folder's name,
        kind and size are those of `run.json`, and `tau` is prompts seen over unique prompts at the end.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `read_run`.
        KeyError: `run.json` lacks a part of its description; the message names the file.
    """
    import pyarrow as pa

    columns: dict[str, list[Any]] = {name: [] for name in table_schema().names}
    for item in run_dirs:
        run = item if isinstance(item, Run) else read_run(item, allow_incomplete=allow_incomplete)
        try:
            model, config = run.header["model"], run.header["config"]
            fixed = {
                "study": (run.cell or {}).get("study"),
                "cell": (run.cell or {}).get("cell", run.path.name),
                "run_id": run.header["run_id"],
                "method": run.header["method"],
                "kind": (run.cell or {}).get("kind", model["kind"]),
                "size": (run.cell or {}).get("size", model["size"]),
                "params_non_embedding": model["params_non_embedding"],
                "params_nominal": model.get("params_nominal"),
                "seed": config.get("seed"),
                "group_size": (config.get("batch") or {}).get("group_size"),
                "tau": (run.cell or {}).get("tau", _reuse(run)),
            }
        except KeyError as error:
            raise KeyError(f"{run.path / RUN_FILE}: no {error.args[0]!r}") from None
        for record in run.evals:
            for name, column in columns.items():
                column.append(fixed[name] if name in fixed else getattr(record, name))
    return pa.table(columns, schema=table_schema())


def _reuse(run: Run) -> float | None:
    last = run.steps[-1] if run.steps else None
    return last.prompts_seen / last.unique_prompts if last and last.unique_prompts else None
