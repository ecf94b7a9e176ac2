"""From a long table of evaluations to fitted laws with honest intervals, and a verdict on whether the data identify them.

    table -> curves (runs averaged per size and step) -> a law for each size, one for all -> intervals -> verdict
             `curves`                                    `least_squares`                      `bootstrap`

Input is the table of `records.runs_table` (or of `importers`, for the logs of other frameworks). The procedure is that
of Tan et al. 2025, arXiv:2509.25300, as found in their code: runs are averaged for each size and step, step 0 is left
out, and the objective ("linear") is the mean squared error of the *loss*, every size having the same total weight.
Other objectives are in `least_squares`. Unlike them we report intervals, the fit of every size by itself, predictions
of what was not used (`holdout`), and a verdict. What was fitted is described in `results`.

`JointFit.without_one` shows how far a law moves when one size is left out: no interval covers which sizes were chosen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_engine.evaluate.intervals import CONFIDENCE, interval
from grpo_engine.study.laws.bootstrap import profile_limits, resample
from grpo_engine.study.laws.curves import Curve, keep, select_curves
from grpo_engine.study.laws.forms import CURVES, SLOPES, JointLaw, LogLinear, Slope
from grpo_engine.study.laws.holdout import choose, growing_sizes, late_steps
from grpo_engine.study.laws.law_fit import fit_curve, fit_intercepts
from grpo_engine.study.laws.least_squares import Joint, Space
from grpo_engine.study.laws.results import (
    AxisFit,
    Bootstrap,
    Estimate,
    Fits,
    FittedCurve,
    InterceptsAtX,
    JointCurve,
    JointFit,
    Profile,
    SizeFit,
    Verdict,
    WithoutOne,
    draws_of,
    r_squared,
    read_fits,
    write_fits,
)

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "AxisFit",
    "Estimate",
    "Fits",
    "draws_of",
    "fit_axis",
    "fit_joint",
    "fit_sizes",
    "fit_table",
    "interval",
    "read_fits",
    "write_fits",
]

MIN_SIZES = 3  # of a joint law: its two slope parameters pass through any two sizes


# ---------------------------------------------------------------------------------------- each size


def fit_sizes(
    curves: Sequence[Curve], *, objective: str = "linear", n_boot: int = 200, seed: int = 0, confidence: float = CONFIDENCE
) -> list[SizeFit]:
    """The log-linear law of each curve by itself.

    Args:
        curves: of `select_curves`.
        objective: one of `least_squares.OBJECTIVES`.
        n_boot: bootstrap draws.
        seed: of the draws.
        confidence: of the intervals.

    Returns:
        The fits, in order.

    Raises:
        ValueError: an objective that the curves do not allow.
    """
    p = Joint.of(curves, objective)
    y = p.data.y
    k = p.own_slopes(y[None])[0]
    residual, at_center = p.best_intercepts(k, y)
    data_sets = resample(
        curves, y, y + residual, log=p.data.log, draws=n_boot, rng=np.random.default_rng([seed, 1]), alone=True,
        confidence=confidence,
    )  # fmt: skip
    k_draws = p.own_slopes(data_sets)
    intercept_draws = p.best_intercepts(k_draws, data_sets)[1]
    out = []
    for m, c in enumerate(curves):
        e = at_center[m] + k[m] * p.center[m]
        law = LogLinear(k=float(k[m]), E=float(e))
        fitted = law.loss(c.x)
        noise = math.sqrt(float(np.sum((c.loss - fitted) ** 2)) / (len(c.x) - 2))
        end = "low" if k[m] < -2 + 1e-6 else ("high" if k[m] > 2 - 1e-6 else "")
        k_est = Estimate.of(k[m], k_draws[:, m], end, confidence)
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
                E=Estimate.of(e, intercept_draws[:, m] + k_draws[:, m] * p.center[m], confidence=confidence),
                r2=r_squared(c.loss, fitted),
                rmse=float(np.sqrt(np.mean((c.loss - fitted) ** 2))), noise=noise, num_points=len(c.x),
                num_runs=len(c.by_run), x_min=float(c.x[0]), x_max=float(c.x[-1]), loss_before=c.loss_before,
                loss_first=float(fitted[0]), loss_last=float(fitted[-1]), compute_per_prompt=c.compute_per_prompt,
                prompts_per_step=c.prompts_per_step, verdict=Verdict.of(why),
            )
        )  # fmt: skip
    return out


# ----------------------------------------------------------------------------------- all sizes at once


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
    confidence: float = CONFIDENCE,
    leave_out: bool = True,
) -> JointFit:
    """Fits log L = -k(N) log X + E(N) to all curves at once, E being free for each.

    Args:
        curves: as `select_curves` gives them; at least two sizes.
        axis: what X is; recorded.
        kind: which kind of model; recorded.
        form: a key of `laws.SLOPES`.
        objective: one of `least_squares.OBJECTIVES`.
        n_boot: bootstrap draws, at least 20.
        seed: of the draws; the same seed gives the same intervals.
        sizes: fits of the single curves, for the verdict; None makes them.
        confidence: of the intervals.
        leave_out: whether the fit is made again without each size, where there are enough (`JointFit.without_one`).

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
        sizes = fit_sizes(curves, objective=objective, n_boot=n_boot, seed=seed)
    p, cls = Joint.of(curves, objective), SLOPES[form]
    y = p.data.y
    own = np.array([s.k.value for s in sizes])
    space, theta = p.fit(cls, own)
    slope = space.law(theta)
    assert isinstance(slope, Slope)  # the space is of one
    k = slope.k(p.n)
    residual, at_center = p.best_intercepts(k, y)
    e = at_center + k * p.center
    data_sets = resample(
        curves, y, y + residual, log=p.data.log, draws=n_boot, rng=np.random.default_rng([seed, 2]),
        confidence=confidence,
    )  # fmt: skip
    thetas = p.fit_many(space, data_sets, np.repeat(theta[None], n_boot, axis=0))
    k_draws = space.evaluate(thetas, (p.n,))
    intercept_draws = p.best_intercepts(k_draws, data_sets)[1] + k_draws * p.center
    drawn = np.concatenate([*space.values(thetas).values(), intercept_draws], axis=1)
    draws = np.array([[float(f"{v:.9g}") for v in row] for row in drawn])  # so that fits.json stays small
    parameters = {
        q: Estimate.of(getattr(slope, q), draws[:, i], space.end_of(i, theta), confidence) for i, q in enumerate(space.names)
    }
    law = JointLaw(slope=slope, n=tuple(map(float, p.n)), E=tuple(map(float, e)))
    joint_curves, fitted_all = [], []
    for m, c in enumerate(curves):
        fitted = law.loss(c.x, m)
        fitted_all.append(fitted)
        joint_curves.append(
            JointCurve(
                label=c.label, size=c.size, kind=c.kind, params=c.params,
                k=Estimate.of(k[m], k_draws[:, m], confidence=confidence),
                E=Estimate.of(e[m], draws[:, len(theta) + m], confidence=confidence), r2=r_squared(c.loss, fitted),
                rmse=float(np.sqrt(np.mean((c.loss - fitted) ** 2))), num_points=len(c.x), num_runs=len(c.by_run),
                x_min=float(c.x[0]), x_max=float(c.x[-1]), log_x_mean=float(p.center[m]),
            )
        )  # fmt: skip
    profile = _profile(p, curves, space, theta) if form == "saturating" else None
    without = []
    if leave_out and len(p.sizes()) > MIN_SIZES:
        for n in p.sizes():
            rest = p.n != n
            part, one = Joint.of(keep(curves, rest), objective).fit(cls, own[rest])
            name = next(c.size for c in curves if c.params == n)
            without.append(WithoutOne(size=name, parameters={q: float(v[0]) for q, v in part.values(one).items()}))
    resampled = tuple(c.label for c in curves if len(c.by_run) > 1)
    boot = Bootstrap(
        draws=n_boot, confidence=confidence, seed=seed, method=_method(resampled, len(curves)), runs_resampled=resampled,
    )  # fmt: skip
    return JointFit(
        axis=axis, kind=kind, form=form, formula=cls.FORMULA, objective=objective, parameters=parameters,
        fixed=space.fixed, curves=tuple(joint_curves),
        r2=r_squared(np.concatenate([c.loss for c in curves]), np.concatenate(fitted_all)),
        objective_value=float(p.data.cost(residual, y)), num_points=len(y), bootstrap=boot,
        draws=tuple(tuple(map(float, row)) for row in draws), profile=profile, without_one=tuple(without),
        verdict=_joint_verdict(cls, parameters, joint_curves, sizes, profile, without, resampled),
    )  # fmt: skip


