"""Which size to post-train with RL for a budget, for how many steps, and how far it will get.

A fitted law gives each candidate its loss at what the budget buys it. The smallest predicted loss is the pick; whether
it is a decision is said by the intervals, which come from the bootstrap draws of the fit: two candidates are compared
draw by draw, because their errors are shared. What the law was not fitted to is named: a budget beyond the measured
range (the law has no floor, so it is too hopeful there), a size that was not measured, a fit that data do not carry.

A size that was not measured gets its slope from k(N). Its level, for which there is no law, is interpolated in log N
between its neighbours, or continued from the three nearest sizes; the error that this procedure makes at the measured
sizes, when each is left out, widens its interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .fit import AxisFit, CurveLevel, Estimate, JointFit, draws_of, interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One size under the budget."""

    label: str
    params: float
    measured: bool
    prompts: float | None  # seen, under this budget
    steps: float | None
    compute: float | None  # FLOPs, 6NT
    loss: Estimate  # of the mean over runs, not of a single run
    behind: Estimate | None  # its loss minus the pick's; None for the pick
    best_share: float  # of the draws in which it has the smallest loss
    notes: tuple[str, ...]  # where the law is stretched


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """The answer. `decided` is False when the data do not carry a choice; `why` says so in words."""

    axis: str
    kind: str
    budget: str  # "compute" or "prompts"
    amount: float
    pick: str  # the smallest predicted loss
    decided: bool
    tied: tuple[str, ...]  # candidates that the data cannot tell from the pick
    why: str
    candidates: tuple[Candidate, ...]  # by predicted loss, the pick first

    def render_text(self) -> str:
        """The recommendation as plain text: what to do, how sure it is, and a table of the candidates.

        Returns:
            Several lines without a trailing line end.
        """
        unit = "FLOPs" if self.budget == "compute" else "prompts"
        best = self.candidates[0]
        plan = [f"{self.amount:.3g} {unit}"]
        if best.prompts is not None and self.budget == "compute":
            plan.append(f"{best.prompts:,.0f} prompts")
        if best.steps is not None:
            plan.append(f"{best.steps:,.0f} steps")
        loss = f"{best.loss.value:.3f} ({best.loss.low:.3f} to {best.loss.high:.3f})"
        verb = "Train" if self.decided else "No size is established as the best; the law's guess is"
        lines = [f"{verb} {self.pick}: {', '.join(plan)}, predicted test loss {loss}.", self.why, ""]
        head = ("size", "N", "prompts", "steps", "loss", "95 % interval", "behind the pick", "best in", "notes")
        rows = [head]
        for c in self.candidates:
            gap = "-" if c.behind is None else f"{c.behind.value:+.3f} ({c.behind.low:+.3f} to {c.behind.high:+.3f})"
            rows.append(
                (
                    c.label, f"{c.params:.3g}", "-" if c.prompts is None else f"{c.prompts:,.0f}",
                    "-" if c.steps is None else f"{c.steps:,.0f}", f"{c.loss.value:.3f}",
                    f"{c.loss.low:.3f} to {c.loss.high:.3f}", gap, f"{100 * c.best_share:.0f} %", "; ".join(c.notes),
                )
            )  # fmt: skip
        widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
        lines += ["  ".join(v.ljust(w) for v, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        return "\n".join(lines)


def recommend(
    fit: AxisFit,
    *,
    compute: float | None = None,
    prompts: float | None = None,
    sizes: Mapping[str, float] | None = None,
    kind: str | None = None,
) -> Recommendation:
    """Picks a size for a budget.

    Args:
        fit: the fit of one axis, "compute" or "data". A budget in the other unit is converted with the measured compute
            a prompt of each size.
        compute: budget in FLOPs (6NT); give this or `prompts`.
        prompts: budget in prompts seen.
        sizes: candidates, label -> parameters, in the N that the fit used. A label of a measured curve must have its
            parameters; any other is interpolated or extrapolated. None takes the measured ones.
        kind: whose levels an unmeasured size gets, where the fit holds several kinds.

    Returns:
        The recommendation.

    Raises:
        ValueError: no law was fitted, not exactly one budget, a budget that is not positive, a label with other
            parameters than were measured, an unknown kind, or a conversion that needs a compute a prompt that is
            unknown.
    """
    joint = fit.joint
    if joint is None:
        raise ValueError(f"fit: there is no joint law to recommend from: {fit.verdict.why}")
    if fit.axis not in ("compute", "data"):
        raise ValueError(f"fit: its axis must be 'compute' or 'data', got {fit.axis!r}")
    if (compute is None) == (prompts is None):
        raise ValueError(f"compute, prompts: exactly one must be given, got {compute} and {prompts}")
    budget, amount = ("compute", compute) if prompts is None else ("prompts", prompts)
    assert amount is not None
    if not (amount > 0 and math.isfinite(amount)):
        raise ValueError(f"{budget}: must be positive and finite, got {amount}")
    known = {c.label: c for c in joint.curves}
    if sizes is None:
        sizes = {c.label: c.params for c in joint.curves}
    if not sizes:
        raise ValueError("sizes: must name at least one candidate, got none")
    for label, n in sizes.items():
        if not n > 0:
            raise ValueError(f"sizes: {label} must have a positive number of parameters, got {n}")
        if label in known and not math.isclose(n, known[label].params, rel_tol=1e-3):
            raise ValueError(f"sizes: {label} was measured with {known[label].params:.6g} parameters, got {n:.6g}")
    rng = np.random.default_rng(joint.bootstrap.seed)  # for the level of sizes that were not measured
    parts = [_predict(fit, joint, known.get(label), label, n, budget, amount, kind, rng) for label, n in sizes.items()]
    order = sorted(range(len(parts)), key=lambda i: (parts[i][0], parts[i][2]["params"]))
    losses = np.stack([parts[i][1] for i in order])  # [S, draws]
    share = np.bincount(losses.argmin(axis=0), minlength=len(order)) / losses.shape[1]
    candidates, tied = [], []
    for rank, i in enumerate(order):
        value, draws, rest = parts[i]
        gap = None
        if rank > 0:
            gap = _estimate(value - parts[order[0]][0], draws - losses[0])
            if gap.low is None or gap.low <= 0:
                tied.append(rest["label"])
        candidates.append(
            Candidate(**rest, loss=_estimate(value, draws), behind=gap, best_share=float(share[rank]))
        )
    pick = candidates[0]
    reasons = []
    if not joint.verdict.ok:
        reasons.append(f"The data do not carry the law: {joint.verdict.why}.")
    if tied:
        cheapest = min([pick, *(c for c in candidates if c.label in tied)], key=lambda c: c.params)
        reasons.append(
            f"The data cannot tell {pick.label} from {', '.join(tied)}: the interval of their difference holds 0. "
            f"The smallest of them, {cheapest.label}, is the cheapest to serve."
        )
    if pick.notes:
        reasons.append(f"For {pick.label} the law is stretched: {'; '.join(pick.notes)}.")
    others = f" ahead of {', '.join(c.label for c in candidates[1:])}" if len(candidates) > 1 else ""
    if not reasons:
        reasons.append(f"{pick.label} is{others} beyond the 95 % interval of each difference, in the measured range.")
    reasons.append(f"Intervals: {joint.bootstrap.method}.")
    return Recommendation(
        axis=fit.axis, kind=fit.kind, budget=budget, amount=float(amount), pick=pick.label,
        decided=joint.verdict.ok and not tied and not pick.notes, tied=tuple(tied), why=" ".join(reasons),
        candidates=tuple(candidates),
    )  # fmt: skip


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = interval(draws)
    return Estimate(value=float(value), low=float(low), high=float(high))


def _predict(
    fit: AxisFit, joint: JointFit, curve: CurveLevel | None, label: str, n: float, budget: str, amount: float,
    kind: str | None, rng: np.random.Generator,
) -> tuple[float, np.ndarray, dict[str, object]]:  # fmt: skip
    """Loss, its draws, and the fields of a candidate that need no comparison."""
    per_prompt, per_step = _rates(fit, label, n)
    if per_prompt is None and (budget == "compute") != (fit.axis == "compute"):
        raise ValueError(
            f"{budget}: the fit is along {fit.axis}, and the compute a prompt of {label} is unknown, so the budget "
            "cannot be converted"
        )
    if budget == "compute":
        compute, prompts = amount, None if per_prompt is None else amount / per_prompt
    else:
        compute, prompts = None if per_prompt is None else amount * per_prompt, amount
    x = compute if fit.axis == "compute" else prompts
    assert x is not None
    notes = []
    if curve is not None:
        value, draws = float(joint.loss(label, x)), joint.loss_draws(label, x)
        low, high = curve.x_min, curve.x_max
    else:
        same = _curves_of(joint, kind)
        value, draws, how = _unmeasured(joint, same, n, x, rng)
        notes.append(how)
        low, high = min(c.x_min for c in same), max(c.x_max for c in same)
    if x > 1.05 * high:
        notes.append(f"{x / high:.3g} times beyond the last measured point, and the law has no floor")
    elif x < low / 1.05:
        notes.append(f"before the first measured point by a factor of {low / x:.3g}")
    if value > 1:
        notes.append("a loss above 1 does not exist: the law does not hold here")
    rest = {
        "label": label, "params": float(n), "measured": curve is not None, "prompts": prompts, "compute": compute,
        "steps": None if per_step is None or prompts is None else prompts / per_step, "notes": tuple(notes),
    }  # fmt: skip
    return value, draws, rest


def _rates(fit: AxisFit, label: str, n: float) -> tuple[float | None, float | None]:
    """(compute a prompt, prompts a step) of a size; of one that was not measured, by the median tokens a prompt."""
    for s in fit.sizes:
        if s.label == label:
            return s.compute_per_prompt, s.prompts_per_step
    per_param = [s.compute_per_prompt / s.params for s in fit.sizes if s.compute_per_prompt is not None]
    per_step = [s.prompts_per_step for s in fit.sizes if s.prompts_per_step is not None]
    return (
        float(np.median(per_param)) * n if per_param else None,
        float(np.median(per_step)) if per_step else None,
    )


def _curves_of(joint: JointFit, kind: str | None) -> list[CurveLevel]:
    kinds = sorted({c.kind for c in joint.curves})
    if kind is None and len(kinds) > 1:
        raise ValueError(f"kind: must be one of {kinds} for a size that was not measured, got None")
    if kind is not None and kind not in kinds:
        raise ValueError(f"kind: must be one of {kinds}, got {kind!r}")
    return sorted((c for c in joint.curves if kind in (None, c.kind)), key=lambda c: c.params)


def _level(log_n: float, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values [..., S] at log N `known` [S], interpolated at log_n, or continued from the three nearest sizes."""
    if known[0] <= log_n <= known[-1]:
        right = min(max(int(np.searchsorted(known, log_n)), 1), len(known) - 1)
        t = (log_n - known[right - 1]) / (known[right] - known[right - 1])
        return (1 - t) * values[..., right - 1] + t * values[..., right]
    near = slice(0, 3) if log_n < known[0] else slice(-3, None)
    u, v = known[near], values[..., near]
    slope = (v - v.mean(axis=-1, keepdims=True)) @ (u - u.mean()) / float((u - u.mean()) @ (u - u.mean()))
    return v.mean(axis=-1) + slope * (log_n - u.mean())


def _unmeasured(
    joint: JointFit, same: Sequence[CurveLevel], n: float, x: float, rng: np.random.Generator
) -> tuple[float, np.ndarray, str]:
    """Loss, draws and a note for a size without a curve."""
    if len(same) < 2:
        raise ValueError(f"sizes: the level of a size that was not measured needs two measured ones, got {len(same)}")
    known = np.log([c.params for c in same])
    columns = [joint.index(c.label) for c in same]
    k_draws, e_draws = draws_of(joint, np.array([*(c.params for c in same), n]))
    k_value = np.append([c.k.value for c in same], joint.slope.k(n))
    middle = float(np.mean([c.log_x_mean for c in same]))  # levels are told apart from slopes there
    levels = np.array([c.E.value for c in same]) - k_value[:-1] * middle
    level_draws = e_draws[:, columns] - k_draws[:, :-1] * middle
    log_n = math.log(n)
    value = float(_level(log_n, known, levels)) - float(k_value[-1]) * (math.log(x) - middle)
    draws = _level(log_n, known, level_draws) - k_draws[:, -1] * (math.log(x) - middle)
    inside = known[0] <= log_n <= known[-1]
    # what the procedure gets wrong where the answer is known: interior sizes for interpolation, the ends otherwise
    places = range(1, len(same) - 1) if inside else (0, len(same) - 1)
    errors = [
        float(_level(known[i], np.delete(known, i), np.delete(levels, i))) - levels[i]
        for i in places
        if len(same) > 2
    ]
    scatter = float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0
    draws = draws + scatter * rng.standard_normal(len(draws))
    how = "not measured: its level is that between its neighbours" if inside else "not measured, beyond the measured N"
    if not errors:
        how += ", with an error that two sizes cannot tell"
    return math.exp(value), np.exp(draws), how
