"""From the records of a study to a table, fitted laws, figures and one page.

    runs.parquet           every evaluation of every finished cell, one row each
    fits.json              the fitted laws
    report/index.html      the page: self-contained, interactive, no network
    report/figures/*.png, *.pdf

Only records are read, so a report can be remade offline in seconds, and a finished part of a study can be looked at
while the rest runs.

Standard errors. An evaluation records the standard error of pass@1 over its problems. The mean of n runs that
answered the same problems keeps that error (which problems were drawn does not average out) and adds the spread of
the runs over the square root of n; the two are added in quadrature. A difference of two such means is treated as if
they were independent, which is cautious, as both answered the same problems.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import records
from ..cost import COST_HEAD, OTHER, cost_rows, mean_cost, total_cost
from ..processes import SpawnContext
from ..records import PHASES, EvalRecord, PhaseCost, Run
from .design import STUDY_FILE, Cell, Plan, duration, human, load_study, num_cores, plan
from .figures import (
    GREY,
    KIND_COLOR,
    PHASE_COLOR,
    BarPanel,
    Figure,
    Panel,
    Series,
    draw,
    import_matplotlib,
    plotly_spec,
    size_colors,
    tick_text,
)
from .fit import AxisFit, Estimate, Fits, draws_of, fit_table, interval, read_fits, write_fits
from .importers import TABLE_FILE, read_table, write_table
from .recommend import Recommendation, recommend

if TYPE_CHECKING:
    import pyarrow
    from rich.console import Group

FITS_FILE = "fits.json"
REPORT = "report"
AXIS_NAMES = {"compute": "6NT", "ledger": "ledger", "data": "prompts"}
NOISE = 2.0  # standard errors; a smaller difference is called no difference
MOST_DRAWERS = 4  # processes; a report has about eight figures


# ----------------------------------------------------------------------------------------- the data


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The mean of several runs at one evaluation."""

    step: int
    prompts: float
    tokens: float
    compute: float  # 6 N T
    pass1: float
    error: float  # standard error of pass1, and of the loss
    num_runs: int

    @property
    def loss(self) -> float:
        return 1.0 - self.pass1


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportedCell:
    """What is known of a run whose log was imported."""

    size: str
    kind: str
    method: str
    tau: float
    group_size: int | None
    variant: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyData:
    """The finished cells of a study, and ways to look at them."""

    name: str
    plan: Plan | None  # None: imported from the logs of another trainer
    runs: dict[str, Run]  # cell name -> run, finished cells only, in the plan's order
    missing: tuple[str, ...]
    headline: str  # the in-domain set whose loss the laws are about
    group_size: int | None  # of the main runs; None: not known
    params: dict[str, int]  # size -> N
    table: pyarrow.Table  # of `records.runs_table`
    cells: dict[str, Cell | ImportedCell] = field(default_factory=dict)

    @property
    def sizes(self) -> list[str]:
        """Sizes with a finished cell, smallest first."""
        return sorted(self.params, key=self.params.__getitem__)

    @property
    def kinds(self) -> list[str]:
        """Kinds with a finished main run, base first."""
        return [k for k in ("base", "instruct") if any(self.main(s, k) for s in self.sizes)]

    def select(self, size: str, keep: Callable[[Cell | ImportedCell], bool]) -> list[Run]:
        """Finished runs of a size whose cell is wanted; variants of the algorithm and of the order are not."""
        found = ((self.cells[n], r) for n, r in self.runs.items())
        return [r for c, r in found if c.size == size and not c.variant and keep(c)]

    def main(self, size: str, kind: str) -> list[Run]:
        """GRPO runs without reuse and with the study's own group size."""
        return self.select(
            size,
            lambda c: c.method == "grpo" and c.kind == kind and c.tau == 1 and c.group_size == self.group_size,
        )

    def control(self, size: str, kind: str) -> list[Run]:
        """Plain-pretraining runs."""
        return self.select(size, lambda c: c.method == "pretrain" and c.kind == kind)

    def curve(self, runs: Sequence[Run], eval_set: str | None = None, mode: str = "sample") -> list[Point]:
        """Mean test results of runs at the steps that all of them evaluated."""
        eval_set = eval_set or self.headline
        by_step: dict[int, list[EvalRecord]] = {}
        for run in runs:
            for e in run.evals:
                if e.eval_set == eval_set and e.mode == mode:
                    by_step.setdefault(e.step, []).append(e)
        return [_mean(by_step[s]) for s in sorted(by_step) if len(by_step[s]) == len(runs)]


def load_data(study_dir: str | os.PathLike[str]) -> StudyData:
    """Reads the finished cells of a study.

    Args:
        study_dir: the study's folder.

    Returns:
        The data.

    Raises:
        FileNotFoundError: no study.yaml there.
        ValueError: no cell is finished, or none evaluated an in-domain set with sampling; a malformed record
            (named by file and line).
    """
    folder = Path(study_dir)
    if not (folder / STUDY_FILE).is_file() and (table := read_table(folder)) is not None:
        return _imported(folder, table)
    the_plan = plan(load_study(folder / STUDY_FILE))
    runs, missing = {}, []
    for cell in the_plan.cells:
        if records.is_complete(folder / cell.folder):
            runs[cell.name] = records.read_run(folder / cell.folder)
        else:
            missing.append(cell.name)
    cells = {c.name: c for c in the_plan.cells}
    if not any(cells[name].method == "grpo" for name in runs):
        raise ValueError(f"{folder}: no GRPO cell is finished yet, so there is nothing to report")
    return StudyData(
        name=the_plan.study.name,
        plan=the_plan,
        runs=runs,
        missing=tuple(missing),
        headline=_headline(folder, runs),
        group_size=_usual_group(c for c in the_plan.cells if not c.variant),
        params={cells[n].size: r.header["model"]["params_non_embedding"] for n, r in runs.items()},
        table=records.runs_table(runs.values()),
        cells=cells,
    )


def _headline(folder: Path, runs: Mapping[str, Run]) -> str:
    counts = Counter(
        e.eval_set for r in runs.values() for e in r.evals if e.mode == "sample" and e.in_domain
    )
    if not counts:
        raise ValueError(f"{folder}: no run evaluated an in-domain set with sampling (evaluation.count is 0?)")
    return counts.most_common(1)[0][0]


