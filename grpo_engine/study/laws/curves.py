"""From a long table of evaluations to curves: runs averaged for each size and step.

The table is that of `records.runs_table`, or of `importers` for the logs of other frameworks. Step 0 is left out of a
curve, where X = 0 has no logarithm; its loss is kept beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from grpo_engine.records.table import TABLE_COLUMNS

if TYPE_CHECKING:
    import pyarrow

AXES = {  # name of an axis -> column of the table
    "data": "prompts_seen",
    "compute": "compute_6nt",
    "ledger": "compute_ledger",
    "tokens": "trained_tokens",
}
PARAMS = {"non_embedding": "params_non_embedding", "nominal": "params_nominal"}
MIN_POINTS = 4  # of a curve: fewer say nothing about a slope and its scatter


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which rows of the table were used."""

    eval_set: str
    mode: str
    temperature: float | None
    method: str
    group_size: int | None
    tau: float
    params: str  # a key of PARAMS
    min_step: int
    max_step: int | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Curve:
    """The averaged curve of one size of one kind, x rising."""

    label: str
    size: str
    kind: str
    params: float
    step: np.ndarray  # [n] int64
    x: np.ndarray  # [n] float64, positive
    loss: np.ndarray  # [n] float64, mean over runs
    by_run: np.ndarray  # [runs, n] float64, NaN where a run has no such point
    loss_before: float | None  # mean loss at step 0
    compute_per_prompt: float | None
    prompts_per_step: float | None
    answers: np.ndarray | None = None  # [n] float64, answers behind each loss, all runs together; None: not recorded
    unique: np.ndarray | None = None  # [n] float64, different prompts seen, mean over runs; None: not recorded


Row = TypeVar("Row")
Position = tuple[int, float | None]  # step, prompts seen


def points_of(rows: Iterable[Row], position: Callable[[Row], Position]) -> dict[Position, list[Row]]:
    """The evaluations of several runs by the point of their mean curve that they belong to.

    Laws, claims and figures take their points from here. The same step of two runs is the same point, unless their batches
    differ and with them the data. A run that was not evaluated at a step is not part of its point.

    Args:
        rows: evaluations of one test set in one mode.
        position: a row's step and the prompts that its run had seen, None where they are not known.

    Returns:
        (step, prompts seen) to the rows of the runs there, rising.
    """
    points: dict[Position, list[Row]] = {}
    for row in rows:
        points.setdefault(position(row), []).append(row)
    return dict(sorted(points.items(), key=lambda item: (item[0][0], item[0][1] or 0)))


def keep(curves: Iterable[Curve], wanted: Iterable[bool]) -> list[Curve]:
    """The curves that are wanted, in order."""
    return [c for c, w in zip(curves, wanted, strict=True) if w]


