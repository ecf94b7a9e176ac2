"""From a long table of evaluations to fitted laws with honest intervals, and a verdict on whether the data carry them.

    table -> curves (runs averaged per size and step) -> a law for each size, one for all -> intervals -> verdict

Input is the table of `records.runs_table` (or of `importers`, for the logs of other frameworks). The procedure is that
of Tan et al. 2025, arXiv:2509.25300, as found in their code: runs are averaged for each size and step, step 0 is left
out, and the objective ("linear") is the mean squared error of the *loss*, every size having the same total weight. The
objective "log" takes the error of log L instead. Unlike them we report intervals, the fit of every size by itself, a
prediction of the largest size from the others, a comparison of forms of k(N), and a verdict.

Given k, the best E of a curve has a closed form: L = A z with z = (X / X_c)^-k is linear in A (and log L is linear in
log A), so a joint fit has only the two parameters of k(N), however many sizes there are (variable projection, Golub
and Pereyra 1973). X_c is the geometric mean of the curve's X, which also takes away most of the correlation of k with
the level.

Intervals are 95 % percentile intervals of a bootstrap. Two things are drawn anew, both around the fitted curves:
  * moving blocks of residuals along each curve (Kuensch 1989), as long as their autocorrelation asks for:
    neighbouring points of a curve are not independent, and a misfit of the law is not noise;
  * runs, wherever a size has at least two: the deviations of whole runs from their mean, times sqrt(n / (n - 1)). The
    blocks are then scaled down to the part of the residuals that the spread of runs does not explain already.
They do not cover which problems were evaluated (all runs answer the same ones) nor which sizes were chosen; for the
latter `JointFit.without_one` shows how far the law moves when one size is left out. In simulations of five sizes (150
or 200 data sets each) the intervals of K_max and N0 held the truth in 91 to 95 % of cases, with white noise or with two
or three runs that drift apart. They are too narrow, holding it in 80 %, for one run whose noise has an autocorrelation
of .8 over 60 points; and so are those of a single size's own k with two (74 %) or three (82 %) runs that drift.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
from scipy.optimize import least_squares
from scipy.special import ndtri, stdtrit

from .. import records
from .laws import SLOPES, CurveLaw, ExponentialSaturation, JointLaw, LogLinear, ScaleRLSigmoid, Slope

if TYPE_CHECKING:
    import pyarrow

AXES = {  # name of an axis -> column of the table
    "data": "prompts_seen",
    "compute": "compute_6nt",
    "ledger": "compute_ledger",
    "tokens": "trained_tokens",
}
OBJECTIVES = ("linear", "log")
PARAMS = {"non_embedding": "params_non_embedding", "nominal": "params_nominal"}
MIN_POINTS = 4  # of a curve: fewer say nothing about a slope and its scatter
MIN_SIZES = 3  # of a joint law: its two slope parameters pass through any two sizes
CHI2 = 3.84  # 95 % quantile of chi squared with one degree of freedom: profile intervals


# ---------------------------------------------------------------------------------------- what comes out


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether the data carry a fit. `why` is empty when they do; `cautions` are true either way."""

    ok: bool
    why: str = ""
    cautions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A parameter with its 95 % interval (None: no interval was made)."""

    value: float
    low: float | None = None
    high: float | None = None
    at_bound: str = ""  # "low" or "high" when the search ended at a bound: then it is not an estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Bootstrap:
    """How the intervals were made."""

    draws: int
    level: float
    seed: int
    method: str  # a sentence: what was drawn anew
    runs_resampled: tuple[str, ...]  # labels of the curves with at least two runs
    block: tuple[int, ...]  # block length of each curve, in points


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeFit:
    """The law of one curve by itself: log L = -k log X + E."""

    label: str  # size, and kind where several are fitted together
    size: str
    kind: str
    params: float  # N
    k: Estimate
    E: Estimate  # log of the loss at X = 1
    r2: float | None  # linear space; None when all losses are equal
    rmse: float
    noise: float  # standard deviation of the points about the fitted curve
    num_points: int
    num_runs: int
    x_min: float
    x_max: float
    loss_before: float | None  # at step 0, where it was evaluated
    loss_first: float  # of the fitted curve at x_min
    loss_last: float  # of the fitted curve at x_max
    compute_per_prompt: float | None  # 6NT FLOPs for each prompt seen, at the end
    prompts_per_step: float | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveLevel:
    """One curve under the joint law."""

    label: str
    size: str
    kind: str
    params: float
    k: Estimate  # k(N) of the law
    E: Estimate
    r2: float | None  # of this curve under the joint law: pooled R2 hides a curve that is missed
    rmse: float
    num_points: int
    num_runs: int
    x_min: float
    x_max: float
    log_x_mean: float  # where the level of this curve is least correlated with its slope


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """The objective along N0, K_max being refitted at each: does a minimum stand out at all?

    `low` and `high` are where the likelihood ratio reaches 3.84 (95 %), with the number of points reduced for their
    autocorrelation; None where that does not happen inside the bounds: the data do not limit N0 on that side.
    """

    N0: tuple[float, ...]
    K_max: tuple[float, ...]
    objective: tuple[float, ...]
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class WithoutOne:
    """The joint law with one size left out."""

    size: str
    parameters: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The largest size, predicted from the others.

    The slope always comes from the other sizes. The level comes from all points of the target ("calibrated": only the
    slope is tested, as in Tan et al.), from its first points, or from the levels of the other sizes alone, continued
    in log N ("blind": nothing of the target is used). bias is predicted minus measured loss, averaged.
    """

    label: str
    params: float
    parameters: dict[str, float]  # of the law fitted to the others
    k_predicted: float
    k_own: Estimate  # of this curve by itself
    first_points: int
    r2_calibrated: float | None
    rmse_calibrated: float
    r2_first: float | None
    rmse_first: float
    bias_first: float
    r2_blind: float | None
    rmse_blind: float
    bias_blind: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FormScore:
    """One form of k(N): in the sample, and on sizes that it did not see."""

    form: str
    formula: str
    parameters: dict[str, float]
    objective: float
    k_error: float | None  # root mean square over left-out sizes of predicted minus own slope
    loss_error: float | None  # likewise of the loss, the level being calibrated
    negative_sizes: tuple[str, ...]  # sizes at which this form says that the loss rises


