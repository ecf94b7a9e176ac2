"""Predictions of what was not used, and the choice of a law by them.

Three tests. In each the law sees nothing of the target, and neither does the rule it is compared with:
  * *largest size*: k and E of the largest size, both from the smaller ones. One row more is not a prediction and says
    so: the intercept taken from the target itself, as Tan et al. 2025 do it ("only the slope is tested").
  * *late steps*: a curve's own law, from the first part of its points.
  * *other set*: how far the loss of one test set falls, from how far those of the other sets fall.

A law is chosen by its error here, never by R2 inside the sample; and "these data do not tell" is an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.special import stdtrit

from grpo_engine.evaluate.intervals import interval
from grpo_engine.study.laws.bootstrap import resample
from grpo_engine.study.laws.curves import Curve, keep
from grpo_engine.study.laws.forms import CURVES, INTERCEPTS, SLOPES, LineIntercept
from grpo_engine.study.laws.law_fit import curve_problem
from grpo_engine.study.laws.least_squares import Data, FitProblem, Joint
from grpo_engine.study.laws.results import HeldOut, LawChoice, r_squared

CONFIDENCE = 0.9  # of prediction intervals
FIRST = 0.4  # share of a curve from which its late steps are predicted
LAST = 0.2  # share of a curve that counts as late
LAST_SIZES = 3  # that a local line of intercepts goes through
FEWEST = 5  # points that a curve law may be fitted to
DRAWS = 100


def largest_size(curves: Sequence[Curve], *, objective: str = "linear", draws: int = DRAWS, seed: int = 0) -> list[HeldOut]:
    """Predicts every curve of the largest size from the smaller ones, by each pair of a slope law and an intercept law.

    A joint law is fitted to the smaller sizes, its intercepts are taken at the target's middle X (the X that was planned,
    which is no result), and an intercept law of `laws.INTERCEPTS`, or a line through the last three of them, continues
    them. The interval holds the draws of the joint fit, the scatter of the smaller sizes about the intercept law, and
    the scatter of points about a curve.

    Args:
        curves: of `select_curves`; at least three sizes below the largest of the target's kind, otherwise nothing is
            predicted.
        objective: one of `least_squares.OBJECTIVES`.
        draws: bootstrap draws behind the prediction intervals.
        seed: of the draws.

    Returns:
        One row for each curve of the largest size and each pair of laws; then one for each slope law with the intercept
        calibrated on the target.

    Raises:
        ValueError: an objective that the curves do not allow.
    """
    top = max((c.params for c in curves), default=0.0)
    out = []
    for target in (c for c in curves if c.params == top):
        below = keep(curves, [c.kind == target.kind and c.params < top for c in curves])
        if len({c.params for c in below}) < 3:
            continue
        out += _predict_size(target, below, objective, draws, seed)
    return out


def growing_sizes(curves: Sequence[Curve], *, objective: str = "linear", draws: int = DRAWS, seed: int = 0) -> list[HeldOut]:
    """`largest_size` for every size that has three smaller ones, each from those below it, the smallest target first.

    Args:
        curves: of `select_curves`.
        objective: one of `least_squares.OBJECTIVES`.
        draws: bootstrap draws behind the prediction intervals.
        seed: of the draws.

    Returns:
        The rows of all targets.

    Raises:
        ValueError: an objective that the curves do not allow.
    """
    return [
        row for top in sorted({c.params for c in curves})[3:]
        for row in largest_size(
            keep(curves, [c.params <= top for c in curves]), objective=objective, draws=draws, seed=seed
        )
    ]  # fmt: skip


def prediction(rows: Sequence[HeldOut], target: str) -> HeldOut | None:
    """The prediction of a target by the laws that predicted the other targets best: nothing of the target chose them.

    Args:
        rows: of `growing_sizes`.
        target: label of a curve.

    Returns:
        The row of the target; None when no other target was predicted, or the target was not.
    """
    others = [r for r in rows if r.target != target and r.used == "nothing"]
    mine = {r.law: r for r in rows if r.target == target and r.used == "nothing"}
    if not others or not mine:
        return None
    return next((mine[law] for law in choose(others).errors if law in mine), None)


def _predict_size(target: Curve, below: Sequence[Curve], objective: str, draws: int, seed: int) -> list[HeldOut]:
    p = Joint.of(below, objective)
    y, center = p.data.y, float(np.mean(np.log(target.x)))
    u, out, calibrated = np.log(target.x) - center, [], []
    own = p.own_slopes(y[None])[0]
    naive = _size_rules(target, below)
    rng = np.random.default_rng([seed, 3])
    for slope in SLOPES.values():
        space, theta = p.fit(slope, own)
        residual, at_center = p.best_intercepts(space.evaluate(theta, (p.n,)), y)
        sets = resample(below, y, y + residual, log=p.data.log, draws=draws, rng=rng)
        thetas = np.concatenate([theta[None], p.fit_many(space, sets, np.repeat(theta[None], draws, axis=0))])
        k = space.evaluate(thetas, (p.n,))
        intercept = np.concatenate([at_center[None], p.best_intercepts(k[1:], sets)[1]]) - k * (center - p.center)
        k_target = space.evaluate(thetas, (np.array([target.params]),))[:, 0]
        noise = _point_scatter(residual, y, p.data.log, len(below) + len(theta))
        name = f"{slope.NAME} k"
        near = p.n >= np.sort(p.n)[-LAST_SIZES]
        intercepts = [(law, form, np.full(len(below), True)) for law, form in INTERCEPTS.items()]
        for law, form, those in [*intercepts, ("local line", LineIntercept, near)]:
            spare = int(those.sum()) - len(form.PARAMETERS)
            if spare < 1 or (law == "local line" and those.all()):
                continue
            e, e_draws = _continue_intercept(p.n[those], intercept[:, those], form, target.params, spare, rng)
            fitted = np.exp(e - k_target[0] * u)
            many = np.exp(e_draws[:, None] - k_target[1:, None] * u)
            band = _band(many, noise, rng)
            out.append(_score("largest size", f"{name}, {law} E", target, fitted, band, naive, "nothing"))
        z = np.exp(-k_target[0] * u)
        fitted = z * float(z @ target.loss) / float(z @ z)
        calibrated.append(
            _score("largest size", f"{name}, own intercept", target, fitted, None, naive, "its intercept: only k is tested")
        )
    return out + calibrated


def _continue_intercept(
    n: np.ndarray, intercept: np.ndarray, form: type, target: float, spare: int, rng: np.random.Generator
) -> tuple[float, np.ndarray]:
    """The intercept at another size by an intercept law: of the first row of `intercept` [1 + draws, M], and of each."""
    problem = FitProblem.of(form, (n,), Data.of(intercept[0], np.full(len(n), 1.0 / len(n)), "linear"))
    theta = problem.best()
    error = problem.error(theta, intercept[0])
    scatter = math.sqrt(float(error @ error) / spare)
    # every size is off the law by as much as those that were seen, the target too
    sets = intercept[1:] + scatter * rng.standard_normal(intercept[1:].shape)
    found = problem.solve(sets, np.repeat(theta[None], len(sets), axis=0))
    at = (np.array([target]),)
    off = scatter * rng.standard_t(spare, len(sets))
    return float(problem.space.evaluate(theta, at)[0]), problem.space.evaluate(found, at)[:, 0] + off


def _size_rules(target: Curve, below: Sequence[Curve]) -> dict[str, np.ndarray]:
    """Naive rules for the target's loss: the next smaller size's curve, and a line in log N through two sizes."""
    near = sorted(below, key=lambda c: c.params)[-2:]
    at = [np.interp(np.log(target.x), np.log(c.x), np.log(np.maximum(c.loss, 1e-9))) for c in near]
    n = np.log([c.params for c in near])
    share = (math.log(target.params) - n[1]) / (n[1] - n[0])
    return {"next smaller size": np.exp(at[1]), "line through two sizes": np.exp(at[1] + share * (at[1] - at[0]))}


def late_steps(curve: Curve, *, first: float = FIRST, last: float = LAST, objective: str = "linear") -> list[HeldOut]:
    """Predicts the late points of a curve from its first ones, by each curve law.

    Args:
        curve: the curve.
        first: share of the points that the laws see.
        last: share of the points that are predicted.
        objective: one of `least_squares.OBJECTIVES`.

    Returns:
        One row a law that the points suffice for; none when the first share has fewer than five points.

    Raises:
        ValueError: shares that overlap or are not positive.
    """
    if not (0 < first and 0 < last and first + last <= 1):
        raise ValueError(f"first, last: must be positive and at most 1 together, got {first} and {last}")
    n = len(curve.x)
    head, tail = round(first * n), max(1, round(last * n))
    if head < FEWEST:
        return []
    answers = curve.answers
    seen = replace(
        curve, step=curve.step[:head], x=curve.x[:head], loss=curve.loss[:head], by_run=curve.by_run[:, :head],
        answers=None if answers is None else answers[:head],
    )  # fmt: skip
    target = replace(curve, step=curve.step[-tail:], x=curve.x[-tail:], loss=curve.loss[-tail:])
    few = max(1, head // 4)
    naive = {"last value": np.full(tail, float(np.mean(seen.loss[-few:])))}
    line = None
    rng = np.random.default_rng([0, 5])
    out = []
    for form in CURVES.values():
        if head <= len(form.PARAMETERS):
            continue
        problem = curve_problem(seen, form, objective)
        theta = problem.best()
        y = problem.data.y
        error = problem.error(theta, y)
        sets = resample(
            [seen],
            y,
            y + error,
            log=problem.data.log,
            draws=DRAWS,
            rng=rng,
            design=problem.design(theta),
            alone=True,
            confidence=CONFIDENCE,
        )
        found = problem.solve(sets, np.repeat(theta[None], DRAWS, axis=0))
        fitted = problem.space.evaluate(theta, (target.x,))
        noise = _point_scatter(error, y, problem.data.log, len(theta))
        band = _band(problem.space.evaluate(found, (target.x,)), noise, rng)
        if form.NAME == "loglinear":
            line = fitted
        rules = naive | ({"log-linear": line} if line is not None and form.NAME != "loglinear" else {})
        used = f"its first {head} of {n} points"
        out.append(_score("late steps", form.NAME, target, fitted, band, rules, used))
    return out


def other_set(curves_by_set: Mapping[str, Sequence[Curve]], target: str) -> list[HeldOut]:
    """Predicts how far the loss of one test set falls from how far those of the other sets fall.

    What is predicted is log(loss / loss before RL) of each curve. Its loss before RL is the target's only number in it,
    and the naive rule (no change) uses the same. The interval is the scatter of the other sets.

    Args:
        curves_by_set: curves of the same runs on each set, each with a loss at step 0; sets may be evaluated at fewer
            steps. `curves.curves_by(table, "eval_set")` gives them.
        target: the set to predict.

    Returns:
        One row for each size of the target that the other sets have too; none when fewer than two sets have it.

    Raises:
        ValueError: no such set.
    """
    if target not in curves_by_set:
        raise ValueError(f"target must be one of {list(curves_by_set)}, got {target!r}")
    out = []
    for c in curves_by_set[target]:
        others = [
            (o, before) for name, group in curves_by_set.items() if name != target
            for o in group if o.label == c.label and (before := o.loss_before) and np.all(o.loss > 0)
        ]  # fmt: skip
        if len(others) < 2 or not c.loss_before:
            continue
        fall = np.array([np.interp(np.log(c.x), np.log(o.x), np.log(o.loss) - math.log(before)) for o, before in others])
        middle, m = fall.mean(axis=0), len(others)
        wide = fall.std(axis=0, ddof=1) * math.sqrt(1 + 1 / m) * float(stdtrit(m - 1, (1 + CONFIDENCE) / 2))
        fitted = c.loss_before * np.exp(middle)
        band = (fitted * np.exp(-wide), fitted * np.exp(wide))
        rules = {"no change": np.full(len(c.x), c.loss_before)}
        out.append(
            _score("other set", "mean of the other sets", c, fitted, band, rules, "its loss before RL",
                   label=f"{target} {c.label}")
        )  # fmt: skip
    return out


def choose(rows: Sequence[HeldOut]) -> LawChoice:
    """Chooses a law by its error on what it did not see.

    Laws are compared on the same targets. The best is named when, over the targets, its squared log error is below that
    of every other law by two standard errors, and below every naive rule's; with one target there is no such error, so
    a law is never chosen from it.

    Args:
        rows: of one test; rows that used the target's own points are left out unless all did.

    Returns:
        The choice; an empty `best` with a reason where the data do not tell.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows: must hold at least one prediction, got none")
    rows = [r for r in rows if not r.tests_only_slope] or list(rows)
    test = rows[0].test
    squares: dict[str, dict[str, float]] = {}
    for r in rows:
        if r.test == test:
            squares.setdefault(r.law, {})[r.target] = r.log_error**2
    targets = sorted(set.intersection(*(set(v) for v in squares.values())))
    by_law = {law: np.array([v[t] for t in targets]) for law, v in squares.items()}
    order = sorted(by_law, key=lambda law: float(by_law[law].mean()) if targets else math.inf)
    skill: dict[str, dict[str, float | None]] = {}
    for law in order:
        mine = [r for r in rows if r.law == law and r.test == test]
        skill[law] = {}
        for rule in mine[0].skill:
            pairs = [(r.log_error**2, s) for r in mine if (s := r.skill.get(rule)) is not None]
            rule_error = sum(e / (1 - s) for e, s in pairs if s < 1)
            skill[law][rule] = 1 - sum(e for e, _ in pairs) / rule_error if rule_error > 0 else None
    best, why = order[0], ""
    if len(targets) < 2:
        why = f"not identified by these data: {len(targets)} target, and one tells no law from another by more than luck"
    else:
        tied = []
        for law in order[1:]:
            gap = by_law[law] - by_law[best]
            if not gap.mean() > 2 * gap.std(ddof=1) / math.sqrt(len(gap)):
                tied.append(law)
        lost = [rule for rule, s in skill[best].items() if s is not None and s <= 0]
        if tied:
            why = (
                f"not identified by these data: {best} has the smallest error over {len(targets)} targets, but not by two "
                f"standard errors against {', '.join(tied)}"
            )
        elif lost:
            why = f"not identified by these data: {best} predicts best, but no better than the rule {lost[0]!r}"
    return LawChoice(
        test=test, errors={law: float(np.sqrt(by_law[law].mean())) for law in order}, skill=skill,
        num_targets=len(targets), best="" if why else best,
        why=why or f"{best} predicts {len(targets)} targets best, by two standard errors",
    )  # fmt: skip