def _usual_group(cells: Iterable[Cell | ImportedCell]) -> int | None:
    groups = Counter(c.group_size for c in cells if c.method == "grpo" and c.tau == 1)
    return groups.most_common(1)[0][0] if groups else None


def _imported(folder: Path, table: pyarrow.Table) -> StudyData:
    """The rows of a table of other trainers' logs as runs; what they do not say is NaN."""
    by_run: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        by_run.setdefault(row["run_id"], []).append(row)
    names = [f.name for f in dataclasses.fields(EvalRecord) if f.name in table.column_names]
    runs, cells, params = {}, {}, {}
    for name, rows in sorted(by_run.items()):
        rows.sort(key=lambda r: r["step"])
        first = rows[0]
        wanted = [{n: math.nan if r[n] is None and n in COUNTERS else r[n] for n in names} for r in rows]
        runs[name] = Run(path=folder, header={"run_id": name}, cell=None, steps=[], timings=[], summary={},
                         evals=[EvalRecord(**w) for w in wanted])  # fmt: skip
        reuse = first["tau"] or 1.0
        cells[name] = ImportedCell(
            size=first["size"], kind=first["kind"], method=first["method"], group_size=first["group_size"],
            tau=1.0 if round(reuse) == 1 else round(reuse, 1),
        )  # fmt: skip
        n = first[PARAMS[_params_of(table)]]
        if n is None:
            raise ValueError(f"{folder}: run {name}: its parameters are not known: import it again with --params or --model")
        params[first["size"]] = n
    if not any(c.method == "grpo" for c in cells.values()):
        raise ValueError(f"{folder}: no run of method grpo was imported")
    studies = {s for s in table.column("study").to_pylist() if s}
    return StudyData(
        name=" and ".join(sorted(studies)) or folder.resolve().name, plan=None, runs=runs, missing=(),
        headline=_headline(folder, runs), group_size=_usual_group(cells.values()), params=params, table=table,
        cells=cells,
    )  # fmt: skip


COUNTERS = ("prompts_seen", "unique_prompts", "trained_tokens", "compute_6nt", "compute_ledger")
PARAMS = {"non_embedding": "params_non_embedding", "nominal": "params_nominal"}


def _params_of(table: pyarrow.Table) -> str:
    """Which N a table's runs all have; the nominal one where one of them lacks the other."""
    return "nominal" if table.column(PARAMS["non_embedding"]).null_count else "non_embedding"


def _mean(evals: Sequence[EvalRecord]) -> Point:
    n = len(evals)
    over_problems = statistics.fmean((e.stderr or 0.0) ** 2 for e in evals)
    over_runs = statistics.variance([e.pass1 for e in evals]) / n if n > 1 else 0.0
    return Point(
        step=evals[0].step,
        prompts=statistics.fmean(e.prompts_seen for e in evals),
        tokens=statistics.fmean(e.trained_tokens for e in evals),
        compute=statistics.fmean(e.compute_6nt for e in evals),
        pass1=statistics.fmean(e.pass1 for e in evals),
        error=math.sqrt(over_problems + over_runs),
        num_runs=n,
    )