def select_curves(
    table: pyarrow.Table,
    *,
    axis: str,
    kind: str = "all",
    eval_set: str | None = None,
    mode: str = "sample",
    temperature: float | None = None,
    method: str = "grpo",
    group_size: int | None = None,
    tau: float = 1.0,
    params: str = "non_embedding",
    min_step: int = 1,
    max_step: int | None = None,
    max_params: float | None = None,
) -> tuple[list[Curve], Selection, list[str]]:
    """Averages the runs of a table for each size and step.

    Args:
        table: with the columns of `records.TABLE_COLUMNS` that are used here.
        axis: what X is, a key of `AXES`.
        kind: the kind of model, or "all": a curve for each kind and size.
        eval_set: None takes the in-domain set with the most rows.
        mode: "sample" or "greedy".
        temperature: None demands that the rows have only one.
        method: "grpo" or "pretrain".
        group_size: answers to a prompt; None takes the group size that the most sizes have, so that an ablation
            at one size does not mix with the main runs.
        tau: how often each prompt is seen; rows are kept when theirs rounds to it. A null counts as 1.
        params: which N, a key of `PARAMS`.
        min_step: first step used, at least 1: log 0 does not exist.
        max_step: last step used; None for all.
        max_params: largest N used; None for all.

    Returns:
        Curves by size (then kind), the selection with its defaults filled in, and sentences on what was left out.

    Raises:
        ValueError: a wrong argument, a missing column, no rows left, N unknown, or several temperatures.
    """
    if axis not in AXES:
        raise ValueError(f"axis must be one of {list(AXES)}, got {axis!r}")
    if params not in PARAMS:
        raise ValueError(f"params must be one of {list(PARAMS)}, got {params!r}")
    if min_step < 1:
        raise ValueError(f"min_step must be at least 1 (X is 0 at step 0), got {min_step}")
    if missing := [c for c in TABLE_COLUMNS if c not in table.column_names]:
        raise ValueError(f"table: no column {', '.join(missing)}")
    rows = [
        r
        for r in table.to_pylist()
        if r["method"] == method
        and r["mode"] == mode
        and (kind == "all" or r["kind"] == kind)
        and round(1.0 if r["tau"] is None else r["tau"]) == round(tau)
    ]
    if eval_set is None:
        names = Counter(r["eval_set"] for r in rows if r["in_domain"])
        if not names:
            raise ValueError(f"eval_set: no in-domain rows of method {method!r}, mode {mode!r}, kind {kind!r}")
        eval_set = min(names, key=lambda n: (-names[n], n))
    rows = [r for r in rows if r["eval_set"] == eval_set]
    if group_size is None:
        sizes_of: dict[int, set[str]] = {}
        for r in rows:
            if r["group_size"] is not None:
                sizes_of.setdefault(r["group_size"], set()).add(r["size"])
        if sizes_of:
            group_size = min(sizes_of, key=lambda g: (-len(sizes_of[g]), g))
    rows = [r for r in rows if r["group_size"] in (group_size, None)]
    if temperature is None:
        found = sorted({r["temperature"] for r in rows if r["temperature"] is not None})
        if len(found) > 1:
            raise ValueError(f"temperature: the rows have {found}; name one")
        temperature = found[0] if found else None
    else:
        rows = [r for r in rows if r["temperature"] == temperature]
    if not rows:
        raise ValueError(
            f"table: no rows with method {method!r}, kind {kind!r}, eval_set {eval_set!r}, mode {mode!r}, tau {tau:g}, "
            f"temperature {temperature}"
        )
    selection = Selection(
        eval_set=eval_set, mode=mode, temperature=temperature, method=method, group_size=group_size, tau=tau,
        params=params, min_step=min_step, max_step=max_step,
    )  # fmt: skip
    several = kind == "all" and len({r["kind"] for r in rows}) > 1
    groups: dict[tuple[float, str, str], list[dict[str, Any]]] = {}
    for r in rows:
        n = r[PARAMS[params]]
        if n is None or not n > 0:
            raise ValueError(
                f"{PARAMS[params]}: run {r['run_id']!r} of size {r['size']!r} has {n!r}; give it, or fit with another "
                f"params ({', '.join(PARAMS)})"
            )
        if max_params is None or n <= max_params:
            groups.setdefault((float(n), r["size"], r["kind"]), []).append(r)
    curves: list[Curve] = []
    left_out: list[str] = []
    for (n, size, one_kind), mine in sorted(groups.items()):
        label = f"{size} {one_kind}" if several else size
        curve = _curve(mine, label, size, one_kind, n, AXES[axis], min_step, max_step, left_out)
        if curve is not None:
            curves.append(curve)
    return curves, selection, left_out