def fitted_curve(curve: Curve) -> FittedCurve:
    """The points of a curve as fits.json keeps them."""
    unique = None if curve.unique is None else tuple(curve.unique.tolist())
    return FittedCurve(label=curve.label, x=tuple(curve.x.tolist()), loss=tuple(curve.loss.tolist()), unique=unique)


def intercepts_at_x(joint: JointFit, x: float | None = None) -> InterceptsAtX:
    """The log of the loss of each curve at one X, by a joint law.

    Args:
        joint: the law.
        x: where; None takes the geometric mean of the curves' centers.

    Returns:
        The intercepts with their intervals.
    """
    if x is None:
        x = math.exp(sum(c.log_x_mean for c in joint.curves) / len(joint.curves))
    intercepts = {
        c.label: Estimate.of(c.E.value - c.k.value * math.log(x), np.log(joint.loss_draws(c.label, x))) for c in joint.curves
    }
    return InterceptsAtX(x=x, intercepts=intercepts)


def _profile(p: Joint, curves: Sequence[Curve], space: Space, theta: np.ndarray) -> Profile:
    """The objective along N0 of the saturating form, K_max being fitted again at each: all at once."""
    residual = p.best_intercepts(space.evaluate(theta, (p.n,)), p.data.y)[0]
    grid = np.linspace(space.low[1], space.high[1], 81)
    low, high = (np.repeat(b[None], len(grid), axis=0) for b in (space.low, space.high))
    start = np.repeat(theta[None], len(grid), axis=0)
    for b in (low, high, start):
        b[:, 1] = grid
    # along the ridge of the objective K_max grows with N0
    start[:, 0] = theta[0] * (1 + np.exp(grid) / p.n.max()) / (1 + math.exp(theta[1]) / p.n.max())
    y = np.broadcast_to(p.data.y, (len(grid), len(p.data.y)))
    found = p.fit_many(space, y, start, low, high)
    values = p.data.cost(p.best_intercepts(space.evaluate(found, (p.n,)), y)[0], y)
    # intercepts are parameters too, though they are projected out
    by_theta = space.jacobian(theta[None], (p.n,))[1]
    scale = 1.0 if p.data.log else p.data.y + residual  # d loss = loss d log loss
    design = np.concatenate([-by_theta[0][:, p.curve] * p.u, np.eye(len(p.n))[:, p.curve]]) * scale
    root = np.sqrt(p.data.reweighted(residual, p.data.y))
    limit = profile_limits(root * residual, (root * design).T, curves, log=p.data.log)[1]
    best = max(float(p.data.cost(residual, p.data.y)), 1e-24 * float(np.sum(p.data.weight * p.data.y**2)))
    excess = np.sqrt(np.maximum(values / best - 1.0, 0.0))

    def crossing(side: int) -> float | None:
        """N0 where the rise passes the limit going left (-1) or right (+1) from the best; None if it never does."""
        at, rise = float(theta[1]), 0.0
        order = np.flatnonzero(grid > theta[1]) if side > 0 else np.flatnonzero(grid < theta[1])[::-1]
        for g in order:
            if excess[g] > limit:
                return math.exp(at + (grid[g] - at) * (limit - rise) / (excess[g] - rise))
            at, rise = float(grid[g]), float(excess[g])
        return None

    return Profile(
        N0=tuple(map(float, np.exp(grid))), K_max=tuple(map(float, found[:, 0])), objective=tuple(map(float, values)),
        low=crossing(-1), high=crossing(+1),
    )  # fmt: skip


