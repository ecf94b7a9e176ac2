"""The finished cells of a study, and ways to look at them: what every table and figure is made of.

Standard errors. An evaluation records the standard error of pass@1 over its problems. The mean of n runs that
answered the same problems keeps that error (which problems were drawn does not average out) and adds the spread of
the runs over the square root of n; the two are added in quadrature. A difference of two such means is treated as if
they were independent, which is cautious, as both answered the same problems.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_engine.records import records
from grpo_engine.records.cost import mean_cost, total_cost
from grpo_engine.records.records import EvalRecord, PhaseCost, Run
from grpo_engine.records.table import runs_table
from grpo_engine.study.design import STUDY_FILE, Cell, Plan, load_study, plan
from grpo_engine.study.importers import read_table
from grpo_engine.study.laws.curves import PARAMS, points_of

if TYPE_CHECKING:
    import pyarrow


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
    seed: int | None = None
    prompts: int | None = None


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
    tau: float = 1.0  # of the main runs
    cells: Mapping[str, Cell | ImportedCell] = field(default_factory=dict)

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

    def runs_of(self, size: str, kind: str) -> list[tuple[Cell | ImportedCell, Run]]:
        """Finished GRPO runs of a size and kind, with their cells; without variants."""
        found = ((self.cells[n], r) for n, r in self.runs.items())
        return [(c, r) for c, r in found if (c.size, c.kind, c.method, c.variant) == (size, kind, "grpo", "")]

    def main(self, size: str, kind: str) -> list[Run]:
        """GRPO runs with the study's own reuse, which is none where it was planned here, and with its own group size."""
        groups = (self.group_size, None)  # a log may not say it
        return self.select(
            size, lambda c: c.method == "grpo" and c.kind == kind and c.tau == self.tau and c.group_size in groups
        )

    def ablation(self, size: str, kind: str, field: str) -> dict[float, list[Run]]:
        """GRPO runs of a size and kind that differ in one setting.

        Args:
            size: the size.
            kind: the kind.
            field: "tau" or "group_size". Runs are comparable that have the same prompts a step and, for tau, the same
                group size, for group size the main runs' reuse; of several such sets the one with the most values is
                taken.

        Returns:
            Value to runs, rising: those of the seeds that every value has, as a seed stands for a model of its own on
            the embedded ladder; all runs where there is no such seed. Empty without two values.
        """
        sets: dict[tuple, dict[float, list[tuple[Cell | ImportedCell, Run]]]] = {}
        for c, run in self.runs_of(size, kind):
            if getattr(c, field) is not None and (field == "tau" or c.tau == self.tau):
                same = (c.prompts, c.group_size if field == "tau" else None)
                sets.setdefault(same, {}).setdefault(float(getattr(c, field)), []).append((c, run))
        values = max(sets.values(), key=len, default={})
        if len(values) < 2:
            return {}
        shared = set.intersection(*({c.seed for c, _ in runs} for runs in values.values()))
        return {v: [r for c, r in values[v] if not shared or c.seed in shared] for v in sorted(values)}

    def control(self, size: str, kind: str) -> list[Run]:
        """Plain-pretraining runs."""
        return self.select(size, lambda c: c.method == "pretrain" and c.kind == kind)

    def curve(self, runs: Sequence[Run], eval_set: str | None = None, mode: str = "sample") -> list[Point]:
        """Mean test results of runs, at the points that their laws are fitted to (see `curves.points_of`) and at step 0."""
        eval_set = eval_set or self.headline
        evals = [e for run in runs for e in run.evals if e.eval_set == eval_set and e.mode == mode and math.isfinite(e.loss)]
        points = points_of(evals, lambda e: (e.step, None if math.isnan(e.prompts_seen) else e.prompts_seen))
        return [_mean(at) for at in points.values()]


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
        table=runs_table(runs.values()),
        cells=cells,
    )


def _headline(folder: Path, runs: Mapping[str, Run]) -> str:
    counts = Counter(e.eval_set for r in runs.values() for e in r.evals if e.mode == "sample" and e.in_domain)
    if not counts:
        raise ValueError(f"{folder}: no run evaluated an in-domain set with sampling (evaluation.count is 0?)")
    return counts.most_common(1)[0][0]


def _usual_group(cells: Iterable[Cell | ImportedCell], tau: float = 1.0) -> int | None:
    groups = Counter(c.group_size for c in cells if c.method == "grpo" and c.tau == tau and c.group_size is not None)
    return groups.most_common(1)[0][0] if groups else None