def curves_by(table: pyarrow.Table, column: str, *, size: str | None = None, **selection: Any) -> dict[Any, list[Curve]]:
    """Curves for each value of "tau" or "eval_set": what reuse laws and tests across sets compare.

    Args:
        table: see `select_curves`.
        column: "tau" or "eval_set".
        size: only this one; None takes all.
        selection: further arguments of `select_curves`.

    Returns:
        Curves by value, rising; values without a curve are left out.

    Raises:
        ValueError: another column, or a wrong argument of the selection.
    """
    if column not in ("tau", "eval_set"):
        raise ValueError(f"column must be 'tau' or 'eval_set', got {column!r}")
    method, kind = selection.get("method", "grpo"), selection.get("kind", "all")
    rows = [
        r for r in table.select(["size", "method", "kind", "mode", column]).to_pylist()
        if r["method"] == method and kind in ("all", r["kind"]) and r["mode"] == selection.get("mode", "sample")
        and size in (None, r["size"]) and r[column] is not None
    ]  # fmt: skip
    out = {}
    for value in sorted({round(r[column]) if column == "tau" else r[column] for r in rows}):
        curves, _, _ = select_curves(table, **{**selection, column: value})
        mine = [c for c in curves if size in (None, c.size)]
        if mine:
            out[value] = mine
    return out


def _curve(
    rows: list[dict[str, Any]], label: str, size: str, kind: str, n: float, column: str, min_step: int,
    max_step: int | None, left_out: list[str],
) -> Curve | None:  # fmt: skip
    def finite(v: Any) -> bool:
        return v is not None and math.isfinite(v)

    before = [r["loss"] for r in rows if r["step"] == 0 and finite(r["loss"])]
    rows = [r for r in rows if r["step"] >= min_step and (max_step is None or r["step"] <= max_step)]
    good = [r for r in rows if finite(r["loss"]) and finite(r[column]) and r[column] > 0]
    if len(good) < len(rows):
        bad = len(rows) - len(good)
        left_out.append(f"{label}: {bad} rows whose loss or {column} is null, not finite or not above 0")
    points = points_of(good, lambda r: (r["step"], r["prompts_seen"]))
    means = sorted((float(np.mean([r[column] for r in p])), key) for key, p in points.items())
    if len(means) < MIN_POINTS:
        left_out.append(f"{label}: {len(means)} points, fewer than {MIN_POINTS}")
        return None
    first, last = means[0][0], means[-1][0]
    if last <= first * (1 + 1e-9):  # up to rounding
        left_out.append(f"{label}: {column} is {first:g} at every point, so its slope is not identifiable")
        return None
    keys = [key for _, key in means]
    runs = sorted({str(r["run_id"]) for r in good})
    row_of = {run: i for i, run in enumerate(runs)}
    by_run = np.full((len(runs), len(keys)), np.nan)
    for j, key in enumerate(keys):
        for r in points[key]:
            if not math.isnan(by_run[row_of[str(r["run_id"])], j]):
                raise ValueError(f"run_id {r['run_id']!r} has two rows at step {r['step']} of size {size!r}")
            by_run[row_of[str(r["run_id"])], j] = r["loss"]
    loss = np.nanmean(by_run, axis=0)
    if not np.all(np.isfinite(loss)) or not np.mean(loss) > 0:
        left_out.append(f"{label}: its mean loss is {float(np.mean(loss)):g}, and the law needs one above 0")
        return None
    ends = [r for r in good if r["step"] == max(g["step"] for g in good)]
    per_prompt = [r["compute_6nt"] / r["prompts_seen"] for r in ends if finite(r["compute_6nt"]) and r["prompts_seen"]]
    per_step = [r["prompts_seen"] / r["step"] for r in ends if r["prompts_seen"]]
    answers = [sum((r["num_problems"] or 0) * (r["num_samples"] or 0) for r in points[key]) for key in keys]
    unique = [[r["unique_prompts"] for r in points[key]] for key in keys]
    return Curve(
        label=label, size=size, kind=kind, params=n, step=np.array([k[0] for k in keys]),
        x=np.array([x for x, _ in means]), loss=loss, by_run=by_run,
        loss_before=float(np.mean(before)) if before else None,
        compute_per_prompt=float(np.mean(per_prompt)) if per_prompt else None,
        prompts_per_step=float(np.mean(per_step)) if per_step else None,
        answers=np.array(answers, dtype=np.float64) if all(answers) else None,
        unique=np.array([np.mean(u) for u in unique]) if all(all(u) for u in unique) else None,
    )  # fmt: skip
