"""Logs of other frameworks as the same long table, so that their users can fit laws too.

    read_csv          any CSV file, with a mapping of columns
    read_trl          TRL / transformers: trainer_state.json (log_history)
    read_verl         verl: the file logger's jsonl, or captured console output
    read_wandb_csv    a chart or a run history exported from Weights & Biases
    read_digitized    points read off published figures, as in `digitized_base_D.csv`
    import_logs       any of the first four, into the `runs.parquet` of a folder that `study fit` and `report` read

Every reader gives a table with `records.table_schema()`; several are joined by `pyarrow.concat_tables`. What a log does
not say (parameters, prompts a step, answers a prompt) comes from a `RunInfo`; what nobody says stays null. Nothing is
guessed: a metric that is not a pass rate between 0 and 1, or a choice between several, is an error that names the file,
the column and the row.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_engine.records.table import TABLE_COLUMNS, table_schema
from grpo_engine.study.design import STUDY_FILE
from grpo_engine.system import files

if TYPE_CHECKING:
    import pyarrow

TABLE_FILE = "runs.parquet"
Metric = str | Mapping[str, float]  # a key of the log, or several with weights: {"val/a": 335, "val/b": 165}

_INTEGERS = (
    "params_non_embedding", "seed", "group_size", "step", "prompts_seen", "unique_prompts", "trained_tokens",
    "num_problems", "num_samples",
)  # fmt: skip
_FLOATS = (
    "params_nominal", "tau", "compute_6nt", "compute_ledger", "temperature", "pass1", "loss", "stderr",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What a foreign log does not say about its run. None stays null in the table."""

    size: str  # label, "7B"
    kind: str = "base"  # or "instruct"
    params_non_embedding: int | None = None
    params_nominal: float | None = None
    prompts_per_step: int | None = None  # prompts, not answers; gives prompts_seen
    dataset_prompts: int | None = None  # different prompts there are; gives unique_prompts and tau
    group_size: int | None = None
    seed: int | None = None
    run_id: str | None = None  # None: the name of the file, or of the run in it
    study: str | None = None
    method: str = "grpo"
    mode: str = "sample"
    temperature: float | None = None
    num_problems: int | None = None
    num_samples: int | None = None


def _row(info: RunInfo, *, run_id: str, step: int, eval_set: str, in_domain: bool, pass1: float,
         tokens: int | None) -> dict[str, Any]:  # fmt: skip
    """One row of the table; compute is 6 N T of non-embedding parameters, null when either is unknown."""
    seen = None if info.prompts_per_step is None else info.prompts_per_step * step
    unique = seen if info.dataset_prompts is None or seen is None else min(seen, info.dataset_prompts)
    n = info.params_non_embedding
    return {
        "study": info.study, "cell": info.run_id or run_id, "run_id": info.run_id or run_id, "method": info.method,
        "kind": info.kind, "size": info.size, "params_non_embedding": n, "params_nominal": info.params_nominal,
        "seed": info.seed, "group_size": info.group_size, "tau": None, "step": step, "prompts_seen": seen,
        "unique_prompts": unique, "trained_tokens": tokens,
        "compute_6nt": None if n is None or tokens is None else 6.0 * n * tokens, "compute_ledger": None,
        "eval_set": eval_set, "in_domain": in_domain, "mode": info.mode, "temperature": info.temperature,
        "num_problems": info.num_problems, "num_samples": info.num_samples, "pass1": pass1, "loss": 1.0 - pass1,
        "stderr": None,
    }  # fmt: skip


def _table(rows: list[dict[str, Any]], where: str) -> pyarrow.Table:
    import pyarrow as pa

    if not rows:
        raise ValueError(f"{where}: holds no evaluation")
    last: dict[str, dict[str, Any]] = {}
    for r in rows:  # how often prompts were seen is known at the end of a run
        if r["unique_prompts"] and (r["run_id"] not in last or r["step"] > last[r["run_id"]]["step"]):
            last[r["run_id"]] = r
    for r in rows:
        if r["tau"] is None and r["run_id"] in last:
            r["tau"] = last[r["run_id"]]["prompts_seen"] / last[r["run_id"]]["unique_prompts"]
    return pa.Table.from_pylist(rows, schema=table_schema())


