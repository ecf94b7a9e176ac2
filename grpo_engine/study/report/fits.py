"""The laws of a study, from its records to fits.json, and what they recommend."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_engine.study.data import StudyData, load_data, params_of
from grpo_engine.study.design import STUDY_FILE, estimate_of, load_study, plan
from grpo_engine.study.forecast import PlannedRun
from grpo_engine.study.importers import write_table
from grpo_engine.study.laws.curves import AXES, Curve, curves_by, select_curves
from grpo_engine.study.laws.fit import fit_table
from grpo_engine.study.laws.forms import AdditiveLaw, LossDecomposition
from grpo_engine.study.laws.holdout import other_set
from grpo_engine.study.laws.law_fit import fit_reuse, fit_surface
from grpo_engine.study.laws.results import AxisFit, Estimate, Fits, HeldOut, LawFit, read_fits, write_fits
from grpo_engine.study.recommend import FrontierPoint, Recommendation, frontier, recommend
from grpo_engine.study.report.drawing import tick_text

if TYPE_CHECKING:
    import pyarrow

FITS_FILE = "fits.json"
AXIS_NAMES = {"compute": "6NT", "ledger": "ledger", "data": "prompts"}


def fit_study(study_dir: str | os.PathLike[str], *, n_boot: int = 200) -> Fits:
    """Fits the laws of a study from its records; writes runs.parquet and fits.json.

    Args:
        study_dir: the study's folder.
        n_boot: bootstrap draws behind each interval.

    Returns:
        The fits: against compute (6NT) and data for each kind and for all kinds together, and against the compute of
        all phases for each kind.

    Raises:
        FileNotFoundError, ValueError: see `load_data`.
    """
    return fit_data(load_data(study_dir), Path(study_dir), n_boot)


def plain_table(data: StudyData) -> pyarrow.Table:
    """The rows that laws are fitted to: those of the plain runs, without each problem's counts."""
    import pyarrow as pa

    plain = {r.header["run_id"] for n, r in data.runs.items() if not data.cells[n].variant}
    mask = [r in plain for r in data.table.column("run_id").to_pylist()]
    return data.table.drop_columns("right").filter(pa.array(mask, type=pa.bool_()))


def fit_data(data: StudyData, folder: Path, n_boot: int) -> Fits:
    """The fits of `fit_study`, of data that were read already."""
    if data.plan is not None:
        write_table(folder, data.table)
    table = plain_table(data)
    kinds = [*data.kinds, "all"] if len(data.kinds) > 1 else data.kinds
    chosen = {"eval_set": data.headline, "group_size": data.group_size, "n_boot": n_boot, "params": params_of(table)}
    axes = [a for a in ("compute", "data", "ledger") if _known(table, AXES[a])]
    if not axes:
        raise ValueError(f"{folder}: neither compute nor prompts seen are known of any run, so there is no law to fit")
    fits = fit_table(table, axes=[a for a in axes if a != "ledger"], kinds=kinds, **chosen)
    if "ledger" in axes:
        ledger = fit_table(table, axes=("ledger",), kinds=data.kinds, shapes=False, **chosen)
        fits = replace(fits, fits=(*fits.fits, *ledger.fits))
    write_fits(folder / FITS_FILE, fits)
    return fits


def _known(table: pyarrow.Table, column: str) -> bool:
    return table.column(column).null_count < table.num_rows


def axes_of(fits: Fits) -> list[str]:
    """Of compute and data, what the laws were fitted against."""
    return [a for a in ("compute", "data") if any(f.axis == a for f in fits.fits)]


def intercepts_of(fit: AxisFit) -> tuple[dict[str, Estimate], float]:
    """The intercepts of a joint law: the log of the loss of each curve at one X, and that X.

    Args:
        fit: one with a joint law.

    Returns:
        Label to intercept with its interval, and X: the geometric mean of the curves' centers, as `fit_intercepts` takes it.
    """
    joint = fit.joint
    x = fit.intercepts[0].x if fit.intercepts else math.exp(sum(c.log_x_mean for c in joint.curves) / len(joint.curves))
    out = {}
    for c in joint.curves:
        drawn = np.log(joint.loss_draws(c.label, x))
        out[c.label] = Estimate.of(c.E.value - c.k.value * math.log(x), drawn)
    return out, x


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseFit:
    """What a repeated prompt is worth to one size of one kind."""

    size: str
    kind: str
    curves: dict[int, Curve]  # by tau
    law: LawFit


@dataclass(frozen=True, kw_only=True, slots=True)
class Laws:
    """All that a report shows of the laws: fits.json, and what is made from it and from the table."""

    fits: Fits
    curves: dict[tuple[str, str], list[Curve]]  # (axis, kind) -> that the fit is of
    surfaces: dict[str, list[LawFit]]  # kind -> laws of N and D
    reuse: list[ReuseFit]
    other_sets: dict[str, list[HeldOut]]  # kind -> predictions of one test set from the others
    picks: list[tuple[str, str, Recommendation]]  # (kind, budget in words, what it says), budgets rising
    frontiers: dict[str, tuple[FrontierPoint, ...]]  # kind -> N*(C)


