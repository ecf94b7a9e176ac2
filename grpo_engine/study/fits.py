"""The one place where the records of a study are fitted and its claims tested: fits.json holds all of it.

Report and recommendation read that file and fit nothing. It holds a digest of the records that it was made from, so that a
report cannot show laws beside records that have gone on since.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_engine.study.claims import study_claims
from grpo_engine.study.data import StudyData, load_data, params_of
from grpo_engine.study.design import STUDY_FILE, estimate_of, load_study, plan
from grpo_engine.study.forecast import PlannedRun
from grpo_engine.study.importers import write_table
from grpo_engine.study.laws.curves import AXES, curves_by, select_curves
from grpo_engine.study.laws.fit import fit_table, fitted_curve
from grpo_engine.study.laws.forms import AdditiveLaw, LossDecomposition
from grpo_engine.study.laws.holdout import other_set
from grpo_engine.study.laws.law_fit import fit_reuse, fit_surface
from grpo_engine.study.laws.results import AxisFit, Fits, ReuseFit, SetPredictions, SurfaceFit, read_fits, write_fits
from grpo_engine.study.recommend import Recommendation, recommend

if TYPE_CHECKING:
    import pyarrow

FITS_FILE = "fits.json"
NO_AXIS = (
    "neither compute nor prompts seen are known of any run, so there is no law to fit: import again with "
    "--prompts-per-step, or with tokens and --params"
)


def fit_study(study_dir: str | os.PathLike[str], *, n_boot: int = 200) -> Fits:
    """Fits the laws of a study and tests its claims, from its records; writes runs.parquet and fits.json.

    Args:
        study_dir: the study's folder.
        n_boot: bootstrap draws behind each interval of a law.

    Returns:
        The fits: against compute (6NT) and data for each kind and for all kinds together, and against the compute of
        all phases for each kind; surfaces over N and data, reuse, predictions across test sets; the claims.

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
    chosen: dict[str, Any] = {
        "eval_set": data.headline, "group_size": data.group_size, "tau": data.tau, "n_boot": n_boot,
        "params": params_of(table),
    }  # fmt: skip
    axes = [a for a in ("compute", "data", "ledger") if _known(table, AXES[a])]
    laws = [a for a in axes if a != "ledger"]
    fits = fit_table(table, axes=laws, kinds=kinds, **chosen) if laws else Fits(objective="linear", fits=())
    if "ledger" in axes:
        ledger = fit_table(table, axes=("ledger",), kinds=data.kinds, shapes=False, **chosen)
        fits = replace(fits, fits=(*fits.fits, *ledger.fits))
    surfaces, others = _over_data(data, table) if "data" in axes else ((), ())
    fits = replace(
        fits, records=records_digest(data), surfaces=surfaces, reuse=_reuse(data, table, chosen["params"]),
        other_sets=others, claims=study_claims(data),
    )  # fmt: skip
    write_fits(folder / FITS_FILE, fits)
    return fits


def records_digest(data: StudyData) -> str:
    """Tells the records that were fitted from others."""
    columns = data.table.to_pydict()
    return hashlib.sha256(repr([(name, columns[name]) for name in sorted(columns)]).encode()).hexdigest()


def fits_of(study_dir: str | os.PathLike[str]) -> Fits:
    """fits.json where it is of the records as they are now; else the study is fitted.

    Args:
        study_dir: the study's folder.

    Returns:
        The fits.

    Raises:
        FileNotFoundError, ValueError: see `load_data` and `read_fits`.
    """
    folder = Path(study_dir)
    data = load_data(folder)
    fits = read_fits(folder / FITS_FILE) if (folder / FITS_FILE).is_file() else None
    return fits if fits is not None and fits.records == records_digest(data) else fit_study(folder)


def _known(table: pyarrow.Table, column: str) -> bool:
    return table.column(column).null_count < table.num_rows


def axes_of(fits: Fits) -> list[str]:
    """Of compute and data, what the laws were fitted against."""
    return [a for a in ("compute", "data") if any(f.axis == a for f in fits.fits)]


def _over_data(data: StudyData, table: pyarrow.Table) -> tuple[tuple[SurfaceFit, ...], tuple[SetPredictions, ...]]:
    """Laws of N and D of each kind, and predictions across test sets."""
    surfaces, others = [], []
    shared: dict[str, Any] = {"group_size": data.group_size, "tau": data.tau, "params": params_of(table)}
    for kind in data.kinds:
        mine = select_curves(table, axis="data", kind=kind, eval_set=data.headline, **shared)[0]
        points = sum(len(c.x) for c in mine)
        if len({c.params for c in mine}) > 2:
            surfaces += [
                SurfaceFit(kind=kind, law=fit_surface(mine, form)) for form in (AdditiveLaw, LossDecomposition)
                if points > sum(len(mine) if q in form.PER_CURVE else 1 for q in form.PARAMETERS)
            ]  # fmt: skip
        by_set = curves_by(table, "eval_set", axis="data", kind=kind, **shared)
        found = tuple(h for name in by_set for h in other_set(by_set, name))
        others.append(SetPredictions(kind=kind, held_out=found))
    return tuple(surfaces), tuple(others)


def _reuse(data: StudyData, table: pyarrow.Table, params: str) -> tuple[ReuseFit, ...]:
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
                points = {str(tau): fitted_curve(c) for tau, c in curves.items()}
                out.append(ReuseFit(size=size, kind=kind, curves=points, law=law))
    return tuple(out)


def recommendations(
    study_dir: str | os.PathLike[str], *, kind: str | None = None, **options: Any
) -> dict[str, Recommendation]:
    """What `recommend` says, from the records of a study.

    Args:
        study_dir: the study's folder; its laws are fitted where fits.json is missing or of other records.
        kind: "base" or "instruct"; None: each that was fitted.
        options: keywords of `recommend`. The time of a run is that of the study's plan.

    Returns:
        Kind to recommendation: along data for a budget of prompts, else along compute, or what there is.

    Raises:
        FileNotFoundError, ValueError: see `load_data` and `recommend`; no law of this kind.
    """
    folder = Path(study_dir)
    fits = fits_of(folder)
    if not axes_of(fits):
        raise ValueError(f"{folder}: {NO_AXIS}")
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