def _imported(folder: Path, table: pyarrow.Table) -> StudyData:
    """The rows of a table of other trainers' logs as runs; what they do not say is NaN."""
    by_run: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        by_run.setdefault(row["run_id"], []).append(row)
    column = PARAMS[params_of(table)]
    if unknown := sorted(name for name, rows in by_run.items() if rows[0][column] is None):
        option = "--params-nominal (some runs have no --params)" if column == PARAMS["nominal"] else "--params or --model"
        if all(rows[0][c] is None for rows in by_run.values() for c in PARAMS.values()):
            option = "--params or --model"
        raise ValueError(
            f"{folder}: the parameters of {', '.join(unknown)} are not known: import again with {option} for every run"
        )
    names = [f.name for f in dataclasses.fields(EvalRecord) if f.name in table.column_names]
    reuse, tau = _reuse_of(by_run)
    runs, cells, params = {}, {}, {}
    for name, rows in sorted(by_run.items()):
        rows.sort(key=lambda r: r["step"])
        first = rows[0]
        wanted: list[dict[str, Any]] = [
            {n: math.nan if r[n] is None and n in COUNTERS else r[n] for n in names} for r in rows
        ]
        runs[name] = Run(path=folder, header={"run_id": name}, cell=None, steps=[], timings=[], summary={},
                         evals=[EvalRecord(**w) for w in wanted])  # fmt: skip
        cells[name] = ImportedCell(
            size=first["size"], kind=first["kind"], method=first["method"], group_size=first["group_size"],
            tau=reuse[name],
        )  # fmt: skip
        params[first["size"]] = first[column]
    if not any(c.method == "grpo" for c in cells.values()):
        raise ValueError(f"{folder}: no run of method grpo was imported")
    studies = {s for s in table.column("study").to_pylist() if s}
    return StudyData(
        name=" and ".join(sorted(studies)) or folder.resolve().name, plan=None, runs=runs, missing=(),
        headline=_headline(folder, runs), group_size=_usual_group(cells.values(), tau), params=params,
        table=_with_reuse(table, reuse), tau=tau, cells=cells,
    )  # fmt: skip


def _reuse_of(by_run: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[dict[str, float], float]:
    """The reuse of each imported run, and that of the main runs: the one that the most sizes have.

    The runs of a size are told apart by reuse only where they differ in it. Else they went over their data as often as
    they did, and are main runs.
    """
    rounded = {name: float(max(1, round(rows[0]["tau"] or 1.0))) for name, rows in by_run.items()}
    of_size: dict[tuple[str, str, str], set[float]] = {}
    for name, rows in by_run.items():
        of_size.setdefault((rows[0]["size"], rows[0]["kind"], rows[0]["method"]), set()).add(rounded[name])
    counts = Counter(tau for taus in of_size.values() for tau in taus)
    usual = min(counts, key=lambda tau: (-counts[tau], tau))
    out = {}
    for name, rows in by_run.items():
        alike = len(of_size[rows[0]["size"], rows[0]["kind"], rows[0]["method"]]) == 1
        out[name] = usual if alike else rounded[name]
    return out, usual


def _with_reuse(table: pyarrow.Table, reuse: Mapping[str, float]) -> pyarrow.Table:
    """The table with the reuse that its runs are told apart by."""
    import pyarrow as pa

    tau = pa.array([reuse[name] for name in table.column("run_id").to_pylist()], type=pa.float64())
    return table.set_column(table.column_names.index("tau"), table.schema.field("tau"), tau)


COUNTERS = ("prompts_seen", "unique_prompts", "trained_tokens", "compute_6nt", "compute_ledger")


def params_of(table: pyarrow.Table) -> str:
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


def mean_steps(runs: Sequence[Run], name: str) -> tuple[list[float], list[float]]:
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


def costs_of(data: StudyData) -> list[tuple[str, dict[str, PhaseCost]]]:
    """Mean cost by phase of each size's main runs and of its controls, those of one size side by side."""
    groups = [
        (f"{size} {name}", [r for r in runs if r.timings])
        for size in data.sizes
        for kind in data.kinds
        for name, runs in ((kind, data.main(size, kind)), (f"{kind} control", data.control(size, kind)))
    ]
    return [(label, mean_cost([total_cost(r.timings) for r in runs])) for label, runs in groups if runs]


def transfer_rows(data: StudyData, mode: str) -> list[tuple[str, bool, str, str, Point, Point]]:
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