def _point_scatter(residual: np.ndarray, y: np.ndarray, log: bool, spent: int) -> float:
    """Standard deviation of a point about its curve, in log L."""
    relative = residual if log else residual / np.maximum(y, 1e-9)
    return math.sqrt(float(relative @ relative) / max(len(relative) - spent, 1))


def _band(draws: np.ndarray, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Where points [n] will lie, given draws [draws, n] of their curve."""
    low, high = interval(draws * np.exp(noise * rng.standard_normal(draws.shape)), CONFIDENCE)
    return low, high


def _score(
    test: str, law: str, target: Curve, fitted: np.ndarray, band: tuple[np.ndarray, np.ndarray] | None,
    naive: dict[str, np.ndarray], used: str, label: str = "",
) -> HeldOut:  # fmt: skip
    loss = np.maximum(target.loss, 1e-9)

    def square(v: np.ndarray) -> float:
        return float(np.mean(np.log(np.maximum(v, 1e-9) / loss) ** 2))

    error = square(fitted)
    inside = None if band is None else float(np.mean((band[0] <= target.loss) & (target.loss <= band[1])))
    skill = {}
    for rule, v in naive.items():
        wrong = square(v)
        skill[rule] = 1 - error / wrong if wrong > 0 else None
    return HeldOut(
        test=test, law=law, target=label or target.label, used=used, num_points=len(loss), log_error=math.sqrt(error),
        bias=float(np.mean(fitted - target.loss)), r2=r_squared(target.loss, fitted), coverage=inside, confidence=CONFIDENCE,
        skill=skill,
    )  # fmt: skip