def _steps(runs: Sequence[Run], name: str) -> tuple[list[float], list[float]]:
    """Mean of a step record's field over runs, smoothed over a window of a twentieth of the run."""
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for s in run.steps:
            value = getattr(s, name)
            if value is not None:
                by_step.setdefault(s.step, []).append(value)
    steps = [s for s in sorted(by_step) if len(by_step[s]) == len(runs)]
    values = [statistics.fmean(by_step[s]) for s in steps]
    half = len(steps) // 40
    smooth = [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    return [float(s) for s in steps], smooth


# --------------------------------------------------------------------------------------------- laws


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
    return _fit(load_data(study_dir), Path(study_dir), n_boot)


def _fit(data: StudyData, folder: Path, n_boot: int) -> Fits:
    import pyarrow as pa

    if data.plan is not None:
        write_table(folder, data.table)
    plain = {r.header["run_id"] for n, r in data.runs.items() if not data.cells[n].variant}
    mask = [r in plain for r in data.table.column("run_id").to_pylist()]
    table = data.table.drop_columns("right").filter(pa.array(mask, type=pa.bool_()))
    kinds = [*data.kinds, "all"] if len(data.kinds) > 1 else data.kinds
    chosen = {"eval_set": data.headline, "group_size": data.group_size, "n_boot": n_boot, "params": _params_of(table)}
    axes = [a for a in ("compute", "data", "ledger") if _known(table, AXIS_COLUMNS[a])]
    if not axes:
        raise ValueError(f"{folder}: neither compute nor prompts seen are known of any run, so there is no law to fit")
    fits = fit_table(table, axes=[a for a in axes if a != "ledger"], kinds=kinds, **chosen)
    if "ledger" in axes:
        ledger = fit_table(table, axes=("ledger",), kinds=data.kinds, shapes=False, **chosen)
        fits = replace(fits, fits=(*fits.fits, *ledger.fits))
    write_fits(folder / FITS_FILE, fits)
    return fits


AXIS_COLUMNS = {"compute": "compute_6nt", "data": "prompts_seen", "ledger": "compute_ledger"}


def _known(table: pyarrow.Table, column: str) -> bool:
    return table.column(column).null_count < table.num_rows


def law_table(fits: Fits) -> Group:
    """The fitted laws for a terminal, 80 columns wide.

    Args:
        fits: of `fit_study`.

    Returns:
        The joint law for each axis and kind, why the data do not carry those that they do not, and the slope of each
        size by itself.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(ours: _Table, gap: int) -> Table:
        out = Table(title=ours.title, title_justify="left", box=None, padding=(0, gap, 0, 0))
        for i, name in enumerate(ours.head):
            out.add_column(name, justify="left" if i < ours.text_columns else "right", no_wrap=True)
        for row in ours.rows:
            out.add_row(*row)
        return out

    notes = [Text(f"- {line}") for line in [*_verdicts(fits), *_cautions(fits)]]
    return Group(table(_joint_table(fits), 2), Text(), *notes, Text(), table(_size_table(fits), 1))


def _joint_table(fits: Fits) -> _Table:
    rows = []
    for f in fits.fits:
        p = f.joint.parameters if f.joint else {}
        rows.append(
            (
                AXIS_NAMES[f.axis], f.kind, _interval(p.get("K_max"), "{:.3f}".format),
                _interval(p.get("N0"), human), "" if not f.joint or f.joint.r2 is None else f"{f.joint.r2:.3f}",
                "yes" if f.verdict.ok else "no",
            )
        )  # fmt: skip
    return _Table(
        title="log L = \u2212k(N) log X + E(N), k(N) = K_max N / (N + N0)",
        head=("X", "models", "K_max", "N0", "R\u00b2", "carried"),
        rows=rows,
        text_columns=2,
        note="X: compute as 6NT, as the ledger of all phases but evaluation, or prompts seen. 95 % intervals. Carried: "
        "whether the data determine the law. R\u00b2 is pooled over sizes: most of it is their difference.",
    )


def _size_table(fits: Fits) -> _Table:
    rows = []
    for f in fits.fits:
        if f.kind == "all" or f.axis == "ledger":
            continue
        for s in f.sizes:
            rows.append(
                (
                    AXIS_NAMES[f.axis], s.kind, s.size, human(s.params), _interval(s.k, "{:.3f}".format),
                    f"{s.E.value:.2f}", "" if s.r2 is None else f"{s.r2:.2f}", f"{s.num_runs}",
                    "yes" if s.verdict.ok else "no",
                )
            )  # fmt: skip
    return _Table(
        title="Each size by itself: log L = \u2212k log X + E",
        head=("X", "models", "size", "N", "k", "E", "R\u00b2", "runs", "falls"),
        rows=rows,
        text_columns=3,
        summary="Each size by itself",
        note="95 % intervals; natural logarithms, so that E is the logarithm of the loss at X = 1. Falls: whether the "
        "loss falls beyond its scatter.",
    )


def _verdicts(fits: Fits) -> list[str]:
    """Why the data do not carry the laws that they do not."""
    return _by_reason((f, [f"not carried: {f.verdict.why}"]) for f in fits.fits if not f.verdict.ok)


def _cautions(fits: Fits) -> list[str]:
    return _by_reason((f, f.verdict.cautions) for f in fits.fits)


def _by_reason(found: Iterable[tuple[AxisFit, Sequence[str]]]) -> list[str]:
    """A line for each reason, with the kinds and the axes that it holds for; "all" only where no kind has it."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for fit, reasons in found:
        for reason in reasons:
            kinds.setdefault(reason, {}).setdefault(fit.kind, []).append(AXIS_NAMES[fit.axis])
    out = []
    for reason, axes_of in kinds.items():
        if len(axes_of) > 1:
            axes_of.pop("all", None)
        axes = list(dict.fromkeys(axis for axes in axes_of.values() for axis in axes))
        out.append(f"{_list(list(axes_of))} (X: {_list(axes)}): {reason}.")
    return out


def _misses(data: StudyData, fits: Fits) -> list[str]:
    """Sizes whose last points the fitted law misses by more than the noise: the curve bends, the law does not."""
    out = []
    for kind in data.kinds if "data" in _axes(fits) else ():
        fit = fits.get("data", kind)
        if not fit.joint or not fit.verdict.ok:
            continue
        for s in fit.sizes:
            last = data.curve(data.main(s.size, kind))[-1]
            law = float(fit.joint.loss(s.size, last.prompts))
            if abs(last.loss - law) > NOISE * last.error:
                side = "below" if last.loss < law else "above"
                out.append(f"{s.size} {kind} ends {side} it, at {_pm(last)} where the law has {law:.3f}")
    if not out:
        return []
    return [
        f"The law is a straight line in these axes and not every curve is: {'; '.join(out)}. Its interval covers where "
        "the line is, not that bend, so do not continue it beyond the last point."
    ]


def _interval(e: Estimate | None, show: Callable[[float], str]) -> str:
    if e is None:
        return ""
    if e.at_bound:
        return f"{show(e.value)} (at a bound)"
    if e.low is None or e.high is None:
        return show(e.value)
    return f"{show(e.value)} [{show(e.low)}, {show(e.high)}]"


# ------------------------------------------------------------------------------------------ figures


def _sizes_legend(data: StudyData, *more: tuple[str, str, str]) -> tuple[tuple[str, str, str], ...]:
    colors = size_colors(data.sizes)
    return (*((f"{s} ({human(data.params[s])})", colors[s], "line") for s in data.sizes), *more)


def _grid(low: float, high: float, count: int = 60) -> list[float]:
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def _loss_figure(data: StudyData, fits: Fits, axis: str) -> Figure:
    colors, panels = size_colors(data.sizes), []
    points: list[float] = []
    carried = []
    for kind in data.kinds:
        fit = fits.get(axis, kind)
        joint = fit.joint if fit.verdict.ok else None
        carried.append(joint is not None)
        series = []
        for size in data.sizes:
            curve = [p for p in data.curve(data.main(size, kind)) if p.step > 0]
            if not curve:
                continue
            x = [p.compute if axis == "compute" else p.prompts for p in curve]
            points += [p.loss + s * p.error for p in curve for s in (-1, 1)]
            own = next((s for s in fit.sizes if s.size == size), None)
            if own:
                line = _grid(own.x_min, own.x_max)
                if joint:
                    y = joint.loss(size, line).tolist()
                    low, high = (b.tolist() for b in joint.band(size, line))
                    points += [*low, *high]
                else:
                    y, low, high = [math.exp(own.E.value - own.k.value * math.log(v)) for v in line], None, None
                    points += y
                series.append(
                    Series(label=f"{size}, fitted", x=line, y=y, low=low, high=high, color=colors[size], markers=False,
                           thin=joint is None)
                )  # fmt: skip
            series.append(
                Series(label=size, x=x, y=[p.loss for p in curve], y_error=[p.error for p in curve], line=False,
                       color=colors[size], end_label=size)
            )  # fmt: skip
        panels.append((kind, series))
    lines = {
        (True,): "Lines: the law fitted to all sizes together, with its 95 % band. ",
        (False,): "The data do not carry one law for all sizes; the thin lines are fitted to each size by itself. ",
    }.get(
        tuple(sorted(set(carried))),
        "Lines with a band: the law fitted to all sizes of a kind together, with its 95 % band. Thin lines, where the "
        "data do not carry that law: each size by itself. ",
    )
    what = {"compute": "training compute, 6NT (FLOPs)", "data": "prompts seen"}[axis]
    return Figure(
        name=f"loss_{axis}",
        title={"compute": "Test loss against compute", "data": "Test loss against data"}[axis],
        caption=f"{lines}Points: mean over runs, bars one standard error. Step 0 has no place on a logarithmic axis.",
        panels=[
            Panel(title=f"{kind} models", x_label=what, y_label=f"test loss ({data.headline})", series=series,
                  x_log=True, y_log=True, y_range=(min(points), max(points)))
            for kind, series in panels
        ],
        legend=_sizes_legend(data),
        height=400,
    )  # fmt: skip


def _slope_figure(data: StudyData, fits: Fits) -> Figure | None:
    """k of each size by itself, and k(N) of the joint law where the data carry it."""
    if len(data.sizes) < 2:
        return None
    panels = []
    for axis in _axes(fits):
        series, carried = [], []
        for kind in data.kinds:
            fit = fits.get(axis, kind)
            if not fit.sizes:
                continue
            if fit.joint and fit.verdict.ok:
                n = _grid(min(data.params.values()) / 1.5, max(data.params.values()) * 1.5)
                k, _ = draws_of(fit.joint, np.array(n))
                low, high = interval(k)
                series.append(
                    Series(label=f"{kind}, law", x=n, y=fit.joint.slope.k(np.array(n)).tolist(), low=low.tolist(),
                           high=high.tolist(), color=KIND_COLOR[kind], markers=False, end_label=kind)
                )  # fmt: skip
                carried.append(kind)
            series.append(
                Series(
                    label=f"{kind}, each size", x=[s.params for s in fit.sizes], y=[s.k.value for s in fit.sizes],
                    y_span=[(s.k.low, s.k.high) for s in fit.sizes], color=KIND_COLOR[kind], line=False,
                    end_label=None if kind in carried else kind,
                )
            )  # fmt: skip
        panels.append(
            Panel(title={"compute": "against compute", "data": "against data"}[axis],
                  x_label="non-embedding parameters N", y_label="slope k", series=series, x_log=True, zero="y")
        )  # fmt: skip
    return Figure(
        name="slopes",
        title="How fast the loss falls, by size",
        caption="Points: the slope of each size by itself, with its 95 % interval. Lines, where the data carry the "
        "law: k(N) = K_max N / (N + N0) with its 95 % band.",
        panels=panels,
        height=360,
    )


def _learning_figure(data: StudyData) -> Figure:
    colors = size_colors(data.sizes)
    panels = []
    for name, title, unit in (
        ("reward_mean", "Reward", "mean training reward"),
        ("entropy", "Entropy", "nats a token"),
        ("response_len_mean", "Response length", "tokens"),
    ):
        series = []
        for kind in data.kinds:
            for size in data.sizes:
                x, y = _steps(data.main(size, kind), name)
                if x:
                    series.append(
                        Series(label=f"{size} {kind}", x=x, y=y, color=colors[size], markers=False,
                               dashed=kind == "instruct")
                    )  # fmt: skip
        panels.append(Panel(title=title, x_label="step", y_label=unit, series=series, x_zero=True))
    dashed = (("instruct (dashed)", GREY, "dash"),) if "instruct" in data.kinds else ()
    return Figure(
        name="learning_curves",
        title="Learning curves",
        caption="Means over runs, averaged over a twentieth of the run. Rewards are those of training answers at "
        "temperature 1 on ever new problems; they are no test result.",
        panels=panels,
        legend=_sizes_legend(data, *dashed),
        height=300,
    )


def _kinds_figure(data: StudyData) -> Figure | None:
    if len(data.kinds) < 2:
        return None
    series = []
    for kind in data.kinds:
        curves = [(data.params[s], c) for s in data.sizes if len(c := data.curve(data.main(s, kind))) > 1]
        for place, label, hollow in ((0, "before", True), (-1, "after", False)):
            series.append(
                Series(
                    label=f"{kind} {label}", x=[n for n, _ in curves], y=[c[place].loss for _, c in curves],
                    y_error=[c[place].error for _, c in curves], color=KIND_COLOR[kind], hollow=hollow, dashed=hollow,
                    end_label=f"{kind} {label}",
                )
            )  # fmt: skip
    return Figure(
        name="base_instruct",
        title="Base against instruct models",
        caption="Test loss before the first and after the last step; bars one standard error.",
        panels=[
            Panel(title="", x_label="non-embedding parameters N", y_label=f"test loss ({data.headline})",
                  series=series, x_log=True)
        ],
        height=400,
    )  # fmt: skip


def _control_figure(data: StudyData) -> Figure | None:
    both = [(s, k) for k in data.kinds for s in data.sizes if data.control(s, k) and data.main(s, k)]
    if not both:
        return None
    panels, every = [], []
    for size, kind in both:
        series = []
        for label, runs, color in (
            ("RL", data.main(size, kind), KIND_COLOR[kind]),
            ("control", data.control(size, kind), KIND_COLOR["control"]),
        ):
            curve = data.curve(runs)
            every += [p.loss + s * p.error for p in curve for s in (-1, 1)]
            series.append(
                Series(label=label, x=[p.tokens for p in curve], y=[p.loss for p in curve],
                       y_error=[p.error for p in curve], color=color, end_label=label)
            )  # fmt: skip
        panels.append((f"{size}, {kind}", series))
    return Figure(
        name="control",
        title="RL against plain pretraining",
        caption="The control goes on with plain pretraining of the same model for the same number of steps: from the full "
        "learning rate, hence its rise, annealed to the end, so compare the ends. Bars one standard error.",
        panels=[
            Panel(title=title, x_label="trained tokens", y_label=f"test loss ({data.headline})",
                  series=series, x_zero=True, y_range=(min(every), max(every)))
            for title, series in panels
        ],
        height=300,
    )  # fmt: skip


def _transfer_rows(data: StudyData, mode: str) -> list[tuple[str, bool, str, str, Point, Point]]:
    """(set, in domain, kind, size, before, after) of every main run."""
    inside: dict[str, bool] = {}
    for run in data.runs.values():
        for e in run.evals:
            inside.setdefault(e.eval_set, e.in_domain)
    names = sorted(inside, key=lambda n: (n != data.headline, not inside[n]))
    out = []
    for name in names:
        for kind in data.kinds:
            for size in data.sizes:
                curve = data.curve(data.main(size, kind), name, mode)
                if len(curve) > 1:
                    out.append((name, inside[name], kind, size, curve[0], curve[-1]))
    return out


def _transfer_figure(data: StudyData) -> Figure | None:
    rows = _transfer_rows(data, "sample")
    names = list(dict.fromkeys((name, inside) for name, inside, *_ in rows))
    if len(names) < 2:
        return None
    colors, panels = size_colors(data.sizes), []
    apart = 0.7 / max(len(data.sizes), 2)
    for kind in data.kinds:
        series = []
        for i, size in enumerate(data.sizes):
            mine = [r for r in rows if r[2] == kind and r[3] == size]
            offset = ((len(data.sizes) - 1) / 2 - i) * apart
            series.append(
                Series(
                    label=size,
                    x=[100 * (r[5].pass1 - r[4].pass1) for r in mine],
                    x_error=[100 * math.hypot(r[4].error, r[5].error) for r in mine],
                    y=[len(names) - 1 - [n for n, _ in names].index(r[0]) + offset for r in mine],
                    color=colors[size], line=False,
                )
            )  # fmt: skip
        ticks = []
        for i, (name, inside) in enumerate(names):
            where = "in domain" if inside else "out of domain"
            ticks.append((float(len(names) - 1 - i), f"{name} ({where})"))
        panels.append(
            Panel(title=f"{kind} models", x_label="change of pass@1 (points)", y_label="", series=series,
                  ticks_y=ticks, zero="x")
        )  # fmt: skip
    return Figure(
        name="transfer",
        title="Transfer by domain",
        caption="pass@1 after RL minus before, sampled at the test temperature, in percentage points; bars one "
        "standard error of the difference.",
        panels=panels,
        legend=tuple((label, color, "dot") for label, color, _ in _sizes_legend(data)),
        height=110 + 75 * len(names),
    )


def _cost_figure(data: StudyData) -> Figure | None:
    costs = _costs(data)
    if not costs:
        return None
    panels = []
    for title, what, show in (("Time", "seconds", duration), ("FLOPs", "flops", tick_text)):
        rows = [(label, {p: getattr(c, what) or 0.0 for p, c in cost.items()}) for label, cost in costs]
        totals = [sum(values.values()) for _, values in rows]
        if not all(totals):
            continue
        panels.append(
            BarPanel(
                title=title,
                x_label=f"% of a run's {'time' if title == 'Time' else 'FLOPs'}",
                rows=[f"{label}: {show(total)}" for (label, _), total in zip(rows, totals, strict=True)],
                parts=[
                    (p, PHASE_COLOR[p],
                     [100 * values.get(p, 0.0) / total for (_, values), total in zip(rows, totals, strict=True)])
                    for p in (*PHASES, OTHER) if any(values.get(p) for _, values in rows)
                ],
            )
        )  # fmt: skip
    used = dict.fromkeys(label for panel in panels for label, _, _ in panel.parts)
    return Figure(
        name="cost",
        title="Where the cost goes",
        caption="Of one run (mean over runs), by phase; the row's name holds the total. Prefill and decode sample the "
        "answers; reference is the KL's forward pass; other is wall-clock that no phase was booked for, starting up "
        "included.",
        panels=panels,
        legend=tuple((p, PHASE_COLOR[p], "box") for p in (*PHASES, OTHER) if p in used),
        height=90 + 34 * len(costs),
    )


def _cost_table(data: StudyData) -> _Table:
    return _Table(
        title="Cost of a run by phase",
        head=("run", *COST_HEAD),
        rows=[(label, *row) for label, cost in _costs(data) for row in cost_rows(cost)],
        text_columns=2,
        summary="Seconds, tokens and FLOPs of each phase",
        note="Mean over runs. GFLOP/s: FLOPs of the matrix products and the attention over the phase's own seconds.",
    )


def _costs(data: StudyData) -> list[tuple[str, dict[str, PhaseCost]]]:
    """Mean cost by phase of each size's main runs and of its controls, those of one size side by side."""
    groups = [
        (f"{size} {name}", [r for r in runs if r.timings])
        for size in data.sizes
        for kind in data.kinds
        for name, runs in ((kind, data.main(size, kind)), (f"{kind} control", data.control(size, kind)))
    ]
    return [(label, mean_cost([total_cost(r.timings) for r in runs])) for label, runs in groups if runs]


def _axis_figure(data: StudyData, axis: str) -> Figure | None:
    """Data reuse or group size: the curves of each value, and where they end."""
    title, symbol, caption = {
        "tau": ("Data reuse", "τ", "τ: prompts seen over different prompts. Equal numbers of steps."),
        "group_size": ("Group size", "G", "G: answers to a prompt. Equal numbers of prompts; cost grows with G."),
    }[axis]
    panels = []
    for kind in data.kinds:
        for size in data.sizes:
            other = (lambda c: c.group_size == data.group_size) if axis == "tau" else (lambda c: c.tau == 1)
            runs = data.select(size, lambda c, k=kind, o=other: c.method == "grpo" and c.kind == k and o(c))
            values = sorted({getattr(data.cells[n], axis) for n, r in data.runs.items() if r in runs})
            if len(values) < 2:
                continue
            colors = size_colors([str(v) for v in values])
            series, ends = [], []
            for value in values:
                mine = [r for n, r in data.runs.items() if r in runs and getattr(data.cells[n], axis) == value]
                curve = [p for p in data.curve(mine) if p.step > 0]
                if not curve:
                    continue
                ends.append((value, curve[-1]))
                series.append(
                    Series(label=f"{symbol} = {value:g}", x=[p.prompts for p in curve], y=[p.loss for p in curve],
                           y_error=[p.error for p in curve], color=colors[str(value)],
                           end_label=f"{symbol}={value:g}")
                )  # fmt: skip
            panels.append(
                Panel(title=f"{size}, {kind}", x_label="prompts seen", y_label=f"test loss ({data.headline})",
                      series=series, x_log=True)
            )  # fmt: skip
            panels.append(
                Panel(
                    title=f"{size}, {kind}: at the end", x_label=symbol, y_label=f"test loss ({data.headline})",
                    x_log=True, ticks_x=[float(v) for v, _ in ends],
                    series=[
                        Series(label="end", x=[float(v) for v, _ in ends], y=[p.loss for _, p in ends],
                               y_error=[p.error for _, p in ends], color=KIND_COLOR[kind])
                    ],
                )
            )  # fmt: skip
    if not panels:
        return None
    return Figure(name=axis, title=title, caption=f"{caption} Bars one standard error.", panels=panels, height=320)


# ------------------------------------------------------------------------------------------- findings


def _findings(data: StudyData, fits: Fits) -> list[str]:
    """What the data say, in sentences; a difference under two standard errors is called none."""
    out, ordered = [], {}
    for kind in data.kinds:
        curves = {s: c for s in data.sizes if len(c := data.curve(data.main(s, kind))) > 1}
        if not curves:
            continue
        ends = {s: (c[0], c[-1]) for s, c in curves.items()}
        changes = {s: _difference(before, after) for s, (before, after) in ends.items()}
        what = _in_words(changes, "falls during RL", "rises", "does not change beyond the noise")
        numbers = "; ".join(f"{s} {_pm(a)} to {_pm(b)}" for s, (a, b) in ends.items())
        out.append(f"{kind.capitalize()} models: test loss on unseen {data.headline} problems {what} ({numbers}).")
        finals = [b for _, b in ends.values()]
        if len(finals) > 1:
            ordered[kind] = [_difference(a, b) < 0 for a, b in zip(finals, finals[1:], strict=False)]
    for kind, lower in ordered.items():
        if all(lower):
            out.append(f"Every larger {kind} model ends lower than the one before it.")
        else:
            out.append(
                f"Of {len(lower)} steps up the ladder of {kind} models, {sum(lower)} end lower by more than two "
                "standard errors."
            )
    greedy = []
    for kind in data.kinds:
        curves = {s: c for s in data.sizes if len(c := data.curve(data.main(s, kind), mode="greedy")) > 1}
        changes = {s: _difference(c[0], c[-1]) for s, c in curves.items()}
        if changes:
            numbers = "; ".join(f"{s} {_pm(c[0])} to {_pm(c[-1])}" for s, c in curves.items())
            words = _in_words(changes, "falls", "rises", "does not change beyond the noise")
            greedy.append(f"for {kind} models it {words} ({numbers})")
    if greedy:
        out.append(f"The loss of greedy answers is another matter: {'; '.join(greedy)}.")
    against, numbers = {}, []
    for size in data.sizes:
        rl, control = data.curve(data.main(size, "base")), data.curve(data.control(size, "base"))
        if len(rl) > 1 and len(control) > 1:
            against[size] = _difference(control[-1], rl[-1])
            numbers.append(f"{size} {_pm(rl[-1])}, control {_pm(control[-1])}")
    if against:
        words = _in_words(against, "RL ends lower", "the control ends lower", "there is no difference beyond the noise")
        out.append(f"Base models against plain pretraining of the same length: {words} ({'; '.join(numbers)}).")
    for axis in _axes(fits):
        found = [f for f in fits.fits if f.axis == axis and f.kind in data.kinds]
        parts = []
        for f in found:
            if f.verdict.ok and f.joint:
                p = f.joint.parameters
                parts.append(
                    f"for {f.kind} models K_max = {_interval(p['K_max'], '{:.3f}'.format)}, "
                    f"N0 = {_interval(p['N0'], human)} parameters"
                )
            else:
                parts.append(f"for {f.kind} models the data do not carry it ({f.verdict.why.split('; ')[0]})")
        out.append(f"One law for all sizes, loss against {axis} (95 % intervals): {'; '.join(parts)}.")
    largest = {kind: (budget, r) for kind, budget, r in _picks(data, fits) if r.budget == "compute"}
    for kind, (budget, r) in largest.items():
        sure = "decided" if r.decided else "not decided, see below"
        if r.pick == max(r.candidates, key=lambda c: c.params).label:
            sure += "; it is the largest size here"
        out.append(f"Which {kind} model to train for {budget}: {r.pick} ({sure}).")
    return [*out, *_misses(data, fits)]


def _difference(before: Point, after: Point) -> float:
    """after - before in loss, or 0.0 when it is within the noise."""
    change = after.loss - before.loss
    return change if abs(change) > NOISE * math.hypot(before.error, after.error) else 0.0


def _in_words(changes: dict[str, float], fell: str, rose: str, flat: str) -> str:
    groups = {
        fell: [s for s, d in changes.items() if d < 0],
        rose: [s for s, d in changes.items() if d > 0],
        flat: [s for s, d in changes.items() if d == 0],
    }
    said = [(what, sizes) for what, sizes in groups.items() if sizes]
    if len(said) == 1 and len(changes) > 1:
        return f"{said[0][0]} at every size"
    return "; ".join(f"{what} at {_list(sizes)}" for what, sizes in said)


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _pm(point: Point) -> str:
    return f"{point.loss:.3f}\u00a0±\u00a0{point.error:.3f}"


# ---------------------------------------------------------------------------------------------- page


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    text_columns: int = 1
    note: str = ""
    summary: str = ""  # folded away under this line, when given


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    id: str
    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[_Table] = ()
    points: Sequence[str] = ()


def _loss_table(data: StudyData) -> _Table:
    rows = []
    for kind in data.kinds:
        for size in data.sizes:
            runs = data.main(size, kind)
            sampled, greedy = data.curve(runs), data.curve(runs, mode="greedy")
            if not sampled:
                continue
            row = [size, kind, human(data.params[size]), str(len(runs)), _pm(sampled[0]), _pm(sampled[-1])]
            row += [_pm(greedy[0]), _pm(greedy[-1])] if greedy else ["", ""]
            rows.append(row)
    for size in data.sizes:
        for kind in ("base", "instruct"):
            runs = data.control(size, kind)
            sampled, greedy = data.curve(runs), data.curve(runs, mode="greedy")
            if sampled:
                row = [size, f"{kind}, control", human(data.params[size]), str(len(runs))]
                row += [_pm(sampled[0]), _pm(sampled[-1])]
                rows.append(row + ([_pm(greedy[0]), _pm(greedy[-1])] if greedy else ["", ""]))
    return _Table(
        head=("size", "model", "N", "runs", "loss before", "loss after", "greedy before", "greedy after"),
        rows=rows,
        text_columns=2,
        note=f"Test loss, 1 - pass@1, on {data.headline}, with standard errors. The sampled loss is what the laws are "
        "fitted to; the greedy one takes the likeliest token everywhere.",
    )


def _transfer_table(data: StudyData) -> _Table:
    rows = []
    greedy = {(r[0], r[2], r[3]): r for r in _transfer_rows(data, "greedy")}
    for name, inside, kind, size, before, after in _transfer_rows(data, "sample"):
        row = [name, "in" if inside else "out", kind, size, _rate(before), _rate(after), _change(before, after)]
        g = greedy.get((name, kind, size))
        rows.append(row + ([_rate(g[4]), _rate(g[5]), _change(g[4], g[5])] if g else ["", "", ""]))
    return _Table(
        head=("set", "domain", "model", "size", "before", "after", "change", "greedy before", "after", "change"),
        rows=rows,
        text_columns=4,
        summary="All values, with the greedy ones",
        note="pass@1 in per cent, with standard errors.",
    )


def _rate(p: Point) -> str:
    return f"{100 * p.pass1:.1f}\u00a0±\u00a0{100 * p.error:.1f}"


def _change(a: Point, b: Point) -> str:
    change = round(100 * (b.pass1 - a.pass1), 1) + 0.0  # + 0.0: no negative zero
    return f"{change:+.1f}\u00a0±\u00a0{100 * math.hypot(a.error, b.error):.1f}".replace("-", "\u2212")


def _picks(data: StudyData, fits: Fits) -> list[tuple[str, str, Recommendation]]:
    """(kind, budget in words, recommendation) for the budgets that the runs ended with, rising."""
    out = []
    for kind in data.kinds:
        for axis in _axes(fits):
            fit, unit = fits.get(axis, kind), {"compute": "FLOPs", "data": "prompts"}[axis]
            if fit.joint is None:
                continue
            for amount in sorted({round_to(s.x_max, 2) for s in fit.sizes}):
                budget = {"compute" if axis == "compute" else "prompts": amount}
                out.append((kind, f"{tick_text(amount)} {unit}", recommend(fit, **budget)))
    return out


def _recommendation_section(picks: Sequence[tuple[str, str, Recommendation]]) -> _Section:
    rows, reasons = [], []
    for kind, budget, r in picks:
        best = r.candidates[0]
        rows.append(
            (
                kind, budget, r.pick, _interval(best.loss, "{:.3f}".format),
                "" if best.prompts is None else f"{best.prompts:,.0f}", "yes" if r.decided else "no",
                _list(r.tied) if r.tied else "none",
            )
        )  # fmt: skip
        if not r.decided:
            why = r.why.partition(" Intervals: ")[0]
            reasons.append(f"{kind.capitalize()} models, {budget}: not decided. {why}")
    table = _Table(
        head=("models", "budget", "size", "loss", "prompts", "decided", "not told apart from it"),
        rows=rows,
        text_columns=2,
        note="The size with the smallest loss that the fitted law predicts for a budget, with the 95 % interval of "
        "that loss. Decided: the data carry the law, every other size is behind beyond the 95 % interval of the "
        "difference, and the budget lies where that size was measured.",
    )
    text = (
        "Budgets are those that the runs of the ladder ended with. A budget of compute buys a small model more "
        "prompts; a budget of prompts costs a large model more compute."
    )
    return _Section(id="recommendation", title="Which size to train", text=[text], tables=[table], points=reasons)


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
    axis = first if first in _axes(fits) else _axes(fits)[0]
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


def _method_points(data: StudyData) -> list[str]:
    run = next(iter(data.runs.values()))
    head = next(e for e in run.evals if e.eval_set == data.headline and e.mode == "sample")
    if data.plan is None:
        nominal = _params_of(data.table) == "nominal"
        return [
            "The runs are of another trainer: their evaluations come from its logs, and nothing is known of them but "
            f"what {TABLE_FILE} holds.",
            f"Test loss L = 1 - pass@1 on {data.headline}. Data D: prompts seen. Compute: 6 N T, T the tokens that the "
            f"log counts, N {'what the model is called' if nominal else 'without the embedding and the output head'}.",
            "Logs have no standard errors: those shown are of the spread between runs alone, and none where there is "
            "one run.",
        ]
    config = data.plan.cells[0].config
    samples = f"{head.num_samples} answers to each" if head.num_samples > 1 else "one answer to each"
    return [
        f"Test loss L = 1 - pass@1 over the {head.num_problems} held-out problems of {data.headline}, {samples}, "
        f"sampled at temperature {head.temperature:g}.",
        "N: parameters without the embedding and the output head.",
        "Data D: prompts seen, that is steps times prompts a step; an answer is no datum of its own.",
        "Compute: 6 N T, T the prompt and response tokens of all answers that were trained on. Sampling, the "
        "reference pass and evaluation are not in it; the section on cost has them, and runs.parquet has both counts.",
        f"One step: {config.batch.prompts} prompts times {data.group_size} answers, {config.batch.minibatches} "
        f"optimizer steps, clip {config.loss.clip_low:g}/{config.loss.clip_high:g}, KL "
        f"({config.loss.kl}) coefficient {config.loss.kl_coef:g}, advantages divided by the {config.advantage.std} "
        "standard deviation of the group.",
        "Standard errors: over problems, and over runs where there are several, added in quadrature; a difference is "
        "treated as if its two sides were independent, which is cautious, as both answered the same problems. "
        "A difference under two standard errors is called none.",
    ]


def _limits(data: StudyData) -> list[str]:
    """What the data cannot show, found by looking at what there is."""
    out = []
    counts = [len(data.main(s, k)) for s in data.sizes for k in data.kinds]
    if min(counts) < 2:
        out.append(
            "With one run at some or all sizes, the spread between runs is not known; the errors hold that of the test "
            "problems alone."
        )
    if len(data.sizes) < 4:
        out.append(
            f"{len(data.sizes)} sizes carry a law of k(N) with two parameters only barely; whether it saturates, and "
            "where, needs more sizes and larger ones."
        )
    cells = data.plan.cells if data.plan else ()
    rates = {c.size: c.config.optimizer.lr for c in cells if c.method == "grpo" and c.name in data.runs}
    if len(set(rates.values())) > 1:
        listed = ", ".join(f"{s} {rates[s]:g}" for s in data.sizes if s in rates)
        out.append(f"The learning rate differs by size ({listed}), so size and learning rate cannot be told apart.")
    if not any(c.method == "pretrain" for n, c in data.cells.items() if n in data.runs):
        out.append("There is no control, so what RL adds beyond plain training of the same length is not known.")
    if cells and all(c.config.model.path is None for c in cells):
        out.append(
            "These are models of thousands of parameters on generated problems. The numbers test the method; they "
            "say nothing of the size of the effects in language models."
        )
    out.append(
        "Test points of one run are correlated: they are the same weights a few steps on, asked the same problems. "
        "R² is flattered by it; the intervals come from resampling whole runs and problems where there are enough."
    )
    return out


def _axes(fits: Fits) -> list[str]:
    """Of compute and data, what the laws were fitted against."""
    return [a for a in ("compute", "data") if any(f.axis == a for f in fits.fits)]


def _sections(data: StudyData, fits: Fits) -> list[_Section]:
    loss_figures = [_loss_figure(data, fits, axis) for axis in _axes(fits)]
    slopes = _slope_figure(data, fits)
    kinds, control, transfer, cost = (
        f(data) for f in (_kinds_figure, _control_figure, _transfer_figure, _cost_figure)
    )
    sections = [
        *(_Section(id=f.name, title=f.title, figures=[f]) for f in loss_figures),
        _Section(
            id="law", title="The fitted law", figures=[slopes] if slopes else [],
            tables=[_joint_table(fits), _size_table(fits)],
            points=[*_verdicts(fits), *_cautions(fits)],
        ),
        *([_recommendation_section(picks)] if (picks := _picks(data, fits)) else []),
        _Section(id="losses", title="Where the runs end", figures=[kinds] if kinds else [], tables=[_loss_table(data)]),
    ]
    if control:
        sections.append(_Section(id="control", title=control.title, figures=[control]))
    if any(r.steps for r in data.runs.values()):
        sections.append(_Section(id="learning", title="Learning curves", figures=[_learning_figure(data)]))
    if transfer:
        sections.append(
            _Section(id="transfer", title=transfer.title, figures=[transfer], tables=[_transfer_table(data)])
        )
    for axis in ("tau", "group_size"):
        figure = _axis_figure(data, axis)
        if figure:
            sections.append(_Section(id=axis, title=figure.title, figures=[figure]))
    if cost:
        sections.append(_Section(id="cost", title=cost.title, figures=[cost], tables=[_cost_table(data)]))
    sections.append(_Section(id="method", title="How it was measured", points=_method_points(data)))
    sections.append(_Section(id="limits", title="What these data cannot show", points=_limits(data)))
    return sections


def _page(data: StudyData, sections: Sequence[_Section], findings: Sequence[str]) -> str:
    import json

    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    panels: dict[str, Any] = {}
    shown = []
    for s in sections:
        figures = []
        for f in s.figures:
            ids = [f"{f.name}-{i}" for i in range(len(f.panels))]
            panels |= {i: plotly_spec(p, height=f.height) for i, p in zip(ids, f.panels, strict=True)}
            wide = 300 if len(f.panels) > 2 else 420
            figures.append({"legend": f.legend, "ids": ids, "caption": f.caption, "min_width": wide,
                            "alone": len(ids) == 1})  # fmt: skip
        shown.append({"id": s.id, "title": s.title, "text": s.text, "figures": figures, "tables": s.tables,
                      "points": s.points})  # fmt: skip
    run = next(iter(data.runs.values()))
    hardware, versions = run.header.get("hardware"), run.header.get("versions")
    where = (
        f"Runs: {hardware.get('cpu')}, {hardware.get('cores')} cores; Python {versions.get('python')}, torch "
        f"{versions.get('torch')}."
        if hardware and versions
        else "The runs are of another trainer."
    )
    warnings = []
    if data.missing:
        warnings.append(
            f"{len(data.missing)} of {len(data.cells)} cells are not finished and not in this report: "
            f"{', '.join(data.missing)}."
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    name = data.name
    problems = len(data.sizes)
    return environment.get_template("report.html").render(
        study=name,
        heading=f"Scaling study \u201c{name}\u201d",
        about=f"GRPO post-training of {problems} model sizes ({_list(data.sizes)}; N from "
        f"{human(min(data.params.values()))} to {human(max(data.params.values()))}), {_list(data.kinds)} models, "
        f"{len(data.runs)} finished runs, tested on held-out problems.",
        warnings=warnings,
        findings=findings,
        sections=shown,
        footer=f"Made from the records in {TABLE_FILE} by grpo_engine. {where}",
        plotly_js=Markup(get_plotlyjs()),
        panels=Markup(json.dumps(panels, allow_nan=False, ensure_ascii=False).replace("</", "<\\/")),
    )


@contextlib.contextmanager
def _drawers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for drawing, which import matplotlib while this one makes fits."""
    with ProcessPoolExecutor(processes, mp_context=SpawnContext()) as pool:
        for _ in range(processes):
            pool.submit(import_matplotlib)
        yield pool


def write_report(study_dir: str | os.PathLike[str], *, n_boot: int = 200) -> Path:
    """Fits the laws of a study and writes its report; see the top of this file for what is written where.

    Args:
        study_dir: the study's folder. Cells that are not finished are left out, and the page names them.
        n_boot: bootstrap draws behind each interval of a fit.

    Returns:
        The page, `report/index.html`.

    Raises:
        FileNotFoundError, ValueError: see `load_data`.
    """
    folder = Path(study_dir)
    data = load_data(folder)
    with _drawers(min(num_cores(), MOST_DRAWERS)) as drawers:
        fits = _fit(data, folder, n_boot)
        sections = _sections(data, fits)
        figures = folder / REPORT / "figures"
        figures.mkdir(parents=True, exist_ok=True)
        list(drawers.map(draw, (f for s in sections for f in s.figures), itertools.repeat(figures)))
    page = folder / REPORT / "index.html"
    records.write_bytes_atomic(page, _page(data, sections, _findings(data, fits)).encode())
    return page