@dataclass(frozen=True, kw_only=True, slots=True)
class FormComparison:
    """Forms of k(N) by leave-one-size-out. `separable`: the best beats every other by two standard errors."""

    scores: tuple[FormScore, ...]
    best: str
    separable: bool
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeFit:
    """A form of the curve of one size, with or without a ceiling."""

    label: str
    shape: str
    formula: str
    parameters: dict[str, Estimate]  # the interval of A is a profile interval, None on a side that is open
    rmse: float
    r2: float | None
    bias_ahead: float | None  # fitted to the first 40 %, predicted minus measured loss over the last 20 %
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class JointFit:
    """One law for all curves of an axis."""

    axis: str  # a key of AXES
    kind: str  # "base", "instruct", ... or "all"
    form: str  # a key of laws.SLOPES
    formula: str
    objective: str
    parameters: dict[str, Estimate]
    fixed: dict[str, float]  # constants of the form
    curves: tuple[CurveLevel, ...]
    r2: float | None  # pooled over all points, linear space: mostly variance *between* sizes
    objective_value: float  # mean over curves of the mean squared error
    num_points: int
    bootstrap: Bootstrap
    draws: tuple[tuple[float, ...], ...]  # of the parameters in order, then of E in the order of curves
    profile: Profile | None
    without_one: tuple[WithoutOne, ...]
    verdict: Verdict

    @property
    def slope(self) -> Slope:
        """The fitted k(N)."""
        return SLOPES[self.form](**{n: e.value for n, e in self.parameters.items()}, **self.fixed)

    @property
    def law(self) -> JointLaw:
        """The fitted law, curves in the order of `curves`."""
        return JointLaw(
            slope=self.slope, n=tuple(c.params for c in self.curves), E=tuple(c.E.value for c in self.curves)
        )

    def index(self, label: str) -> int:
        """Place of a curve in `curves`.

        Args:
            label: as in `CurveLevel.label`.

        Returns:
            Its index.

        Raises:
            ValueError: no such curve; the message lists them.
        """
        for i, c in enumerate(self.curves):
            if c.label == label:
                return i
        raise ValueError(f"label must be one of {[c.label for c in self.curves]}, got {label!r}")

    def loss(self, label: str, x: np.ndarray | Sequence[float] | float) -> np.ndarray:
        """Loss that the law says.

        Args:
            label: which curve.
            x: [...] float, positive, in the unit of the axis.

        Returns:
            [...] float64.

        Raises:
            ValueError: no such curve.
        """
        return self.law.loss(x, self.index(label))

    def loss_draws(self, label: str, x: np.ndarray | Sequence[float] | float) -> np.ndarray:
        """Loss that the law of each bootstrap draw says.

        Args:
            label: which curve.
            x: [...] float, positive.

        Returns:
            [draws, ...] float64.

        Raises:
            ValueError: no such curve.
        """
        i, log_x = self.index(label), np.log(np.asarray(x, dtype=np.float64))
        k, levels = draws_of(self, np.array([self.curves[i].params]))
        wide = (slice(None), *([None] * log_x.ndim))
        return np.exp(levels[:, i][wide] - k[:, 0][wide] * log_x)

    def band(self, label: str, x: np.ndarray | Sequence[float] | float) -> tuple[np.ndarray, np.ndarray]:
        """95 % band of the fitted curve: where the law is, not where a single run would be.

        Args:
            label: which curve.
            x: [...] float, positive.

        Returns:
            (low, high), each [...] float64.

        Raises:
            ValueError: no such curve.
        """
        low, high = interval(self.loss_draws(label, x))
        return low, high


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


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisFit:
    """Everything that was fitted for one axis and one kind of model."""

    axis: str
    kind: str
    selection: Selection
    left_out: tuple[str, ...]  # what of the table could not be used, and why
    sizes: tuple[SizeFit, ...]
    joint: JointFit | None  # None when there is only one size
    forms: FormComparison | None
    held_out: tuple[HeldOut, ...]
    shapes: tuple[ShapeFit, ...]
    verdict: Verdict  # of the joint law, or why there is none


@dataclass(frozen=True, kw_only=True, slots=True)
class Fits:
    """All fits of a study; the content of fits.json."""

    objective: str
    fits: tuple[AxisFit, ...]

    def get(self, axis: str, kind: str) -> AxisFit:
        """The fit of an axis and a kind.

        Args:
            axis: a key of `AXES`.
            kind: kind of model, or "all".

        Returns:
            The fit.

        Raises:
            ValueError: there is none; the message lists those that are there.
        """
        for f in self.fits:
            if (f.axis, f.kind) == (axis, kind):
                return f
        raise ValueError(f"no fit of {(axis, kind)}; there are {[(f.axis, f.kind) for f in self.fits]}")


def write_fits(path: str | os.PathLike[str], fits: Fits) -> None:
    """Writes fits.json atomically.

    Args:
        path: the file; its folder must exist.
        fits: what to write.

    Raises:
        OSError: the folder is missing or not writable.
    """
    records.write_json_atomic(path, fits)


def read_fits(path: str | os.PathLike[str]) -> Fits:
    """Reads what `write_fits` wrote, exactly.

    Args:
        path: the file.

    Returns:
        The fits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another schema, or a field that is missing or unknown; the message names the file and the place.
    """
    obj = records.read_json(path)
    obj.pop("schema")
    return _build(Fits, obj, f"{os.fspath(path)}: fits")


def _build(hint: Any, value: Any, where: str) -> Any:
    """A typed value from its JSON form."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [h for h in get_args(hint) if h is not type(None)]
        return None if value is None else _build(inner[0], value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: must be an object, got {value!r}")
        hints = get_type_hints(hint)
        if set(value) != set(hints):
            odd = sorted(set(value) ^ set(hints))
            raise ValueError(f"{where}: the fields of {hint.__name__} are not those expected: {', '.join(odd)}")
        return hint(**{n: _build(h, value[n], f"{where}.{n}") for n, h in hints.items()})
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: must be a list, got {value!r}")
        return tuple(_build(get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        return {n: _build(get_args(hint)[1], v, f"{where}.{n}") for n, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint):
        raise ValueError(f"{where}: must be {hint.__name__}, got {value!r}")
    return value


# --------------------------------------------------------------------------------------------- curves


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
    if missing := [c for c in records.TABLE_COLUMNS if c not in table.column_names]:
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
    curves, left_out = [], []
    for (n, size, one_kind), mine in sorted(groups.items()):
        label = f"{size} {one_kind}" if several else size
        curve = _curve(mine, label, size, one_kind, n, AXES[axis], min_step, max_step, left_out)
        if curve is not None:
            curves.append(curve)
    return curves, selection, left_out


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
    # the same step of two runs is the same point, unless their batches differ and with them the data
    points: dict[tuple[int, int | None], list[dict[str, Any]]] = {}
    for r in good:
        points.setdefault((r["step"], r["prompts_seen"]), []).append(r)
    means = sorted((float(np.mean([r[column] for r in p])), key) for key, p in points.items())
    if len(means) < MIN_POINTS:
        left_out.append(f"{label}: {len(means)} points, fewer than {MIN_POINTS}")
        return None
    keys = [key for _, key in means]
    runs = sorted({str(r["run_id"]) for r in good})
    place = {run: i for i, run in enumerate(runs)}
    by_run = np.full((len(runs), len(keys)), np.nan)
    for j, key in enumerate(keys):
        for r in points[key]:
            if not math.isnan(by_run[place[str(r["run_id"])], j]):
                raise ValueError(f"run_id {r['run_id']!r} has two rows at step {r['step']} of size {size!r}")
            by_run[place[str(r["run_id"])], j] = r["loss"]
    loss = np.nanmean(by_run, axis=0)
    if not np.all(np.isfinite(loss)) or not np.mean(loss) > 0:
        left_out.append(f"{label}: its mean loss is {float(np.mean(loss)):g}, and the law needs one above 0")
        return None
    ends = [r for r in good if r["step"] == max(g["step"] for g in good)]
    per_prompt = [r["compute_6nt"] / r["prompts_seen"] for r in ends if finite(r["compute_6nt"]) and r["prompts_seen"]]
    per_step = [r["prompts_seen"] / r["step"] for r in ends if r["prompts_seen"]]
    return Curve(
        label=label, size=size, kind=kind, params=n, step=np.array([k[0] for k in keys]),
        x=np.array([x for x, _ in means]), loss=loss, by_run=by_run,
        loss_before=float(np.mean(before)) if before else None,
        compute_per_prompt=float(np.mean(per_prompt)) if per_prompt else None,
        prompts_per_step=float(np.mean(per_step)) if per_step else None,
    )  # fmt: skip


# ------------------------------------------------------------------------- the projected least squares


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Points:
    """All points of several curves end to end: M curves, n points."""

    n: np.ndarray  # [M] parameters
    center: np.ndarray  # [M] mean of log x
    u: np.ndarray  # [n] log x minus the center of its curve
    y: np.ndarray  # [n] loss, or log loss for the objective "log"
    curve: np.ndarray  # [n] int, which curve
    start: np.ndarray  # [M] int, first point of each curve
    count: np.ndarray  # [M] int
    weight: np.ndarray  # [n] square root of the weight of a squared error: the same total for each curve
    log: bool


def _points(curves: Sequence[Curve], objective: str) -> _Points:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {list(OBJECTIVES)}, got {objective!r}")
    count = np.array([len(c.x) for c in curves])
    curve = np.repeat(np.arange(len(curves)), count)
    center = np.array([np.mean(np.log(c.x)) for c in curves])
    log = objective == "log"
    for c in curves:
        if log and not np.all(c.loss > 0):
            raise ValueError(f"objective 'log': size {c.label!r} has a mean loss of 0 somewhere; use 'linear'")
    y = np.concatenate([c.loss for c in curves])
    return _Points(
        n=np.array([c.params for c in curves]),
        center=center,
        u=np.concatenate([np.log(c.x) for c in curves]) - center[curve],
        y=np.log(y) if log else y,
        curve=curve,
        start=np.concatenate([[0], np.cumsum(count)[:-1]]),
        count=count,
        weight=1.0 / np.sqrt(count[curve] * len(curves)),
        log=log,
    )


def _project(p: _Points, k: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals for given slopes, the levels being the best, of one data set or of several.

    k: [..., M]; y: [..., n]. Returns (residual [..., n], d residual / d k of its curve [..., n], log level [..., M]).
    """

    def total(v: np.ndarray) -> np.ndarray:
        return np.add.reduceat(v, p.start, axis=-1)

    if p.log:
        level = total(y) / p.count  # u has mean 0, so the slope does not enter
        residual = level[..., p.curve] - k[..., p.curve] * p.u - y
        return residual, np.broadcast_to(-p.u, residual.shape), level
    z = np.exp(-k[..., p.curve] * p.u)
    zz = total(z * z)
    level = total(z * y) / zz
    d_level = (-total(p.u * z * y) + 2.0 * level * total(p.u * z * z)) / zz
    fitted = level[..., p.curve] * z
    slope = (d_level[..., p.curve] - level[..., p.curve] * p.u) * z
    return fitted - y, slope, np.log(np.maximum(level, 1e-300))


