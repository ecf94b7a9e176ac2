"""The laws of a study, from its records to fits.json, and what they recommend."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..curves import AXES
from ..drawing import tick_text
from ..fit import fit_table
from ..importers import write_table
from ..recommend import Recommendation, recommend
from ..results import Fits, read_fits, write_fits
from .data import StudyData, load_data, params_of

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


def fit_data(data: StudyData, folder: Path, n_boot: int) -> Fits:
    import pyarrow as pa

    if data.plan is not None:
        write_table(folder, data.table)
    plain = {r.header["run_id"] for n, r in data.runs.items() if not data.cells[n].variant}
    mask = [r in plain for r in data.table.column("run_id").to_pylist()]
    table = data.table.drop_columns("right").filter(pa.array(mask, type=pa.bool_()))
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
    study_dir: str | os.PathLike[str], *, kind: str | None = None, **asked: Any
) -> dict[str, Recommendation]:
    """What `recommend` says, from the records of a study.

    Args:
        study_dir: the study's folder; its laws are fitted where fits.json is missing.
        kind: "base" or "instruct"; None: each that was fitted.
        asked: keywords of `recommend`.

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
    first = "data" if "prompts" in asked else "compute"
    axis = first if first in axes_of(fits) else axes_of(fits)[0]
    return {k: recommend(fits.get(axis, k), **asked) for k in kinds}


def round_to(value: float, digits: int) -> float:
    """A number with so many significant digits.

    Args:
        value: any finite number.
        digits: at least 1.

    Returns:
        The nearest such number.
    """
    return float(f"{value:.{digits - 1}e}")