def study_laws(data: StudyData, fits: Fits) -> Laws:
    """Fits what fits.json does not hold: surfaces, reuse, predictions across test sets, the frontier."""
    table, curves, surfaces, others = plain_table(data), {}, {}, {}
    shared = {"group_size": data.group_size, "params": params_of(table)}
    for f in fits.fits:
        if f.axis in axes_of(fits) and f.kind in data.kinds:
            chosen = dataclasses.asdict(f.selection)
            curves[f.axis, f.kind] = select_curves(table, axis=f.axis, kind=f.kind, **chosen)[0]
    for kind in data.kinds if "data" in axes_of(fits) else ():
        mine = curves["data", kind]
        points = sum(len(c.x) for c in mine)
        if len({c.params for c in mine}) > 2:
            surfaces[kind] = [
                fit_surface(mine, form) for form in (AdditiveLaw, LossDecomposition)
                if points > sum(len(mine) if q in form.PER_CURVE else 1 for q in form.PARAMETERS)
            ]  # fmt: skip
        by_set = curves_by(table, "eval_set", axis="data", kind=kind, **shared)
        others[kind] = [h for name in by_set for h in other_set(by_set, name)]
    frontiers = {
        f.kind: frontier(f, count=25) for f in fits.fits if f.axis == "compute" and f.kind in data.kinds and f.joint
    }
    return Laws(fits=fits, curves=curves, surfaces=surfaces, reuse=_reuse(data, table, shared["params"]), other_sets=others,
                picks=budget_picks(data, fits), frontiers=frontiers)  # fmt: skip


def _reuse(data: StudyData, table: pyarrow.Table, params: str) -> list[ReuseFit]:
    out = []
    for kind in data.kinds:
        for size in data.sizes:
            runs = [r for same in data.ablation(size, kind, "tau").values() for r in same]
            if not runs:
                continue
            ids = [r.header["run_id"] for r in runs]
            mine = table.filter([i in ids for i in table.column("run_id").to_pylist()])
            found = curves_by(mine, "tau", size=size, axis="data", kind=kind, eval_set=data.headline, params=params)
            curves = {tau: c[0] for tau, c in found.items()}
            if len(curves) > 1 and all(c.unique is not None for c in curves.values()):
                law = fit_reuse(list(curves.values()))
                out.append(ReuseFit(size=size, kind=kind, curves=curves, law=law))
    return out


def budget_picks(data: StudyData, fits: Fits) -> list[tuple[str, str, Recommendation]]:
    """(kind, budget in words, recommendation) for the budgets that the runs ended with, rising."""
    out = []
    for kind in data.kinds:
        for axis in axes_of(fits):
            fit, unit = fits.get(axis, kind), {"compute": "FLOPs", "data": "prompts"}[axis]
            if fit.joint is None:
                continue
            for amount in sorted({round_to(s.x_max, 2) for s in fit.sizes}):
                budget = {"compute" if axis == "compute" else "prompts": amount}
                out.append((kind, f"{tick_text(amount)} {unit}", recommend(fit, **budget)))
    return out


def recommendations(
    study_dir: str | os.PathLike[str], *, kind: str | None = None, **options: Any
) -> dict[str, Recommendation]:
    """What `recommend` says, from the records of a study.

    Args:
        study_dir: the study's folder; its laws are fitted where fits.json is missing.
        kind: "base" or "instruct"; None: each that was fitted.
        options: keywords of `recommend`. The time of a run is that of the study's plan.

    Returns:
        Kind to recommendation: along data for a budget of prompts, else along compute, or what there is.

    Raises:
        FileNotFoundError, ValueError: see `load_data` and `recommend`; no law of this kind.
    """
    folder = Path(study_dir)
    fits = read_fits(folder / FITS_FILE) if (folder / FITS_FILE).is_file() else fit_study(folder)
    kinds = [k for k in dict.fromkeys(f.kind for f in fits.fits) if k in ((kind,) if kind else ("base", "instruct"))]
    if not kinds:
        raise ValueError(f"{folder}: no law was fitted to {kind or 'any'} models")
    first = "data" if "prompts" in options else "compute"
    axis = first if first in axes_of(fits) else axes_of(fits)[0]
    chosen = {k: fits.get(axis, k) for k in kinds}
    return {k: recommend(fit, **{"runs": planned_runs(folder, fit), **options}) for k, fit in chosen.items()}


def planned_runs(folder: Path, fit: AxisFit) -> dict[str, PlannedRun]:
    """The runs that a law was fitted to, as they were planned; none where the logs were imported.

    Args:
        folder: of the study.
        fit: of one kind.

    Returns:
        Size to its run: `runs` of `recommend`.
    """
    if not (folder / STUDY_FILE).is_file():
        return {}
    study = load_study(folder / STUDY_FILE)
    wanted = ("grpo", fit.kind, "", fit.selection.tau)
    return {
        c.size: PlannedRun(config=c.config, estimate=estimate_of(study, c.size, c.kind))
        for c in plan(study).cells
        if (c.method, c.kind, c.variant, c.tau) == wanted and fit.selection.group_size in (None, c.group_size)
    }


def round_to(value: float, digits: int) -> float:
    """A number with so many significant digits.

    Args:
        value: any finite number.
        digits: at least 1.

    Returns:
        The nearest such number.
    """
    return float(f"{value:.{digits - 1}e}")