def _objective(p: _Points, residual: np.ndarray) -> float:
    return float(np.sum((p.weight * residual) ** 2))


def _own_slopes(p: _Points, y: np.ndarray) -> np.ndarray:
    """The best slope of each curve by itself, for many data sets at once.

    y: [B, n]. Returns [B, M]. The objective "log" is linear regression; "linear" starts there and takes Gauss-Newton
    steps on the projected residual, halved until they help.
    """
    out = np.empty((y.shape[0], len(p.n)))
    for m, (start, count) in enumerate(zip(p.start, p.count, strict=True)):
        u, v = p.u[start : start + count], y[:, start : start + count]
        spread = u @ u
        if p.log:
            out[:, m] = -(v @ u) / spread
            continue
        k = -((v - v.mean(axis=1, keepdims=True)) @ u) / (spread * np.maximum(v.mean(axis=1), 1e-12))
        k = np.clip(k, -2.0, 2.0)

        def sse(k: np.ndarray, u: np.ndarray = u, v: np.ndarray = v) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            z = np.exp(-k[:, None] * u)
            zz = np.sum(z * z, axis=1)
            level = np.sum(z * v, axis=1) / zz
            d_level = (-np.sum(u * z * v, axis=1) + 2 * level * np.sum(u * z * z, axis=1)) / zz
            r = level[:, None] * z - v
            d = (d_level[:, None] - level[:, None] * u) * z
            return np.sum(r * r, axis=1), np.sum(r * d, axis=1), np.sum(d * d, axis=1)

        now, grad, curvature = sse(k)
        for _ in range(40):
            step = np.clip(-grad / np.maximum(curvature, 1e-300), -0.5, 0.5)
            for _ in range(12):
                there, grad_there, curvature_there = sse(np.clip(k + step, -2.0, 2.0))
                worse = there > now
                if not worse.any():
                    break
                step = np.where(worse, step / 2, step)
            step = np.where(there > now, 0.0, step)
            k = np.clip(k + step, -2.0, 2.0)
            now, grad, curvature = np.where(there > now, now, there), grad_there, curvature_there
            if np.max(np.abs(step)) < 1e-11:
                break
        out[:, m] = k
    return out


def _theta(slope: Slope) -> np.ndarray:
    return np.array([math.log(getattr(slope, n)) if n in slope.LOG else getattr(slope, n) for n in slope.PARAMETERS])


def _slope(form: type[Slope], theta: np.ndarray, fixed: dict[str, float]) -> Slope:
    values = {n: float(math.exp(t) if n in form.LOG else t) for n, t in zip(form.PARAMETERS, theta, strict=True)}
    return form(**values, **fixed)


