"""What the readers share: the rows of the table, checks of values, and text in the encodings that logs have."""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_engine.records.table import table_schema

if TYPE_CHECKING:
    import pyarrow

Metric = str | Mapping[str, float]  # a key of the log, or several with weights: {"val/a": 335, "val/b": 165}

# The longer marks come first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OF_A_RUN = ("study", "method", "kind", "size", "params_non_embedding", "params_nominal", "seed", "group_size")
_COUNTS = ("prompts_seen", "unique_prompts", "trained_tokens", "compute_6nt", "compute_ledger")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What a foreign log does not say about its run. None stays null in the table."""

    size: str | None  # label, "7B"; None only where a column of a CSV file has it
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


def row_of(info: RunInfo, *, run_id: str, step: int, eval_set: str, in_domain: bool, pass1: float,
           tokens: int | None) -> dict[str, Any]:  # fmt: skip
    """One row of the table; compute is 6 N T of non-embedding parameters, null when either is unknown."""
    n = info.params_non_embedding
    return {
        "study": info.study, "cell": info.run_id or run_id, "run_id": info.run_id or run_id, "method": info.method,
        "kind": info.kind, "size": info.size, "params_non_embedding": n, "params_nominal": info.params_nominal,
        "seed": info.seed, "group_size": info.group_size, "tau": None, "step": step,
        "prompts_seen": None if info.prompts_per_step is None else info.prompts_per_step * step,
        "unique_prompts": None, "trained_tokens": tokens,
        "compute_6nt": None if n is None or tokens is None else 6.0 * n * tokens, "compute_ledger": None,
        "eval_set": eval_set, "in_domain": in_domain, "mode": info.mode, "temperature": info.temperature,
        "num_problems": info.num_problems, "num_samples": info.num_samples, "pass1": pass1, "loss": 1.0 - pass1,
        "stderr": None,
    }  # fmt: skip


class Rows:
    """The evaluations of a log: each once, the runs of one size each, their counts rising."""

    def __init__(self, dataset_prompts: int | None = None) -> None:
        """Starts empty; dataset_prompts gives unique_prompts where a row has only the prompts that were seen."""
        self._rows: dict[tuple[str, str, str, int], tuple[dict[str, Any], str]] = {}
        self._of_run: dict[str, tuple[dict[str, Any], str]] = {}
        self._dataset_prompts = dataset_prompts

    def add(self, row: dict[str, Any], where: str) -> None:
        """Takes a row; `where` is its file and line.

        Raises:
            ValueError: the run was evaluated on the same set at the same step before, or was of another size.
        """
        run, step = row["run_id"], row["step"]
        key = (run, row["eval_set"], row["mode"], step)
        if key in self._rows:
            raise ValueError(
                f"{where}: step: run {run!r} must have each step once, got {row['eval_set']} at step {step} a second "
                f"time, after {self._rows[key][1]}"
            )
        first, at = self._of_run.setdefault(run, (row, where))
        for name in _OF_A_RUN:
            if row[name] != first[name]:
                raise ValueError(
                    f"{where}: {name}: must be the same in the whole run {run!r}, got {row[name]!r} after {first[name]!r} "
                    f"at {at}"
                )
        if row["unique_prompts"] is None and row["prompts_seen"] is not None:
            seen, most = row["prompts_seen"], self._dataset_prompts
            row["unique_prompts"] = seen if most is None else min(seen, most)
        if row["stderr"] is None and row["num_samples"] == 1 and (row["num_problems"] or 0) > 1:
            row["stderr"] = math.sqrt(row["pass1"] * row["loss"] / (row["num_problems"] - 1))
        self._rows[key] = row, where

    def table(self, what: str) -> pyarrow.Table:
        """The rows in the order that they came in; `what` is the log, for the message that there is none."""
        import pyarrow as pa

        if not self._rows:
            raise ValueError(f"{what}: holds no evaluation")
        ends: dict[str, dict[str, Any]] = {}  # how often prompts were seen is known at the end of a run
        highest: dict[tuple[str, str], tuple[float, int, str]] = {}
        for row, where in sorted(self._rows.values(), key=lambda found: found[0]["step"]):
            run = row["run_id"]
            for name in _COUNTS:
                count = row[name]
                if count is None:
                    continue
                most, step, at = highest.get((run, name), (0, 0, ""))
                if count < most:
                    raise ValueError(
                        f"{where}: {name}: must not fall while a run trains, got {count:g} at step {row['step']} after "
                        f"{most:g} at step {step} ({at})"
                    )
                highest[run, name] = count, row["step"], where
            if row["unique_prompts"] and row["prompts_seen"] is not None:
                ends[run] = row
        rows = [row for row, _ in self._rows.values()]
        for row in rows:
            if row["tau"] is None and (end := ends.get(row["run_id"])):
                row["tau"] = end["prompts_seen"] / end["unique_prompts"]
        return pa.Table.from_pylist(rows, schema=table_schema())


# ------------------------------------------------------------------------------------------------ values


def number(text: Any, where: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: must be a number, got {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"{where}: must be finite, got {text!r}")
    return value


def whole(text: Any, where: str) -> int:
    value = number(text, where)
    if value != int(value):
        raise ValueError(f"{where}: must be a whole number, got {text!r}")
    return int(value)


def step_number(text: Any, where: str) -> int:
    value = whole(text, where)
    if value < 0:
        raise ValueError(f"{where}: must not be negative, got {text!r}")
    return value


def share(value: float, where: str) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{where}: must be a pass rate between 0 and 1, got {value:g}; name a metric that is a mean of 0/1 rewards"
        )
    return value


def metric_of(data: Mapping[str, Any], metric: Metric, where: str) -> float | None:
    """The value of a metric at one step; None when the step did not evaluate it."""
    weights = {metric: 1.0} if isinstance(metric, str) else dict(metric)
    there = [k for k in weights if data.get(k) is not None]
    if not there:
        return None
    if len(there) < len(weights):
        raise ValueError(f"{where}: has {', '.join(there)} but not {', '.join(sorted(set(weights) - set(there)))}")
    if not weights or min(weights.values()) < 0 or not sum(weights.values()) > 0:
        raise ValueError(f"metrics: weights must not be negative and not all 0, got {weights}")
    total = sum(w * share(number(data[k], f"{where}, {k}"), f"{where}, {k}") for k, w in weights.items())
    return total / sum(weights.values())


def keys_of(metrics: Mapping[str, Metric]) -> list[str]:
    """The keys of a log that metrics are made of."""
    return [k for m in metrics.values() for k in ([m] if isinstance(m, str) else m)]


def check_sets(metrics: Mapping[str, Metric], out_of_domain: Sequence[str]) -> None:
    """That there is a set, and that the ones out of domain are among them."""
    if not metrics:
        raise ValueError("metrics must name at least one evaluation set, got none")
    if unknown := sorted(set(out_of_domain) - set(metrics)):
        raise ValueError(f"out_of_domain: {', '.join(unknown)} is not among the sets of metrics, {sorted(metrics)}")


# -------------------------------------------------------------------------------------------------- text


def read_log(path: Path, *, mixed: bool = False) -> str:
    """The text of a log, whatever its byte order mark says; UTF-16 is known by its zeros where it has none.

    Args:
        path: the file.
        mixed: whether bytes that are no UTF-8 are taken as marks of replacement: other programs print into a captured
            console.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, or text in another encoding; the message names file and line.
    """
    if path.is_dir():
        raise ValueError(f"{path}: must be a file, got a folder")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None) or _by_zeros(data[:200])
    try:
        return data.decode(encoding, errors="replace" if mixed else "strict").replace("\ufeff", "")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: must be text in UTF-8, or in UTF-16 with a byte order mark, got byte "
            f"0x{data[error.start]:02x} ({error.reason})"
        ) from None


def _by_zeros(head: bytes) -> str:
    """Text of mostly ASCII characters has a zero in every second byte in UTF-16, and none in UTF-8."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) <= len(head) // 4 or min(even, odd) > 0:
        return "utf-8"
    return "utf-16-be" if even > odd else "utf-16-le"