def _method(resampled: Sequence[str], num_curves: int) -> str:
    scatter = "the lasting scatter of points about each curve"
    if not resampled:
        return f"{scatter}; no size has two runs, so the spread between runs is not covered"
    where = "every curve" if len(resampled) == num_curves else f"{len(resampled)} of {num_curves} curves"
    return f"{scatter}, and runs at {where}"


def _spread(e: Estimate) -> float | None:
    """Ratio of the ends of an interval; infinite when it touches 0; None without one."""
    if e.low is None or e.high is None:
        return None
    return e.high / e.low if e.low > 0 else math.inf


def _joint_verdict(
    cls: type[Slope], parameters: dict[str, Estimate], joint_curves: Sequence[JointCurve], sizes: Sequence[SizeFit],
    profile: Profile | None, without: Sequence[WithoutOne], resampled: Sequence[str],
) -> Verdict:  # fmt: skip
    why, cautions = [], []
    num_sizes = len({c.params for c in joint_curves})
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
            for side, limit in (("below", profile.low), ("above", profile.high)):
                if limit is None:
                    why.append(f"the profile of N0 stays flat: the data do not limit it from {side}")
    for name in cls.PARAMETERS:
        values = [w.parameters[name] for w in without]
        if values and min(*values, parameters[name].value) > 0 and max(values) / min(values) >= 3:
            worst = max(without, key=lambda w: abs(math.log(w.parameters[name] / parameters[name].value)))
            cautions.append(f"{name} moves to {worst.parameters[name]:.3g} without size {worst.size}: it hangs on that size")
    for c in joint_curves:
        if c.r2 is not None and c.r2 < 0:
            cautions.append(f"the law describes {c.label} worse than a constant would (R2 {c.r2:.2f})")
    for s in sizes:
        if not s.verdict.ok:
            cautions.append(f"{s.label}: {s.verdict.why}")
    if not resampled:
        cautions.append("one run a size: the intervals do not cover the spread between runs")
    elif len(resampled) < len(joint_curves):
        cautions.append("some sizes have a single run: their spread between runs is not covered")
    return Verdict.of(why, cautions)


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
        kind: the kind of model, or "all" for all kinds together: one k(N), an intercept for each kind and size.
        objective: one of `least_squares.OBJECTIVES`; "linear" is that of Tan et al.
        n_boot: bootstrap draws.
        seed: of the draws.
        shapes: whether laws that saturate are fitted to each curve, and held-out tests are made, too.
        selection: further arguments of `select_curves`.

    Returns:
        The fits with their verdicts. Too little data is a verdict, not an error.

    Raises:
        ValueError: a wrong argument, or no rows at all.
    """
    curves, chosen, left_out = select_curves(table, axis=axis, kind=kind, **selection)
    empty = AxisFit(
        axis=axis, kind=kind, selection=chosen, left_out=tuple(left_out), sizes=(), joint=None, laws=(), intercepts=(),
        held_out=(), choices=(), verdict=Verdict.of(["no size can be fitted: " + "; ".join(left_out)]),
    )  # fmt: skip
    if not curves:
        return empty
    sizes = fit_sizes(curves, objective=objective, n_boot=n_boot, seed=seed)
    out = dataclasses.replace(empty, sizes=tuple(sizes), curves=tuple(map(fitted_curve, curves)))
    if shapes:
        held = [h for c in curves for h in late_steps(c, objective=objective)]
        out = dataclasses.replace(
            out,
            laws=tuple(
                fit_curve(c, form, objective=objective)
                for c in curves for form in CURVES.values() if form is not LogLinear and len(c.x) > len(form.PARAMETERS)
            ),
            held_out=tuple(held), choices=(choose(held),) if held else (),
        )  # fmt: skip
    num_sizes = len({c.params for c in curves})
    if num_sizes < 2:
        return dataclasses.replace(
            out, verdict=Verdict.of([f"1 size, and a law of two parameters needs at least {MIN_SIZES}"])
        )
    joint = fit_joint(curves, axis=axis, kind=kind, objective=objective, n_boot=n_boot, seed=seed, sizes=sizes)
    held = growing_sizes(curves, objective=objective, seed=seed) if shapes else []
    intercepts = fit_intercepts(joint) if num_sizes > MIN_SIZES else []
    return dataclasses.replace(
        out,
        joint=joint,
        intercepts=tuple(intercepts),
        at_one_x=intercepts_at_x(joint, intercepts[0].x if intercepts else None),
        held_out=(*held, *out.held_out),
        choices=((choose(held),) if held else ()) + out.choices,
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
        objective: one of `least_squares.OBJECTIVES`.
        n_boot: bootstrap draws.
        seed: of the draws.
        shapes: whether laws that saturate are fitted to each curve, and held-out tests are made, too.
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
                table,
                axis=a,
                kind=k,
                objective=objective,
                n_boot=n_boot,
                seed=seed,
                shapes=shapes and not (k == "all" and len(kinds) > 1),  # each kind has them already
                **selection,
            )
            for a in axes
            for k in kinds
        ),
    )