def _number(text: Any, where: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: must be a number, got {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"{where}: must be finite, got {text!r}")
    return value


def _whole(text: Any, where: str) -> int:
    value = _number(text, where)
    if value != int(value):
        raise ValueError(f"{where}: must be a whole number, got {text!r}")
    return int(value)


def _share(value: float, where: str) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{where}: must be a pass rate between 0 and 1, got {value:g}; name a metric that is a mean of 0/1 rewards"
        )
    return value


def _metric(data: Mapping[str, Any], metric: Metric, where: str) -> float | None:
    """The value of a metric at one step; None when the step did not evaluate it."""
    weights = {metric: 1.0} if isinstance(metric, str) else dict(metric)
    there = [k for k in weights if data.get(k) is not None]
    if not there:
        return None
    if len(there) < len(weights):
        raise ValueError(f"{where}: has {', '.join(there)} but not {', '.join(sorted(set(weights) - set(there)))}")
    if not weights or min(weights.values()) < 0 or not sum(weights.values()) > 0:
        raise ValueError(f"metrics: weights must not be negative and not all 0, got {weights}")
    total = sum(w * _share(_number(data[k], f"{where}, {k}"), f"{where}, {k}") for k, w in weights.items())
    return total / sum(weights.values())


def _named(metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
    if not metrics:
        raise ValueError("metrics must name at least one evaluation set, got none")
    return metrics


def _outside(metrics: Mapping[str, Metric], out_of_domain: Sequence[str]) -> None:
    if unknown := sorted(set(out_of_domain) - set(metrics)):
        raise ValueError(f"out_of_domain: {', '.join(unknown)} is not among the sets of metrics, {sorted(metrics)}")


# ------------------------------------------------------------------------------------------------- CSV


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Header, and rows with their line numbers."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if not header:
            raise ValueError(f"{path}: is empty, and a header line was wanted")
        if twice := sorted({c for c in header if header.count(c) > 1}):
            raise ValueError(f"{path}: the header names {', '.join(map(repr, twice))} twice")
        rows = []
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: has {len(values)} fields, the header {len(header)}")
            rows.append((reader.line_num, dict(zip(header, values, strict=True))))
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
        ValueError: an unknown column on either side, or a cell that is no such value: file, line and column are named.
        FileNotFoundError: no such file.
    """
    path, constants = Path(path), dict(constants or {})
    header, lines = _read_csv(path)
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
    rows = []
    for line, cells in lines:
        row: dict[str, Any] = dict.fromkeys(TABLE_COLUMNS)
        row |= {"method": "grpo", "kind": "base", "mode": "sample", "eval_set": "eval", "in_domain": True}
        row |= constants
        for ours, theirs in columns.items():
            row[ours] = _cell(ours, cells[theirs], f"{path}:{line}: column {theirs!r}")
        for name in ("size", "step"):
            if row[name] is None:
                raise ValueError(f"{path}:{line}: column {columns.get(name, name)!r}: {name} must not be empty")
        where = f"{path}:{line}: column {columns.get('pass1', columns.get('loss', 'pass1'))!r}"
        if row["pass1"] is None and row["loss"] is None:
            continue  # a line of a step that was not evaluated
        if row["pass1"] is None:
            row["pass1"] = 1.0 - _share(row["loss"], where)
        elif row["loss"] is None:
            row["loss"] = 1.0 - _share(row["pass1"], where)
        elif abs(row["pass1"] + row["loss"] - 1.0) > 1e-6:
            raise ValueError(f"{where}: pass1 {row['pass1']:g} and loss {row['loss']:g} must add up to 1")
        if row["prompts_seen"] is None and prompts_per_step is not None:
            row["prompts_seen"] = prompts_per_step * row["step"]
        if row["compute_6nt"] is None and row["trained_tokens"] is not None and row["params_non_embedding"] is not None:
            row["compute_6nt"] = 6.0 * row["params_non_embedding"] * row["trained_tokens"]
        if row["run_id"] is None:
            row["run_id"] = f"{path.stem}-{row['size']}-{row['kind']}" + ("" if row["seed"] is None else f"-{row['seed']}")
        row["cell"] = row["cell"] or row["run_id"]
        rows.append(row)
    return _table(rows, str(path))


def _cell(column: str, text: str, where: str) -> Any:
    text = text.strip()
    if text == "":
        return None
    if column in _INTEGERS:
        return _whole(text, where)
    if column in _FLOATS:
        return _number(text, where)
    if column == "in_domain":
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{where}: must be true or false, got {text!r}")
        return text.lower() in ("true", "1")
    return text


# ------------------------------------------------------------------------------------------------- TRL


def read_trl(
    path: str | os.PathLike[str],
    *,
    run: RunInfo,
    metrics: Mapping[str, Metric] | None = None,
    out_of_domain: Sequence[str] = (),
) -> pyarrow.Table:
    """Reads the log of a TRL (or other transformers) trainer.

    Tokens are TRL's running count `num_tokens` (prompt and completion tokens, padding excluded) at the last training
    line at or before the evaluation.

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
        ValueError: not such a file, no evaluation, several reward keys and no `metrics`, or a value that is no pass
            rate; the message names file, entry and key.
        FileNotFoundError: nothing there.
    """
    path = Path(path)
    if path.is_dir():
        found = [*path.glob("trainer_state.json"), *path.glob("checkpoint-*/trainer_state.json")]
        if not found:
            raise FileNotFoundError(f"{path}: no trainer_state.json in it or in its checkpoints")
        path = max(found, key=lambda p: len(_log_history(p)))
    entries = _log_history(path)
    if metrics is None:
        keys = sorted({k for e in entries for k in e if re.fullmatch(r"eval_rewards/.+/mean", k)})
        if len(keys) != 1:
            raise ValueError(f"{path}: metrics must be named; of eval_rewards/*/mean the log has {len(keys)}: {keys}")
        metrics = {keys[0].split("/", 1)[1].removesuffix("/mean"): keys[0]}
    _outside(_named(metrics), out_of_domain)
    tokens, rows = None, []
    seen: set[tuple[str, int]] = set()
    for i, entry in enumerate(entries):
        where = f"{path}: log_history[{i}]"
        if "step" not in entry:
            raise ValueError(f"{where}: no step")
        step = _whole(entry["step"], f"{where}, step")
        if entry.get("num_tokens") is not None:
            tokens = round(_number(entry["num_tokens"], f"{where}, num_tokens"))
        for eval_set, metric in metrics.items():
            value = _metric(entry, metric, where)
            if value is None:
                continue
            if (eval_set, step) in seen:
                raise ValueError(f"{where}: {eval_set} was evaluated at step {step} before")
            seen.add((eval_set, step))
            rows.append(
                _row(run, run_id=path.parent.name if path.name == "trainer_state.json" else path.stem, step=step,
                     eval_set=eval_set, in_domain=eval_set not in out_of_domain, pass1=value,
                     tokens=0 if step == 0 else tokens)
            )  # fmt: skip
    return _table(rows, f"{path} ({', '.join(str(m) for m in metrics.values())})")


def _log_history(path: Path) -> list[dict[str, Any]]:
    try:
        obj = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    entries = obj.get("log_history") if isinstance(obj, dict) else obj
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ValueError(f"{path}: must hold an object with a list log_history, or such a list")
    return entries


# ------------------------------------------------------------------------------------------------ verl

_VERL_TOKENS = "perf/total_num_tokens"
_CONSOLE = re.compile(r"(?:^|\s)step:(\d+) - (.*)$")
_VALUE = re.compile(r"^(?:np\.\w+\()?([-+0-9.eE]+|nan|inf|-inf)\)?$")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def read_verl(
    path: str | os.PathLike[str],
    *,
    run: RunInfo,
    metrics: Mapping[str, Metric] | None = None,
    out_of_domain: Sequence[str] = (),
) -> pyarrow.Table:
    """Reads the metrics of a verl run.

    Both of verl's own forms are read, a line at a time: the file logger's {"step": 1, "data": {...}} and the console's
    `step:1 - critic/score/mean:0.31 - ...`, whatever else the captured output holds. A step that is there twice (a run
    that was resumed from a checkpoint) counts as it was the last time. Tokens are the running sum of
    `perf/total_num_tokens` (attention mask of prompts and responses of the whole batch); from a step that is missing
    on they are null, because a sum with a hole is no sum.

    Args:
        path: the file.
        run: what the log does not say; prompts_per_step is data.train_batch_size.
        metrics: evaluation set -> key, or several keys with weights ({"val/test_score/a": 335, ...}). None takes every
            `val-core/<set>/<reward or acc>/mean@n`, or every `val/test_score/<set>` of older versions.
        out_of_domain: which of the sets are out of domain.

    Returns:
        The table.

    Raises:
        ValueError: no metrics in the file, a line cut short, or a value that is no pass rate; file, line and key are
            named.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    steps: dict[int, tuple[int, dict[str, Any]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        parsed = _verl_line(_ANSI.sub("", line).strip(), f"{path}:{number}")
        if parsed is None:
            continue
        step, data = parsed
        for later in [s for s in steps if s > step]:  # resumed from a checkpoint: what followed is run again
            del steps[later]
        if step in steps and not (set(data) & set(steps[step][1])):
            data = steps[step][1] | data  # validation and training of one step may be logged apart
        steps[step] = (number, data)
    if not steps:
        raise ValueError(f"{path}: holds no line of verl's file logger or console logger")
    if metrics is None:
        metrics = _verl_metrics(steps, path)
    _outside(_named(metrics), out_of_domain)
    rows, tokens, expected = [], 0, 1
    for step in sorted(steps):
        number, data = steps[step]
        where = f"{path}:{number}"
        if step > 0:
            count = data.get(_VERL_TOKENS)
            if tokens is not None and step == expected and count is not None:
                tokens += round(_number(count, f"{where}, {_VERL_TOKENS}"))
            else:
                tokens = None
            expected = step + 1
        for eval_set, metric in metrics.items():
            value = _metric(data, metric, where)
            if value is not None:
                rows.append(
                    _row(run, run_id=path.stem, step=step, eval_set=eval_set, in_domain=eval_set not in out_of_domain,
                         pass1=value, tokens=tokens)
                )  # fmt: skip
    return _table(rows, f"{path} ({', '.join(str(m) for m in metrics.values())})")


def _verl_line(line: str, where: str) -> tuple[int, dict[str, Any]] | None:
    if line.startswith("{"):
        try:
            obj = json.loads(line)
        except ValueError as error:
            if '"step"' not in line:
                return None  # a dict that something else printed
            raise ValueError(f"{where}: not JSON ({error}): {line[:60]!r}") from None
        if not isinstance(obj, dict) or "step" not in obj or not isinstance(obj.get("data"), dict):
            return None
        return _whole(obj["step"], f"{where}, step"), obj["data"]
    match = _CONSOLE.search(line)
    if match is None:
        return None
    data = {}
    for part in match[2].split(" - "):
        key, _, text = part.rpartition(":")
        value = _VALUE.match(text.strip())
        if key and value:
            data[key.strip()] = value[1]
    return (int(match[1]), data) if data else None


def _verl_metrics(steps: Mapping[int, tuple[int, dict[str, Any]]], path: Path) -> dict[str, Metric]:
    keys = sorted({k for _, data in steps.values() for k in data})
    for pattern in (r"val-core/(?P<set>.+)/(?:reward|acc)/mean@\d+", r"val/test_score/(?P<set>.+)"):
        found: dict[str, list[str]] = {}
        for key in keys:
            if match := re.fullmatch(pattern, key):
                found.setdefault(match["set"], []).append(key)
        if several := {s: k for s, k in found.items() if len(k) > 1}:
            raise ValueError(f"{path}: metrics must be named, as a set has several keys: {several}")
        if found:
            return {s: k[0] for s, k in found.items()}
    raise ValueError(f"{path}: metrics must be named, as no key is val-core/*/mean@n or val/test_score/*")


# ----------------------------------------------------------------------------------------------- wandb


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
        ValueError: a column or run that is not there, or a cell that is no such value; file, line and column are named.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    _outside(_named(metrics), out_of_domain)
    header, lines = _read_csv(path)
    if step is None:
        step = next((c for c in ("_step", "Step", "step") if c in header), None)
        if step is None:
            raise ValueError(f"{path}: no column '_step' or 'Step'; name the step column of {', '.join(header)}")
    by_run = {None: runs} if isinstance(runs, RunInfo) else dict(runs)
    rows = []
    for name, info in by_run.items():
        prefix = "" if name is None else f"{name} - "
        wanted = [k for m in metrics.values() for k in ([m] if isinstance(m, str) else m)]
        for column in [step, *(prefix + k for k in wanted), *([prefix + tokens] if tokens else [])]:
            if column not in header:
                raise ValueError(f"{path}: no column {column!r}; there are {', '.join(header)}")
        count: int | None = None
        for line, cells in lines:
            where = f"{path}:{line}"
            data = {k: cells[prefix + k].strip() or None for k in wanted}
            data = {k: None if v == "NaN" else v for k, v in data.items()}  # how pandas writes "not logged"
            if tokens and cells[prefix + tokens].strip() not in ("", "NaN"):
                count = round(_number(cells[prefix + tokens], f"{where}: column {prefix + tokens!r}"))
            for eval_set, metric in metrics.items():
                value = _metric(data, metric, where)
                if value is None:
                    continue
                at = _whole(cells[step], f"{where}: column {step!r}")
                rows.append(
                    _row(info, run_id=name or path.stem, step=at, eval_set=eval_set,
                         in_domain=eval_set not in out_of_domain, pass1=value,
                         tokens=0 if at == 0 and tokens else count)
                )  # fmt: skip
    return _table(rows, str(path))


# ------------------------------------------------------------------------------------------- digitised


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
    header, lines = _read_csv(path)
    for name in ("source", "N_B", "step", "D", column):
        if name not in header:
            raise ValueError(f"{path}: no column {name!r}; there are {', '.join(header)}")
    rows = []
    for line, cells in lines:
        where = f"{path}:{line}: column"
        billions = _number(cells["N_B"], f"{where} 'N_B'")
        loss = _share(_number(cells[column], f"{where} {column!r}"), f"{where} {column!r}")
        size = f"{billions:g}B"
        name = f"{cells['source']}-{size}"
        info = RunInfo(size=size, kind=cells["source"], params_nominal=1e9 * billions, run_id=name)
        row = _row(info, run_id="", step=_whole(cells["step"], f"{where} 'step'"), eval_set="holdout", in_domain=True,
                   pass1=1.0 - loss, tokens=None)  # fmt: skip
        seen = _whole(cells["D"], f"{where} 'D'")
        rows.append(row | {"loss": loss, "prompts_seen": seen, "unique_prompts": seen})
    return _table(rows, str(path))


# ------------------------------------------------------------------------------------------ into a study

FORMATS = ("csv", "verl", "trl", "wandb")


def import_logs(
    out: str | os.PathLike[str],
    log_format: str,
    paths: Sequence[str | os.PathLike[str]],
    *,
    run: RunInfo,
    metrics: Mapping[str, Metric] | None = None,
    out_of_domain: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    step: str | None = None,
    tokens: str | None = None,
) -> pyarrow.Table:
    """Adds the evaluations in some logs to the table of a folder, for `study fit` and `study report`.

    A study is imported in several calls where its sizes have logs of their own, as each call tells the size of what it
    reads. A run that is there already is replaced.

    Args:
        out: folder; made when absent, and no study that was run here.
        log_format: one of `FORMATS`.
        paths: logs of runs that `run` describes; each is a run, named by its file (see the readers).
        run: what the logs do not say. For csv it gives the columns that are not in the file.
        metrics, out_of_domain: see the readers; for csv the columns of the sets' pass rates.
        columns: csv only: column of our table -> column of the file.
        step, tokens: wandb only; see `read_wandb_csv`.

    Returns:
        The whole table of the folder, `runs.parquet`.

    Raises:
        ValueError: an unknown format, an argument that is not the format's, two logs of one name, a folder with a
            study of its own, or what the reader raises.
        FileNotFoundError: no such log.
    """
    import pyarrow as pa

    if log_format not in FORMATS:
        raise ValueError(f"log_format must be one of {', '.join(FORMATS)}, got {log_format!r}")
    for name, given, owner in (("columns", columns, "csv"), ("step", step, "wandb"), ("tokens", tokens, "wandb")):
        if given and log_format != owner:
            raise ValueError(f"{name}: only {owner} logs have it, got {given!r} for {log_format}")
    folder = Path(out)
    if (folder / STUDY_FILE).exists():
        raise ValueError(f"{folder}: holds a study that was run here; import into a folder of its own")
    found = []
    for path in paths:
        if log_format == "csv":
            found.append(_csv_of_run(path, run, columns or {}, metrics, out_of_domain))
        elif log_format == "wandb":
            if not metrics:
                raise ValueError("metrics: must be named for wandb logs")
            found.append(read_wandb_csv(path, runs=run, metrics=metrics, step=step, tokens=tokens,
                                        out_of_domain=out_of_domain))  # fmt: skip
        else:
            read = read_verl if log_format == "verl" else read_trl
            found.append(read(path, run=run, metrics=metrics, out_of_domain=out_of_domain))
    names = [set(t.column("run_id").to_pylist()) for t in found]
    if twice := sorted(n for i, a in enumerate(names) for n in a if any(n in b for b in names[:i])):
        raise ValueError(f"two logs are called {', '.join(twice)}: import them one by one with run_id")
    known = read_table(folder)
    if known is not None:
        new = set().union(*names)
        keep = [r not in new for r in known.column("run_id").to_pylist()]
        found.insert(0, known.filter(pa.array(keep, type=pa.bool_())))
    table = pa.concat_tables(found)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder, table)
    return table


def _csv_of_run(
    path: str | os.PathLike[str], run: RunInfo, columns: Mapping[str, str], metrics: Mapping[str, Metric] | None,
    out_of_domain: Sequence[str],
) -> pyarrow.Table:  # fmt: skip
    about = {
        "size": run.size, "kind": run.kind, "method": run.method, "mode": run.mode, "run_id": run.run_id or Path(path).stem,
        "params_non_embedding": run.params_non_embedding, "params_nominal": run.params_nominal, "seed": run.seed,
        "group_size": run.group_size, "temperature": run.temperature, "num_problems": run.num_problems,
        "num_samples": run.num_samples, "study": run.study,
    }  # fmt: skip
    sets: list[tuple[dict[str, str], dict[str, Any]]] = [(dict(columns), {})]
    if metrics:
        _outside(metrics, out_of_domain)
        sets = [
            ({**columns, "pass1": str(key)}, {"eval_set": name, "in_domain": name not in out_of_domain})
            for name, key in metrics.items()
        ]
    rows = []
    for theirs, of_set in sets:
        constants = {k: v for k, v in (about | of_set).items() if v is not None and k not in theirs}
        per_step = None if "prompts_seen" in theirs else run.prompts_per_step
        rows += read_csv(path, columns=theirs, constants=constants, prompts_per_step=per_step).to_pylist()
    for r in rows:
        if run.dataset_prompts is not None and r["unique_prompts"] is None and r["prompts_seen"] is not None:
            r["unique_prompts"] = min(r["prompts_seen"], run.dataset_prompts)
    return _table(rows, str(path))


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
