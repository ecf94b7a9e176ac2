"""A plan as people read it: rows, JSON, tables of the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo_engine.config import ModelSource
from grpo_engine.records.records import PHASES
from grpo_engine.study.design import Plan
from grpo_engine.study.forecast import Cost, dollars, num_params
from grpo_engine.study.gpus import GPUS
from grpo_engine.system.machine import num_cores

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """The plan as rows for a table or for JSON: models first, then cells.

    Args:
        plan: the plan.

    Returns:
        One dict a row: id, name, axes, method, size, kind, seed, tau, group_size, variant, steps, overrides, and the
        cost: params (N), trained_tokens, compute_6nt, compute_6nt_nominal (with the size that the name says, as the
        paper counts; null where none is given), flops, phases, memory, peak_bytes, devices, seconds (of one device),
        usd, measured.
    """
    rows = []
    for need, cost in plan.models:
        source = ModelSource(size=need.size, kind=need.kind)
        about = {"name": f"model {need.name}", "method": "prepare", "size": need.size, "kind": need.kind, "seed": need.seed}
        rows.append(_BLANK | about | _cost_row(source, cost))
    for cell in plan.cells:
        about = {
            "id": cell.id, "name": cell.name, "axes": list(cell.axes), "method": cell.method, "size": cell.size,
            "kind": cell.kind, "seed": cell.seed, "tau": cell.tau, "group_size": cell.group_size,
            "variant": cell.variant, "steps": cell.config.steps, "overrides": list(cell.overrides),
        }  # fmt: skip
        rows.append(about | _cost_row(cell.config.model, cell.cost))
    return rows


_BLANK: dict[str, Any] = {"id": None, "axes": [], "seed": None, "tau": None, "group_size": None, "variant": "",
                          "steps": None, "overrides": []}  # fmt: skip


def _cost_row(source: ModelSource, cost: Cost) -> dict[str, Any]:
    params, nominal = num_params(source), source.params_nominal
    return {
        "params": params,
        "trained_tokens": cost.trained_tokens,
        "compute_6nt": 6.0 * params * cost.trained_tokens,
        "compute_6nt_nominal": None if nominal is None else 6.0 * nominal * cost.trained_tokens,
        "flops": cost.flops,
        "phases": dict(cost.phases),
        "memory": dict(cost.memory),
        "peak_bytes": cost.peak_bytes,
        "devices": cost.devices,
        "seconds": cost.seconds,
        "usd": cost.usd,
        "measured": cost.measured,
    }


def plan_json(plan: Plan) -> dict[str, Any]:
    """What `plan.json` holds: the study's name, every row of `plan_rows`, and totals.

    Args:
        plan: the plan.

    Returns:
        A JSON-like dict.
    """
    rows = plan_rows(plan)
    total = {k: sum(r[k] for r in rows) for k in ("trained_tokens", "flops", "seconds")}
    return {
        "study": plan.study.name,
        "device": plan.study.estimate.gpu or "cpu",
        "cells": [r for r in rows if r["method"] != "prepare"],
        "models": [r for r in rows if r["method"] == "prepare"],
        "total": total | {"usd": dollars(total["seconds"], plan.study.estimate)},
    }


def plan_view(plan: Plan, *, jobs: int | None = None) -> Group:
    """The plan for a terminal: every cell, FLOPs by phase and memory of each size, and what all of it costs.

    Args:
        plan: the plan.
        jobs: processes side by side on the CPU, for the wall-clock time; None: one a core.

    Returns:
        Tables 100 columns wide, and a line below them; times that are estimates carry a "~".
    """
    from rich.console import Group
    from rich.text import Text

    rows = plan_rows(plan)
    return Group(_cell_table(plan, rows), Text(), _phase_table(rows), Text(), _memory_table(plan, rows), Text(),
                 Text(_total(plan, jobs or num_cores())))  # fmt: skip


def _table(title: str, text: Sequence[str], numbers: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in text:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cell_table(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> Table:
    gpu, priced = plan.study.estimate.gpu, plan.study.estimate.usd_per_hour is not None
    nominal = any(r["compute_6nt_nominal"] for r in rows)
    table = _table(
        f"study {plan.study.name}", ["cell"],
        ["N", "steps", "tokens", "6NT", *(["nominal 6NT"] if nominal else []), "all FLOPs",
         *([f"{gpu}s", "hours each"] if gpu else ["time"]), *(["USD"] if priced else [])],
    )  # fmt: skip
    for r in rows:
        seconds = r["seconds"] / r["devices"]
        guess = "" if r["measured"] else "~"
        table.add_row(
            r["name"], human(r["params"]), "" if r["steps"] is None else str(r["steps"]), human(r["trained_tokens"]),
            f"{r['compute_6nt']:.2e}", *([f"{r['compute_6nt_nominal'] or 0:.2e}"] if nominal else []),
            f"{r['flops']:.2e}", *([str(r["devices"]), f"{guess}{seconds / 3600:.1f}"] if gpu else []),
            *([] if gpu else [guess + duration(seconds)]), *([f"{r['usd'] or 0:,.0f}"] if priced else []),
        )  # fmt: skip
    return table


def _phase_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = [n for n in PHASES if any(r["phases"].get(n) for r in rows)]
    table = _table("FLOPs by phase, all cells and models of a size", ["size", "kind"], [*names, "all"])
    groups = dict.fromkeys((r["size"], r["kind"]) for r in rows)
    for size, kind in groups:
        mine = [r for r in rows if (r["size"], r["kind"]) == (size, kind)]
        sums = [sum(r["phases"].get(n, 0.0) for r in mine) for n in names]
        table.add_row(size, kind, *(f"{v:.1e}" for v in sums), f"{sum(r['flops'] for r in mine):.1e}")
    return table


def _memory_table(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The cell of each size that needs the most."""
    gpu = plan.study.estimate.gpu
    parts = list(dict.fromkeys(n for r in rows for n in r["memory"]))
    table = _table("Memory of a run", ["size"], [*parts, "at most", *([f"{gpu}s"] if gpu else [])])
    for size in plan.study.sizes:
        mine = [r for r in rows if r["size"] == size and r["memory"]]
        if mine:
            r = max(mine, key=lambda r: r["peak_bytes"])
            values = [*(r["memory"].get(n, 0.0) for n in parts), r["peak_bytes"]]
            table.add_row(size, *(f"{human(v)}B" for v in values), *([str(r["devices"])] if gpu else []))
    return table