def _theta_bounds(form: type[Slope], n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    b = form.bounds(n)
    ends = [(b[q].low, b[q].high) for q in form.PARAMETERS]
    ends = [tuple(map(math.log, e)) if q in form.LOG else e for q, e in zip(form.PARAMETERS, ends, strict=True)]
    return np.array([e[0] for e in ends]), np.array([e[1] for e in ends])


def _solve(
    p: _Points, form: type[Slope], y: np.ndarray, starts: Sequence[np.ndarray], fixed: dict[str, float]
) -> np.ndarray:
    """The best parameters of k(N) from several starts: deterministic, the first of equals wins."""
    low, high = _theta_bounds(form, p.n)

    def k_of(theta: np.ndarray) -> np.ndarray:
        return _slope(form, theta, fixed).k(p.n)

    def residual(theta: np.ndarray) -> np.ndarray:
        return p.weight * _project(p, k_of(theta), y)[0]

    def jacobian(theta: np.ndarray) -> np.ndarray:
        d = p.weight * _project(p, k_of(theta), y)[1]
        return d[:, None] * _jacobian(form, theta[None], fixed, p.n)[0, p.curve]

    best, best_cost = None, math.inf
    inside = 1e-9 * (high - low)  # the solver wants to start strictly inside
    for start in starts:
        fit = least_squares(
            residual, np.clip(start, low + inside, high - inside), jacobian, bounds=(low, high), x_scale="jac",
            ftol=1e-10, xtol=1e-10, gtol=1e-14, max_nfev=200,
        )  # fmt: skip
        if best is None or fit.cost < best_cost * (1 - 1e-9):
            best, best_cost = fit.x, fit.cost
    assert best is not None
    return best


def _slopes(form: type[Slope], theta: np.ndarray, fixed: dict[str, float], n: np.ndarray) -> np.ndarray:
    """k [B, S] at n [S] for many parameter vectors [B, q]."""
    columns = {
        name: np.exp(theta[:, i : i + 1]) if name in form.LOG else theta[:, i : i + 1]
        for i, name in enumerate(form.PARAMETERS)
    }
    return form(**columns, **fixed).k(n)


def _jacobian(form: type[Slope], theta: np.ndarray, fixed: dict[str, float], n: np.ndarray) -> np.ndarray:
    """d k / d theta [B, S, q], by central differences: k(N) is smooth, and its slope law need not know of the fit."""
    out = []
    for i in range(theta.shape[1]):
        h = np.zeros_like(theta)
        h[:, i] = 1e-6 * np.maximum(np.abs(theta[:, i]), 1e-2)
        gap = _slopes(form, theta + h, fixed, n) - _slopes(form, theta - h, fixed, n)
        out.append(gap / (2 * h[:, i : i + 1]))
    return np.stack(out, axis=-1)


def _solve_many(
    p: _Points, form: type[Slope], y: np.ndarray, start: np.ndarray, fixed: dict[str, float]
) -> np.ndarray:
    """`_solve` for many data sets y [B, n] at once, all from one start: Levenberg-Marquardt with projected bounds.

    Returns theta [B, q]. A bootstrap asks for hundreds of fits that differ little from the one they start at; one
    after another they would take most of the time of a report.
    """
    low, high = _theta_bounds(form, p.n)
    theta = np.repeat(np.clip(start, low, high)[None], len(y), axis=0)
    damping = np.full(len(y), 1e-3)

    def cost_of(t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        r, d, _ = _project(p, _slopes(form, t, fixed, p.n), y)
        return np.sum((p.weight * r) ** 2, axis=1), p.weight * r, p.weight * d

    cost, r, d = cost_of(theta)
    for _ in range(60):
        jac = d[:, :, None] * _jacobian(form, theta, fixed, p.n)[:, p.curve, :]
        gradient = np.einsum("bnq,bn->bq", jac, r)
        normal = np.einsum("bnq,bns->bqs", jac, jac)
        # a parameter that sits at a bound and is pushed outwards stays there, and the others move without it
        stuck = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
        free = ~stuck[:, :, None] & ~stuck[:, None, :]
        diagonal = np.einsum("bqq->bq", normal)
        scale = np.where(diagonal > 0, diagonal, 1.0)
        matrix = np.where(free, normal, 0.0) + np.eye(len(low)) * (damping[:, None] * scale + stuck * scale)[:, None, :]
        step = np.linalg.solve(matrix, np.where(stuck, 0.0, -gradient)[:, :, None])[:, :, 0]
        there = np.clip(theta + step, low, high)
        new_cost, new_r, new_d = cost_of(there)
        better = new_cost <= cost
        moved = np.max(np.abs(there - theta) / (1e-3 + np.abs(theta)), axis=1)
        theta = np.where(better[:, None], there, theta)
        r, d = np.where(better[:, None], new_r, r), np.where(better[:, None], new_d, d)
        cost = np.where(better, new_cost, cost)
        damping = np.clip(np.where(better, damping / 5, damping * 8), 1e-12, 1e12)
        if np.all((moved < 1e-9) | (damping >= 1e12)):
            break
    return theta


def _fit_slope(p: _Points, form: type[Slope], own: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Parameters of k(N) and constants of the form, from the three most promising of the form's starts."""
    fixed = form.fixed(p.n)
    starts = [_theta(s) for s in form.starts(p.n, own)]
    starts.sort(key=lambda t: _objective(p, _project(p, _slope(form, t, fixed).k(p.n), p.y)[0]))
    return _solve(p, form, p.y, starts[:3], fixed), fixed


def _at_bound(value: float, low: float, high: float, *, log: bool) -> str:
    """Whether a search ended at a bound: within a millionth of its range, or a thousandth where that is in logs."""
    near = (1e-3 if log else 1e-6) * (high - low)
    return "low" if value - low < near else ("high" if high - value < near else "")


# -------------------------------------------------------------------------------------------- bootstrap


def _autocorrelation(*residuals: np.ndarray) -> float:
    """Lag-1 autocorrelation pooled over curves, in 0 .. 0.95."""
    own = sum(float(r @ r) for r in residuals)
    shifted = sum(float(r[:-1] @ r[1:]) for r in residuals)
    return min(max(shifted / own, 0.0), 0.95) if own > 0 else 0.0


def _block_length(residual: np.ndarray) -> int:
    """How long blocks must be to keep the autocorrelation of a curve: Politis and White 2004, at least a tenth of it.

    Lags count up to twice the first one after which five in a row are insignificant; the tenth guards against a slow
    misfit of the law under much fast noise, which that rule overlooks.
    """
    n = len(residual)
    r = residual - residual.mean()
    var = float(r @ r)
    rho = np.array([float(r[: n - k] @ r[k:]) / var if var > 0 else 0.0 for k in range(n)])
    small = np.abs(rho) < 2 * math.sqrt(math.log10(n) / n)
    last = next((k for k in range(n) if small[k + 1 : k + 6].all()), n - 1)
    lags = np.arange(1, min(2 * last, n - 1) + 1)
    taper = np.minimum(1.0, 2.0 * (1.0 - lags / max(2 * last, 1)))
    weighted = taper * rho[lags]
    ratio = 2 * float(lags @ weighted) / max(1.0 + 2 * float(weighted.sum()), 0.1)
    best = (1.5 * n * ratio**2) ** (1 / 3)
    return max(1, min(math.ceil(max(best, n / 10)), n // 3))


def _resample(
    p: _Points, curves: Sequence[Curve], fitted: np.ndarray, *, spent: float, n_boot: int, rng: np.random.Generator
) -> np.ndarray:
    """[n_boot, n] data sets around fitted values; `spent` is the number of parameters a curve costs.

    A curve of n points in blocks of b has n / b independent pieces, of which the fit has used up `spent`. The scatter
    of few pieces, or of few runs, is itself uncertain, so all deviations are widened as Student's t is wider than the
    normal distribution, at the degrees of freedom of all curves together (Welch-Satterthwaite within a curve).
    """
    out = np.zeros((n_boot, len(fitted)))
    freedom = 0.0
    for m, c in enumerate(curves):
        part = slice(p.start[m], p.start[m] + p.count[m])
        n = int(p.count[m])
        residual = p.y[part] - fitted[part]
        length = _block_length(residual)
        pieces = max(n / length - spent, 1.0)
        residual = (residual - residual.mean()) * math.sqrt(n / length / pieces)
        explained = 0.0
        if len(c.by_run) > 1:
            deviation = c.by_run - c.loss
            if p.log:
                deviation = deviation / c.loss  # d log L
            there = ~np.isnan(deviation)
            deviation = np.where(there, deviation, 0.0)
            runs = there.sum(axis=0)
            variance = np.sum(deviation**2, axis=0) / np.maximum(runs * (runs - 1), 1)  # of the mean over runs
            explained = float(np.mean(variance))
            r = len(c.by_run)
            times = rng.multinomial(r, [1 / r] * r, size=n_boot)
            shift = (times @ deviation) / np.maximum(times @ there, 1)
            out[:, part] += shift * math.sqrt(r / (r - 1))
        total = float(np.mean(residual**2))
        share = math.sqrt(max(0.0, 1.0 - explained / total)) if total > 0 else 0.0
        rest = share * share * total
        if explained + rest > 0:
            freedom += (explained + rest) ** 2 / (explained**2 / max(len(c.by_run) - 1, 1) + rest**2 / pieces)
        first = rng.integers(0, n - length + 1, size=(n_boot, -(-n // length)))
        index = (first[:, :, None] + np.arange(length)).reshape(n_boot, -1)[:, :n]
        drawn = residual[index]
        out[:, part] += share * (drawn - drawn.mean(axis=1, keepdims=True))
    wider = float(stdtrit(freedom, 0.975) / ndtri(0.975)) if freedom > 0 else 1.0
    return fitted + wider * out


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[Any, Any]:
    """Percentile interval over the first axis.

    Args:
        draws: [draws, ...] float.
        level: share of the draws inside.

    Returns:
        (low, high), each [...].
    """
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def draws_of(fit: JointFit, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each bootstrap draw of a joint fit says about slopes and levels.

    Args:
        fit: the fit.
        n: [S] parameters at which k is wanted; they need not have been measured.

    Returns:
        k [draws, S], and E of the fit's curves [draws, M].
    """
    form, names = SLOPES[fit.form], list(fit.parameters)
    draws = np.asarray(fit.draws)
    columns = {q: draws[:, i : i + 1] for i, q in enumerate(names)}
    return form(**columns, **fit.fixed).k(n), draws[:, len(names) :]


def _estimate(value: float, draws: np.ndarray, at_bound: str = "") -> Estimate:
    low, high = interval(draws)
    return Estimate(value=float(value), low=float(low), high=float(high), at_bound=at_bound)


# --------------------------------------------------------------------------------------------- verdicts


def _r2(y: np.ndarray, fitted: np.ndarray) -> float | None:
    total = float(np.sum((y - y.mean()) ** 2))
    rounding = len(y) * (1e-14 * float(np.max(np.abs(y)))) ** 2
    return 1.0 - float(np.sum((y - fitted) ** 2)) / total if total > rounding else None


def _verdict(why: list[str], cautions: Sequence[str] = ()) -> Verdict:
    return Verdict(ok=not why, why="; ".join(why), cautions=tuple(cautions))


def _spread(e: Estimate) -> float | None:
    """Ratio of the ends of an interval; infinite when it touches 0; None without one."""
    if e.low is None or e.high is None:
        return None
    return e.high / e.low if e.low > 0 else math.inf


def _fit_sizes(curves: Sequence[Curve], objective: str, n_boot: int, seed: int) -> list[SizeFit]:
    p = _points(curves, objective)
    k = _own_slopes(p, p.y[None])[0]
    residual, _, level = _project(p, k, p.y)
    y = _resample(p, curves, p.y + residual, spent=2, n_boot=n_boot, rng=np.random.default_rng([seed, 1]))
    k_draws = _own_slopes(p, y)
    level_draws = _project(p, k_draws, y)[2]
    out = []
    for m, c in enumerate(curves):
        e = level[m] + k[m] * p.center[m]
        law = LogLinear(k=float(k[m]), E=float(e))
        fitted = law.loss(c.x)
        noise = math.sqrt(float(np.sum((c.loss - fitted) ** 2)) / (len(c.x) - 2))
        k_est = _estimate(k[m], k_draws[:, m], _at_bound(k[m], -2.0, 2.0, log=False))
        change = abs(float(fitted[0] - fitted[-1]))
        why = []
        if k_est.at_bound:
            why.append("its slope ended at a bound of the search")
        if k[m] < 1e-9:  # a slope below that is rounding: over any range of X it changes no digit that is printed
            why.append(f"its loss does not fall (k = {k[m]:.4f})")
        elif k_est.low is not None and k_est.low <= 0:
            why.append(f"its slope cannot be told from 0 ({k_est.low:.4f} to {k_est.high:.4f})")
        if change < noise:
            why.append(f"its loss changes by {change:.4f} over the measured range, less than the {noise:.4f} scatter")
        out.append(
            SizeFit(
                label=c.label, size=c.size, kind=c.kind, params=c.params, k=k_est,
                E=_estimate(e, level_draws[:, m] + k_draws[:, m] * p.center[m]), r2=_r2(c.loss, fitted),
                rmse=float(np.sqrt(np.mean((c.loss - fitted) ** 2))), noise=noise, num_points=len(c.x),
                num_runs=len(c.by_run), x_min=float(c.x[0]), x_max=float(c.x[-1]), loss_before=c.loss_before,
                loss_first=float(fitted[0]), loss_last=float(fitted[-1]), compute_per_prompt=c.compute_per_prompt,
                prompts_per_step=c.prompts_per_step, verdict=_verdict(why),
            )
        )  # fmt: skip
    return out


def _sizes(p: _Points) -> np.ndarray:
    return np.unique(p.n)


def _keep(curves: Sequence[Curve], wanted: np.ndarray | list[bool]) -> list[Curve]:
    return [c for c, w in zip(curves, wanted, strict=True) if w]


def _profile(p: _Points, theta: np.ndarray) -> Profile:
    """The objective along N0 of the saturating form."""
    form = SLOPES["saturating"]
    low, high = _theta_bounds(form, p.n)
    residual = _project(p, _slope(form, theta, {}).k(p.n), p.y)[0]
    best = _objective(p, residual)
    rho = _autocorrelation(*np.split(residual, p.start[1:]))
    effective = len(p.y) * (1 - rho) / (1 + rho)
    grid = np.linspace(low[1], high[1], 41)
    k_max, values = [], []
    warm = theta[0]
    for log_n0 in sorted(grid, key=lambda g: abs(g - theta[1])):  # outwards from the best, each from its neighbour

        def of(t: np.ndarray, log_n0: float = float(log_n0)) -> np.ndarray:
            return p.weight * _project(p, _slope(form, np.array([t[0], log_n0]), {}).k(p.n), p.y)[0]

        def jac(t: np.ndarray, log_n0: float = float(log_n0)) -> np.ndarray:
            d = _project(p, _slope(form, np.array([t[0], log_n0]), {}).k(p.n), p.y)[1]
            share = p.n / (p.n + math.exp(log_n0))
            return (p.weight * d * share[p.curve])[:, None]

        start = np.clip([warm], low[0] + 1e-9, high[0] - 1e-9)
        fit = least_squares(of, start, jac, bounds=(low[:1], high[:1]), ftol=1e-9, xtol=1e-9)
        k_max.append((log_n0, float(fit.x[0]), 2 * float(fit.cost)))
    k_max.sort()
    values = np.array([v for _, _, v in k_max])
    floor = max(best, float(np.finfo(float).tiny))
    ratio = effective * np.log(np.maximum(values, floor) / floor)
    at = np.array([g for g, _, _ in k_max])

    def crossing(side: int) -> float | None:
        """N0 where the ratio crosses 3.84 going left (-1) or right (+1) from the best; None if it never does."""
        left, value = float(theta[1]), 0.0
        order = at[at > theta[1]] if side > 0 else at[at < theta[1]][::-1]
        for g in order:
            here = float(ratio[np.searchsorted(at, g)])
            if here > CHI2:
                return math.exp(left + (g - left) * (CHI2 - value) / (here - value))
            left, value = float(g), here
        return None

    return Profile(
        N0=tuple(math.exp(g) for g in at), K_max=tuple(k for _, k, _ in k_max), objective=tuple(map(float, values)),
        low=crossing(-1), high=crossing(+1),
    )  # fmt: skip


def fit_joint(
    curves: Sequence[Curve],
    *,
    axis: str,
    kind: str = "all",
    form: str = "saturating",
    objective: str = "linear",
    n_boot: int = 200,
    seed: int = 0,
    sizes: Sequence[SizeFit] | None = None,
) -> JointFit:
    """Fits log L = -k(N) log X + E(N) to all curves at once, E being free for each.

    Args:
        curves: as `select_curves` gives them; at least two sizes.
        axis: what X is; recorded.
        kind: which kind of model; recorded.
        form: a key of `laws.SLOPES`.
        objective: "linear" or "log".
        n_boot: bootstrap draws, at least 20.
        seed: of the draws; the same seed gives the same intervals.
        sizes: fits of the single curves, for the verdict; None makes them.

    Returns:
        The fit. Look at its verdict before its numbers.

    Raises:
        ValueError: a wrong argument, or fewer than two sizes.
    """
    if form not in SLOPES:
        raise ValueError(f"form must be one of {list(SLOPES)}, got {form!r}")
    if n_boot < 20:
        raise ValueError(f"n_boot must be at least 20 (a 95 % interval needs draws beyond its ends), got {n_boot}")
    if len({c.params for c in curves}) < 2:
        raise ValueError(f"curves: a joint law needs at least two sizes, got {[c.label for c in curves]}")
    if sizes is None:
        sizes = _fit_sizes(curves, objective, n_boot, seed)
    p, cls = _points(curves, objective), SLOPES[form]
    own = np.array([s.k.value for s in sizes])
    theta, fixed = _fit_slope(p, cls, own)
    slope = _slope(cls, theta, fixed)
    k = slope.k(p.n)
    residual, _, level = _project(p, k, p.y)
    e = level + k * p.center
    spent = 1 + len(theta) / len(curves)
    y = _resample(p, curves, p.y + residual, spent=spent, n_boot=n_boot, rng=np.random.default_rng([seed, 2]))
    thetas = _solve_many(p, cls, y, theta, fixed)
    k_draws = _slopes(cls, thetas, fixed, p.n)
    level_draws = _project(p, k_draws, y)[2] + k_draws * p.center
    values = [np.exp(t) if q in cls.LOG else t for q, t in zip(cls.PARAMETERS, thetas.T, strict=True)]
    drawn = np.concatenate([np.stack(values, axis=1), level_draws], axis=1)
    draws = np.array([[float(f"{v:.9g}") for v in row] for row in drawn])  # so that fits.json stays small
    low, high = _theta_bounds(cls, p.n)
    parameters = {
        q: _estimate(getattr(slope, q), draws[:, i], _at_bound(theta[i], low[i], high[i], log=q in cls.LOG))
        for i, q in enumerate(cls.PARAMETERS)
    }
    law = JointLaw(slope=slope, n=tuple(map(float, p.n)), E=tuple(map(float, e)))
    levels, fitted_all, loss_all = [], [], []
    for m, c in enumerate(curves):
        fitted = law.loss(c.x, m)
        fitted_all.append(fitted)
        loss_all.append(c.loss)
        levels.append(
            CurveLevel(
                label=c.label, size=c.size, kind=c.kind, params=c.params, k=_estimate(k[m], k_draws[:, m]),
                E=_estimate(e[m], draws[:, len(theta) + m]), r2=_r2(c.loss, fitted),
                rmse=float(np.sqrt(np.mean((c.loss - fitted) ** 2))), num_points=len(c.x), num_runs=len(c.by_run),
                x_min=float(c.x[0]), x_max=float(c.x[-1]), log_x_mean=float(p.center[m]),
            )
        )  # fmt: skip
    profile = _profile(p, theta) if form == "saturating" else None
    without = []
    if len(_sizes(p)) > MIN_SIZES:
        for n in _sizes(p):
            keep = p.n != n
            part = _points(_keep(curves, keep), objective)
            t, f = _fit_slope(part, cls, own[keep])
            one = _slope(cls, t, f)
            name = next(c.size for c in curves if c.params == n)
            without.append(WithoutOne(size=name, parameters={q: getattr(one, q) for q in cls.PARAMETERS}))
    resampled = tuple(c.label for c in curves if len(c.by_run) > 1)
    boot = Bootstrap(
        draws=n_boot, level=0.95, seed=seed, method=_method(resampled, len(curves)), runs_resampled=resampled,
        block=tuple(_block_length(residual[p.curve == m]) for m in range(len(curves))),
    )  # fmt: skip
    return JointFit(
        axis=axis, kind=kind, form=form, formula=cls.FORMULA, objective=objective, parameters=parameters, fixed=fixed,
        curves=tuple(levels), r2=_r2(np.concatenate(loss_all), np.concatenate(fitted_all)),
        objective_value=_objective(p, residual), num_points=len(p.y), bootstrap=boot,
        draws=tuple(tuple(map(float, row)) for row in draws), profile=profile, without_one=tuple(without),
        verdict=_joint_verdict(cls, parameters, levels, sizes, profile, without, resampled),
    )  # fmt: skip


def _method(resampled: Sequence[str], num_curves: int) -> str:
    blocks = "moving blocks of residuals along each curve"
    if not resampled:
        return f"{blocks}; no size has two runs, so the spread between runs is not covered"
    where = "every curve" if len(resampled) == num_curves else f"{len(resampled)} of {num_curves} curves"
    return f"{blocks}, and runs at {where}"


def _joint_verdict(
    cls: type[Slope], parameters: dict[str, Estimate], levels: Sequence[CurveLevel], sizes: Sequence[SizeFit],
    profile: Profile | None, without: Sequence[WithoutOne], resampled: Sequence[str],
) -> Verdict:  # fmt: skip
    why, cautions = [], []
    num_sizes = len({c.params for c in levels})
    if num_sizes < MIN_SIZES:
        why.append(f"{num_sizes} sizes, and a law of two parameters needs at least {MIN_SIZES}")
    falling = {s.params for s in sizes if s.verdict.ok}
    if len(falling) < 2:
        names = [s.label for s in sizes if s.verdict.ok] or ["none"]
        why.append(f"a loss that falls beyond its scatter is needed at 2 sizes, and is seen at: {', '.join(names)}")
    for name, e in parameters.items():
        if e.at_bound:
            end = "lowest" if e.at_bound == "low" else "highest"
            why.append(f"{name} ended at the {end} value allowed, {e.value:.4g}, so the data do not determine it")
    if cls.NAME == "saturating":
        for name, e in parameters.items():
            ratio = _spread(e)
            if ratio is not None and ratio >= 10 and not e.at_bound:
                why.append(f"the interval of {name} spans a factor of {ratio:.3g} ({e.low:.3g} to {e.high:.3g})")
        if profile is not None:
            for side, end in (("below", profile.low), ("above", profile.high)):
                if end is None:
                    why.append(f"the profile of N0 stays flat: the data do not limit it from {side}")
    for name in cls.PARAMETERS:
        values = [w.parameters[name] for w in without]
        if values and min(*values, parameters[name].value) > 0 and max(values) / min(values) >= 3:
            worst = max(without, key=lambda w: abs(math.log(w.parameters[name] / parameters[name].value)))
            cautions.append(
                f"{name} moves to {worst.parameters[name]:.3g} without size {worst.size}: it hangs on that size"
            )
    for c in levels:
        if c.r2 is not None and c.r2 < 0:
            cautions.append(f"the law describes {c.label} worse than a constant would (R2 {c.r2:.2f})")
    for s in sizes:
        if not s.verdict.ok:
            cautions.append(f"{s.label}: {s.verdict.why}")
    if not resampled:
        cautions.append("one run a size: the intervals do not cover the spread between runs")
    elif len(resampled) < len(levels):
        cautions.append("some sizes have a single run: their spread between runs is not covered")
    return _verdict(why, cautions)


# ------------------------------------------------------------------------------- held-out sizes and forms


def _level_for(c: Curve, k: float, log_x: float, objective: str, points: slice = slice(None)) -> float:
    """Log of the loss at log_x that describes some points of a curve best, for a given slope."""
    u, loss = np.log(c.x[points]) - log_x, c.loss[points]
    if objective == "log":
        return float(np.mean(np.log(loss) + k * u))
    z = np.exp(-k * u)
    return math.log(max(float(z @ loss) / float(z @ z), 1e-300))


def _held_out(curves: Sequence[Curve], sizes: Sequence[SizeFit], objective: str) -> list[HeldOut]:
    """Predicts the largest size from the others; nothing when fewer than three others are there."""
    p = _points(curves, objective)
    if len(_sizes(p)) <= MIN_SIZES:
        return []
    keep = p.n != p.n.max()
    rest = _keep(curves, keep)
    part, cls = _points(rest, objective), SLOPES["saturating"]
    own = np.array([s.k.value for s in sizes])
    theta, fixed = _fit_slope(part, cls, own[keep])
    slope = _slope(cls, theta, fixed)
    out = []
    for c, s in zip(curves, sizes, strict=True):
        if c.params < p.n.max():
            continue
        k, first = float(slope.k(c.params)), max(3, round(len(c.x) / 20))
        center = float(np.mean(np.log(c.x)))
        same = sorted((o for o in rest if o.kind == c.kind), key=lambda o: o.params)[-3:]
        if len(same) < 2:
            continue
        # the levels are continued at the X of the target, where they do not depend on the slopes' errors at X = 1
        there = [_level_for(o, float(slope.k(o.params)), center, objective) for o in same]
        line = np.polyfit(np.log([o.params for o in same]), there, 1)

        def score(level: float, c: Curve = c, k: float = k, mid: float = center) -> tuple[float | None, float, float]:
            fitted = np.exp(level - k * (np.log(c.x) - mid))
            error = fitted - c.loss
            return _r2(c.loss, fitted), float(np.sqrt(np.mean(error**2))), float(np.mean(error))

        calibrated = score(_level_for(c, k, center, objective))
        early = score(_level_for(c, k, center, objective, slice(0, first)))
        blind = score(float(np.polyval(line, math.log(c.params))))
        out.append(
            HeldOut(
                label=c.label, params=c.params, parameters={q: getattr(slope, q) for q in cls.PARAMETERS},
                k_predicted=k, k_own=s.k, first_points=first, r2_calibrated=calibrated[0],
                rmse_calibrated=calibrated[1], r2_first=early[0], rmse_first=early[1], bias_first=early[2],
                r2_blind=blind[0], rmse_blind=blind[1], bias_blind=blind[2],
            )
        )  # fmt: skip
    return out


def compare_forms(curves: Sequence[Curve], sizes: Sequence[SizeFit], *, objective: str = "linear") -> FormComparison:
    """Compares the forms of k(N) on sizes that they did not see.

    Each size is left out in turn; the form, fitted to the others, predicts its slope, and with a calibrated level its
    loss. Two forms are told apart when the mean difference of their squared errors of loss exceeds two standard errors.

    Args:
        curves: at least three sizes; with three, nothing is left out and only the sample is scored.
        sizes: the fit of each curve by itself, in the same order.
        objective: "linear" or "log".

    Returns:
        The comparison.

    Raises:
        ValueError: fewer than three sizes.
    """
    p = _points(curves, objective)
    if len(_sizes(p)) < MIN_SIZES:
        raise ValueError(f"curves: comparing forms needs at least {MIN_SIZES} sizes, got {len(_sizes(p))}")
    own = np.array([s.k.value for s in sizes])
    scores, errors = [], {}
    for name, cls in SLOPES.items():
        theta, fixed = _fit_slope(p, cls, own)
        slope = _slope(cls, theta, fixed)
        k_errors, loss_errors = [], []
        if len(_sizes(p)) > MIN_SIZES:
            for n in _sizes(p):
                keep = p.n != n
                t, f = _fit_slope(_points(_keep(curves, keep), objective), cls, own[keep])
                k = float(_slope(cls, t, f).k(n))
                for c, o in zip(_keep(curves, ~keep), own[~keep], strict=True):
                    center = float(np.mean(np.log(c.x)))
                    fitted = np.exp(_level_for(c, k, center, objective) - k * (np.log(c.x) - center))
                    k_errors.append(k - float(o))
                    loss_errors.append(float(np.mean((fitted - c.loss) ** 2)))
        errors[name] = np.array(loss_errors)
        scores.append(
            FormScore(
                form=name, formula=cls.FORMULA, parameters={q: getattr(slope, q) for q in cls.PARAMETERS} | fixed,
                objective=_objective(p, _project(p, slope.k(p.n), p.y)[0]),
                k_error=float(np.sqrt(np.mean(np.square(k_errors)))) if k_errors else None,
                loss_error=float(np.sqrt(np.mean(loss_errors))) if loss_errors else None,
                negative_sizes=tuple(c.label for c, k in zip(curves, slope.k(p.n), strict=True) if k < 0),
            )
        )  # fmt: skip
    if not k_errors:
        best = min(scores, key=lambda s: s.objective).form
        return FormComparison(
            scores=tuple(scores), best=best, separable=False,
            why=f"{len(_sizes(p))} sizes: leaving one out leaves too few, so the forms are compared in the sample only",
        )  # fmt: skip
    best = min(scores, key=lambda s: s.loss_error or 0.0).form
    tied = []
    for name in SLOPES:
        if name != best:
            gap = errors[name] - errors[best]
            if not gap.mean() > 2 * gap.std(ddof=1) / math.sqrt(len(gap)):
                tied.append(name)
    why = f"{best} predicts left-out sizes best"
    if tied:
        why += f", but not by two standard errors over {len(errors[best])} left-out curves against {' and '.join(tied)}"
    return FormComparison(scores=tuple(scores), best=best, separable=not tied, why=why)


# ------------------------------------------------------------------------------------ shapes of one curve


def fit_shape(curve: Curve, shape: type[ScaleRLSigmoid] | type[ExponentialSaturation]) -> ShapeFit:
    """Fits a curve that saturates, and says whether its ceiling can be seen.

    Given where and how steeply the gain comes, the loss is linear in the rest, so the search is a grid over the former
    with closed forms for the latter, polished by least squares. A loss measured at step 0 fixes R0. The interval of A
    is where the profile likelihood ratio stays below 3.84, with the number of points reduced for autocorrelation.

    Args:
        curve: at least five points.
        shape: the law.

    Returns:
        The fit, with `bias_ahead` from a fit to the first 40 % of the points (None when those are fewer than five).

    Raises:
        ValueError: fewer than five points.
    """
    if len(curve.x) < 5:
        raise ValueError(f"curve: a form of up to four parameters needs at least 5 points, got {len(curve.x)}")
    law, worst, best = _fit_shape(curve.x, curve.loss, curve.loss_before, shape, profile=True)
    fitted, bounds = law.loss(curve.x), shape.bounds(curve.x)
    parameters, why = {}, []
    for name in shape.PARAMETERS:
        value, b = getattr(law, name), bounds[name]
        scale = math.log if name in ("X_mid", "X_scale", "B") else float
        fixed = name == "R0" and curve.loss_before is not None
        at = "" if fixed else _at_bound(scale(value), scale(b.low), scale(b.high), log=scale is math.log)
        parameters[name] = Estimate(
            value=value, low=1 - worst if name == "A" and worst is not None else None,
            high=1 - best if name == "A" and best is not None else None, at_bound=at,
        )  # fmt: skip
        if at:
            why.append(f"{name} ended at the {'lowest' if at == 'low' else 'highest'} value allowed, {value:.4g}")
    if best is None:
        why.append("its ceiling A is not limited from above: any higher one describes the points as well")
    middle = law.X_mid if isinstance(law, ScaleRLSigmoid) else law.X_scale
    if middle > curve.x[-1]:
        why.append(f"the middle of its rise, {middle:.3g}, lies beyond the last point, {curve.x[-1]:.3g}")
    return ShapeFit(
        label=curve.label, shape=shape.NAME, formula=shape.FORMULA, parameters=parameters,
        rmse=float(np.sqrt(np.mean((curve.loss - fitted) ** 2))), r2=_r2(curve.loss, fitted),
        bias_ahead=_bias_ahead(curve, lambda x, y: _fit_shape(x, y, curve.loss_before, shape, profile=False)[0]),
        verdict=_verdict(why),
    )  # fmt: skip


def _bias_ahead(curve: Curve, fit: Any) -> float | None:
    n = len(curve.x)
    head, tail = round(0.4 * n), max(1, round(0.2 * n))
    if head < 5:
        return None
    law: CurveLaw = fit(curve.x[:head], curve.loss[:head])
    return float(np.mean(law.loss(curve.x[-tail:]) - curve.loss[-tail:]))


def _fit_shape(
    x: np.ndarray, y: np.ndarray, before: float | None, shape: type[ScaleRLSigmoid] | type[ExponentialSaturation],
    *, profile: bool,
) -> tuple[ScaleRLSigmoid | ExponentialSaturation, float | None, float | None]:
    """The law, and the largest and the smallest loss for infinite x that its profile allows (None: not limited)."""
    bounds = shape.bounds(x)
    sigmoid = shape is ScaleRLSigmoid
    scale_name = "X_mid" if sigmoid else "X_scale"
    scales = np.geomspace(bounds[scale_name].low, bounds[scale_name].high, 41)
    steep = np.geomspace(bounds["B"].low, bounds["B"].high, 17) if sigmoid else np.array([1.0])
    where, how = (g.ravel() for g in np.meshgrid(scales, steep, indexing="ij"))

    def gained(where: np.ndarray | float, how: np.ndarray | float) -> np.ndarray:
        at = np.asarray(where)[..., None]
        if sigmoid:
            return 1.0 / (1.0 + (at / x) ** np.asarray(how)[..., None])
        return -np.expm1(-x / at)

    s = gained(where, how)  # [G, n]
    t = 1.0 - s
    end = np.linspace(0.0, 1.0, 101)  # loss for infinite x, on a grid that includes both ends
    # loss = start t + end s; for each end, the best start in [0, 1], or the one that was measured
    tt, ts, ss = (t * t).sum(1), (t * s).sum(1), (s * s).sum(1)
    ty, sy, yy = t @ y, s @ y, float(y @ y)
    if before is None:
        start = np.clip((ty[:, None] - end * ts[:, None]) / np.maximum(tt, 1e-300)[:, None], 0.0, 1.0)
    else:
        start = np.full((len(where), len(end)), before)
    sse = (
        start**2 * tt[:, None] + end**2 * ss[:, None] + 2 * start * end * ts[:, None]
        - 2 * start * ty[:, None] - 2 * end * sy[:, None] + yy
    )  # fmt: skip
    g, e = np.unravel_index(np.argmin(sse), sse.shape)

    def unpack(v: np.ndarray) -> ScaleRLSigmoid | ExponentialSaturation:
        parts = list(map(float, v))
        common = {"A": 1.0 - parts[0], "R0": 1.0 - (before if before is not None else parts.pop())}
        if sigmoid:
            return ScaleRLSigmoid(**common, X_mid=math.exp(parts[1]), B=math.exp(parts[2]))
        return ExponentialSaturation(**common, X_scale=math.exp(parts[1]))

    first, low, high = [end[e], math.log(where[g])], [0.0, math.log(scales[0])], [1.0, math.log(scales[-1])]
    if sigmoid:
        first, low, high = [*first, math.log(how[g])], [*low, math.log(steep[0])], [*high, math.log(steep[-1])]
    if before is None:
        first, low, high = [*first, start[g, e]], [*low, 0.0], [*high, 1.0]
    first, low, high = np.array(first), np.array(low), np.array(high)

    def search(start: np.ndarray, fixed: float | None = None) -> np.ndarray:
        """The best parameters, with the loss for infinite x fixed or free."""
        part = slice(0 if fixed is None else 1, None)

        def residual(v: np.ndarray) -> np.ndarray:
            return unpack(v if fixed is None else np.concatenate([[fixed], v])).loss(x) - y

        fit = least_squares(
            residual, np.clip(start, low + inside, high - inside)[part], bounds=(low[part], high[part]),
            x_scale=(high - low)[part], ftol=1e-8, xtol=1e-8, max_nfev=100,
        )  # fmt: skip
        return fit.x if fixed is None else np.concatenate([[fixed], fit.x])

    inside = 1e-9 * (high - low)
    found = search(first)
    law = unpack(found)
    residual = law.loss(x) - y
    rho, best = _autocorrelation(residual), max(float(residual @ residual), 1e-300)
    effective = len(x) * (1 - rho) / (1 + rho)

    def crossing(side: int) -> float | None:
        """Where the likelihood ratio of the end reaches 3.84, going down (-1) or up (+1); None if it never does."""
        at, ratio, warm, step = float(found[0]), 0.0, found, 0.002
        while (at > 0.0) if side < 0 else (at < 1.0):
            there = min(max(at + side * step, 0.0), 1.0)
            warm = search(warm, there)
            error = unpack(warm).loss(x) - y
            here = effective * math.log(max(float(error @ error), best) / best)
            if here > CHI2:
                return at + (there - at) * (CHI2 - ratio) / (here - ratio)
            at, ratio, step = there, here, 2 * step
        return None

    return law, *((crossing(+1), crossing(-1)) if profile else (None, None))


def _loglinear_shape(curve: Curve, size: SizeFit, objective: str) -> ShapeFit:
    def fit(x: np.ndarray, y: np.ndarray) -> LogLinear:
        part = dataclasses.replace(curve, x=x, loss=y, step=curve.step[: len(x)], by_run=y[None])
        p = _points([part], objective)
        k = _own_slopes(p, p.y[None])[0]
        return LogLinear(k=float(k[0]), E=float(_project(p, k, p.y)[2][0] + k[0] * p.center[0]))

    return ShapeFit(
        label=curve.label, shape=LogLinear.NAME, formula=LogLinear.FORMULA, parameters={"k": size.k, "E": size.E},
        rmse=size.rmse, r2=size.r2, bias_ahead=_bias_ahead(curve, fit), verdict=size.verdict,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- the whole


def fit_axis(
    table: pyarrow.Table,
    *,
    axis: str,
    kind: str = "all",
    objective: str = "linear",
    n_boot: int = 200,
    seed: int = 0,
    shapes: bool = True,
    **selection: Any,
) -> AxisFit:
    """Fits everything there is to fit for one axis and one kind of model.

    Args:
        table: see `select_curves`.
        axis: a key of `AXES`.
        kind: the kind of model, or "all" for all kinds together: one k(N), a level for each kind and size.
        objective: "linear" (as Tan et al.) or "log".
        n_boot: bootstrap draws.
        seed: of the draws.
        shapes: whether saturating forms of each curve are fitted too.
        selection: further arguments of `select_curves`.

    Returns:
        The fits with their verdicts. Too little data is a verdict, not an error.

    Raises:
        ValueError: a wrong argument, or no rows at all.
    """
    curves, chosen, left_out = select_curves(table, axis=axis, kind=kind, **selection)
    empty = AxisFit(
        axis=axis, kind=kind, selection=chosen, left_out=tuple(left_out), sizes=(), joint=None, forms=None, held_out=(),
        shapes=(), verdict=_verdict(["no size has enough points: " + "; ".join(left_out)]),
    )  # fmt: skip
    if not curves:
        return empty
    sizes = _fit_sizes(curves, objective, n_boot, seed)
    shape_fits = []
    if shapes:
        for c, s in zip(curves, sizes, strict=True):
            shape_fits.append(_loglinear_shape(c, s, objective))
            if len(c.x) >= 5:
                shape_fits += [fit_shape(c, ScaleRLSigmoid), fit_shape(c, ExponentialSaturation)]
    out = dataclasses.replace(empty, sizes=tuple(sizes), shapes=tuple(shape_fits))
    num_sizes = len({c.params for c in curves})
    if num_sizes < 2:
        return dataclasses.replace(
            out, verdict=_verdict([f"1 size, and a law of two parameters needs at least {MIN_SIZES}"])
        )
    joint = fit_joint(curves, axis=axis, kind=kind, objective=objective, n_boot=n_boot, seed=seed, sizes=sizes)
    return dataclasses.replace(
        out,
        joint=joint,
        forms=compare_forms(curves, sizes, objective=objective) if num_sizes >= MIN_SIZES else None,
        held_out=tuple(_held_out(curves, sizes, objective)),
        verdict=joint.verdict,
    )


def fit_table(
    table: pyarrow.Table,
    *,
    axes: Sequence[str] = ("compute", "data"),
    kinds: Sequence[str] | None = None,
    objective: str = "linear",
    n_boot: int = 200,
    seed: int = 0,
    shapes: bool = True,
    **selection: Any,
) -> Fits:
    """Fits a whole study: each axis, each kind of model by itself, and all kinds together.

    Args:
        table: see `select_curves`.
        axes: keys of `AXES`.
        kinds: None takes every kind of the table, and "all" where there are several.
        objective: "linear" or "log".
        n_boot: bootstrap draws.
        seed: of the draws.
        shapes: whether saturating forms of each curve are fitted too.
        selection: further arguments of `select_curves`.

    Returns:
        The fits.

    Raises:
        ValueError: a wrong argument, or a kind without rows.
    """
    if kinds is None:
        method = selection.get("method", "grpo")
        found = {r["kind"] for r in table.select(["kind", "method"]).to_pylist() if r["method"] == method}
        kinds = sorted(k for k in found if k is not None)
        kinds = [*kinds, "all"] if len(kinds) > 1 else kinds
    return Fits(
        objective=objective,
        fits=tuple(
            fit_axis(
                table, axis=a, kind=k, objective=objective, n_boot=n_boot, seed=seed,
                shapes=shapes and not (k == "all" and len(kinds) > 1),  # each kind has them already
                **selection,
            )
            for a in axes
            for k in kinds
        ),
    )
