"""Fits of single laws: of one curve, of a surface over sizes and data, of reuse, of the intercepts of a joint law."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from grpo_engine.evaluate.intervals import CONFIDENCE
from grpo_engine.study.laws.bootstrap import profile_interval, profile_limits
from grpo_engine.study.laws.curves import Curve
from grpo_engine.study.laws.forms import INTERCEPTS, AdditiveLaw, CurveLaw, LossDecomposition, ReuseLaw
from grpo_engine.study.laws.least_squares import Data, FitProblem
from grpo_engine.study.laws.results import CurveScore, Estimate, InterceptFit, JointFit, LawFit, Verdict, draws_of, r_squared


def curve_problem(curve: Curve, form: type[CurveLaw], objective: str) -> FitProblem:
    """The problem of fitting a law to one curve; a loss that was measured at step 0 fixes R0.

    Args:
        curve: the curve.
        form: a law of `laws.CURVES`.
        objective: one of `least_squares.OBJECTIVES`.

    Returns:
        The problem.

    Raises:
        ValueError: fewer points than parameters and one, or an objective that the curve does not allow.
    """
    need = len(form.PARAMETERS) + 1
    if len(curve.x) < need:
        raise ValueError(f"curve: {form.NAME} needs at least {need} points, got {len(curve.x)}")
    known = {}
    if "R0" in form.PARAMETERS and curve.loss_before is not None:
        known["R0"] = 1.0 - curve.loss_before
    return FitProblem.of(form, (curve.x,), _data([curve], objective), known)


def fit_curve(curve: Curve, form: type[CurveLaw], *, objective: str = "linear", confidence: float = CONFIDENCE) -> LawFit:
    """Fits a law to one curve, and says whether its asymptote can be seen.

    Args:
        curve: at least one point more than the law has parameters.
        form: a law of `laws.CURVES`.
        objective: one of `least_squares.OBJECTIVES`.
        confidence: of the profile intervals. An end of None is open: up to the bound, every value describes the points.

    Returns:
        The fit.

    Raises:
        ValueError: see `curve_problem`.
    """
    return _law_fit(curve_problem(curve, form, objective), [curve], curve.label, confidence)


def fit_surface(
    curves: Sequence[Curve],
    form: type[AdditiveLaw] | type[LossDecomposition],
    *,
    objective: str = "linear",
    confidence: float = CONFIDENCE,
) -> LawFit:
    """Fits a law of N and D to all curves at once, every curve having the same total weight.

    Args:
        curves: of `select_curves`; more points than the law has parameters.
        form: `AdditiveLaw` or `LossDecomposition`.
        objective: one of `least_squares.OBJECTIVES`.
        confidence: of the profile intervals; per-curve parameters get none.

    Returns:
        The fit, with the R2 of every curve.

    Raises:
        ValueError: too few points, or an objective that the curves do not allow.
    """
    num = sum(len(c.x) for c in curves)
    need = sum(len(curves) if q in form.PER_CURVE else 1 for q in form.PARAMETERS)
    if num <= need:
        raise ValueError(f"curves: {form.NAME} has {need} parameters here and needs more points, got {num}")
    which = np.repeat(np.arange(len(curves)), [len(c.x) for c in curves])
    coordinates = [np.array([c.params for c in curves])[which], np.concatenate([c.x for c in curves])]
    if form.PER_CURVE:
        coordinates.append(which)
    return _law_fit(FitProblem.of(form, coordinates, _data(curves, objective)), curves, "all", confidence)


def fit_reuse(curves: Sequence[Curve], *, objective: str = "linear", confidence: float = CONFIDENCE) -> LawFit:
    """What a repeated prompt is worth, from runs of one size that differ in how often they repeat.

    Args:
        curves: along the axis "data", of one size and kind, each with its count of different prompts: at least one
            that repeats and one that does not. `curves.curves_by(table, "tau")` gives them.
        objective: one of `least_squares.OBJECTIVES`.
        confidence: of the profile intervals.

    Returns:
        The fit of `ReuseLaw`. An open upper end of `worth` says that the data show no loss from repeating; an open
        lower end, that they do not show that repeats are worth anything.

    Raises:
        ValueError: several sizes, unknown counts of different prompts, or no curve that repeats.
    """
    if len({(c.params, c.kind) for c in curves}) != 1:
        raise ValueError(f"curves: must be of one size and kind, got {[c.label for c in curves]}")
    unique = [c.unique for c in curves if c.unique is not None]
    if len(unique) < len(curves):
        raise ValueError(f"curves: {curves[0].label} does not tell how many different prompts were seen")
    coordinates = (np.concatenate([c.x for c in curves]), np.concatenate(unique))
    if not np.any(coordinates[0] > 1.5 * coordinates[1]):
        raise ValueError(f"curves: no curve of {curves[0].label} repeats its prompts, so nothing tells what that is worth")
    return _law_fit(FitProblem.of(ReuseLaw, coordinates, _data(curves, objective)), curves, curves[0].label, confidence)


def fit_intercepts(joint: JointFit, *, x: float | None = None, confidence: float = CONFIDENCE) -> list[InterceptFit]:
    """Laws of E(N): each of `laws.INTERCEPTS`, fitted to the intercepts of a joint law.

    Every size counts the same. The interval of a parameter combines the draws of the joint fit with the scatter of the
    sizes about the law; with as many sizes as parameters there is no scatter to be seen, and no fit.

    Args:
        joint: the joint law.
        x: where the intercepts are taken; None takes the geometric mean of the curves' centers. Slopes and intercepts are
            least correlated there.
        confidence: of the intervals.

    Returns:
        The fits that the number of sizes allows, the smallest misfit first.
    """
    n = np.array([c.params for c in joint.curves])
    x = math.exp(float(np.mean([c.log_x_mean for c in joint.curves]))) if x is None else x
    k_draws, e_draws = draws_of(joint, n)
    values = np.array([c.E.value - c.k.value * math.log(x) for c in joint.curves])
    drawn = e_draws - k_draws * math.log(x)
    rng = np.random.default_rng([joint.bootstrap.seed, 4])
    out = []
    for form in INTERCEPTS.values():
        spare = len(n) - len(form.PARAMETERS)
        if spare < 1:
            continue
        problem = FitProblem.of(form, (n,), Data.of(values, np.full(len(n), 1.0 / len(n)), "linear"))
        theta = problem.best()
        error = problem.error(theta, values)
        misfit = math.sqrt(float(error @ error) / spare)
        # the intercepts' own noise is in the misfit already
        beyond = math.sqrt(max(0.0, misfit**2 - float(np.mean(drawn.var(axis=0)))))
        scattered = drawn + beyond * rng.standard_t(spare, drawn.shape)
        found = problem.solve(scattered, np.repeat(theta[None], len(drawn), axis=0))
        law, parts = problem.space.law(theta), problem.space.values(found)
        parameters = {
            q: Estimate.of(getattr(law, q), parts[q][:, 0], problem.space.end_of(i, theta), confidence)
            for i, q in enumerate(parts)
        }
        out.append(
            InterceptFit(
                law=form.NAME, formula=form.FORMULA, x=x, parameters=parameters, fixed=problem.space.fixed,
                intercepts={
                    c.label: Estimate.of(v, d, confidence=confidence)
                    for c, v, d in zip(joint.curves, values, drawn.T, strict=True)
                },
                misfit=misfit, verdict=Verdict.of(_at_bounds(parameters)),
            )
        )  # fmt: skip
    return sorted(out, key=lambda f: f.misfit)


def _data(curves: Sequence[Curve], objective: str) -> Data:
    weight = np.concatenate([np.full(len(c.x), 1.0 / (len(c.x) * len(curves))) for c in curves])
    answers = [c.answers for c in curves if c.answers is not None]
    return Data.of(
        np.concatenate([c.loss for c in curves]), weight, objective, label=f"size {curves[0].label!r}",
        answers=np.concatenate(answers) if len(answers) == len(curves) else None,
    )  # fmt: skip


def _law_fit(problem: FitProblem, curves: Sequence[Curve], label: str, confidence: float) -> LawFit:
    space, form = problem.space, problem.space.form
    theta = problem.best()
    fitted = space.evaluate(theta, problem.coordinates)
    loss = np.concatenate([c.loss for c in curves])
    ends = np.cumsum([len(c.x) for c in curves])[:-1]
    names = [q for q in space.names if q not in form.PER_CURVE]
    residual, design = problem.weighted(theta)
    limits = profile_limits(residual, design, curves, log=problem.data.log, confidence=confidence)
    profile = profile_interval(problem, theta, limits, names)
    values = space.values(theta)
    parameters: dict[str, Estimate] = {}
    for q in space.names:
        if q in form.PER_CURVE:
            ends_of = [space.end_of(j, theta) for j in range(*space.part(q).indices(len(theta)))]
            parameters |= {
                f"{q}[{c.label}]": Estimate(value=float(v), at_bound=end)
                for c, v, end in zip(curves, values[q], ends_of, strict=True)
            }
        else:
            low, high = profile[q]
            end = space.end_of(space.part(q).start, theta)
            parameters[q] = Estimate(value=float(values[q][0]), low=low, high=high, at_bound=end)
    why = _at_bounds(parameters)
    for q in names:
        e = parameters[q]
        open_ends = [end for end, value in (("below", e.low), ("above", e.high)) if value is None]
        if open_ends and not e.at_bound:
            why.append(f"{q} is not limited from {' and '.join(open_ends)}: other values describe the points as well")
    scores = [
        CurveScore(label=c.label, r2=r_squared(c.loss, f), rmse=float(np.sqrt(np.mean((c.loss - f) ** 2))),
                   num_points=len(c.x))
        for c, f in zip(curves, np.split(fitted, ends), strict=True)
    ]  # fmt: skip
    return LawFit(
        label=label, law=form.NAME, formula=form.FORMULA, objective=problem.data.objective, parameters=parameters,
        fixed=space.fixed, r2=r_squared(loss, fitted), rmse=float(np.sqrt(np.mean((loss - fitted) ** 2))),
        curves=tuple(scores), verdict=Verdict.of(why),
    )  # fmt: skip


def _at_bounds(parameters: dict[str, Estimate]) -> list[str]:
    return [
        f"{q} ended at the {'lowest' if e.at_bound == 'low' else 'highest'} value allowed, {e.value:.4g}"
        for q, e in parameters.items()
        if e.at_bound
    ]