def _total(plan: Plan, jobs: int) -> str:
    total, estimate = plan_json(plan)["total"], plan.study.estimate
    made = f" and {len(plan.models)} models to prepare" if plan.models else ""
    text = f"{len(plan.cells)} cells{made}: {human(total['trained_tokens'])} tokens, {total['flops']:.2e} FLOPs, "
    if estimate.gpu:
        facts = GPUS[estimate.gpu]
        types = dict.fromkeys(c.config.model.dtype for c in plan.cells)
        rates = ", ".join(f"{facts.peak(t):.3g} FLOP/s in {t}" for t in types)
        text += f"about {total['seconds'] / 3600:,.0f} {estimate.gpu} hours"
        basis = (
            f"Assumed: {estimate.flops_fraction:.0%} of {rates}, decoding at no more than {estimate.bandwidth_fraction:.0%} "
            f"of {facts.bandwidth:.3g} bytes/s, nothing lost between GPUs."
        )
        if any(c.cost.devices > 1 for c in plan.cells):
            basis += " A run that needs several GPUs can be planned; running it on them is not built yet."
    else:
        costs = [c.cost.seconds for c in plan.cells] + [c.seconds for _, c in plan.models]
        wall = max(total["seconds"] / jobs, *costs)
        text += f"about {duration(total['seconds'])} of one process, about {duration(wall)} with {jobs} at once"
        basis = f"Assumed: {estimate.flops_per_s:.2g} FLOP/s a process (estimate.flops_per_s)."
    if total["usd"] is not None:
        text += f", {total['usd']:,.0f} USD"
    return f"{text}. {basis}"


def human(number: float) -> str:
    """1234567 as "1.23M": three digits and a suffix.

    Args:
        number: not negative.

    Returns:
        Text of at most seven characters for numbers under 1e18.
    """
    for limit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """75 as "1m15s".

    Args:
        seconds: not negative.

    Returns:
        "0.4s", "42s", "1m15s", "3h02m" or "4.1d".
    """
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    if seconds < 59.5:
        return f"{seconds:.0f}s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}m{rest:02d}s"
    if seconds < 48 * 3600:
        hours, rest = divmod(round(seconds / 60), 60)
        return f"{hours}h{rest:02d}m"
    return f"{seconds / 86400:.1f}d"
