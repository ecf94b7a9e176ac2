"""Which size to post-train with RL for a budget or a target, for how many steps, and how far it will get.

A fitted law gives each candidate its loss at what the budget buys it, or the compute at which it reaches a target. The
smallest predicted loss (or compute) is the pick; whether it is a decision is said by the intervals, which come from the
bootstrap draws of the fit: two candidates are compared draw by draw, because their errors are shared. What the law was
not fitted to is named: a budget beyond the measured range (the law has no floor, so it is too hopeful there), a size
that was not measured, a law that the data do not identify, more reuse than was tried, a held-out prediction that failed.

A size that was not measured gets its slope from k(N). Its intercept, for which there is no law, is interpolated in log N
between its neighbours, or continued from the three nearest sizes; the error that this procedure makes at the measured
sizes, when each is left out, widens its interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_engine.config import load_run_config
from grpo_engine.evaluate.intervals import interval
from grpo_engine.study import gpus
from grpo_engine.study.forecast import EstimateConfig, Pace, PlannedRun, pace
from grpo_engine.study.laws.holdout import prediction
from grpo_engine.study.laws.results import AxisFit, Estimate, JointCurve, JointFit, draws_of

MOST_LOG_X = 200.0  # of an x that would reach a target: beyond it, never


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One size under the budget, or on its way to the target."""

    label: str
    params: float
    measured: bool
    prompts: float | None  # seen, under this budget
    steps: float | None
    compute: float | None  # FLOPs, 6NT
    tokens: float | None  # trained on, prompts and answers
    hours: float | None  # of the GPUs that were named; None where none was
    reuse: float | None  # prompts seen over the different prompts there are; None where that number is not given
    loss: Estimate  # of the mean over runs, not of a single run
    needs: Estimate | None  # for a target loss: compute (or prompts, along "data" without a rate) until it is reached
    behind: Estimate | None  # its loss minus the pick's (for a target, log of its `needs` over the pick's); None: the pick
    best_share: float  # of the draws in which it is the best
    notes: tuple[str, ...]  # where the law is stretched


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """The answer. `decided` is False when the data do not support a choice; `why` says so in words."""

    axis: str
    kind: str
    budget: str  # "compute", "prompts", "hours" or "loss"
    amount: float
    group_size: int | None  # answers to a prompt, of the runs that were fitted
    pick: str  # the smallest predicted loss
    decided: bool
    tied: tuple[str, ...]  # candidates that the data cannot tell from the pick
    why: str
    candidates: tuple[Candidate, ...]  # the pick first, then by predicted loss (or `needs`)
    distrust: tuple[str, ...]  # why this must not be trusted, each a sentence; empty: no reason was found

    def render_text(self) -> str:
        """The recommendation as plain text: what to do, how sure it is, and a table of the candidates.

        Returns:
            Several lines without a trailing line end.
        """
        unit = {"compute": " FLOPs", "prompts": " prompts", "hours": " hours", "loss": " loss"}[self.budget]
        best = self.candidates[0]
        plan = [f"{self.amount:.3g}{unit}"]
        if best.compute is not None and self.budget in ("loss", "hours"):
            plan.append(f"{best.compute:.3g} FLOPs")
        if best.prompts is not None and self.budget != "prompts":
            plan.append(f"{best.prompts:,.0f} prompts")
        if best.steps is not None:
            plan.append(f"{best.steps:,.0f} steps")
        if best.reuse is not None:
            plan.append(f"each prompt {max(best.reuse, 1.0):.3g} times")
        timed = best.hours is not None
        if timed and self.budget != "hours":
            plan.append(f"{best.hours:.3g} hours")
        loss = f"{best.loss.value:.3f} ({best.loss.low:.3f} to {best.loss.high:.3f})"
        verb = "Train" if self.decided else "No size is established as the best; the law's guess is"
        lines = [f"{verb} {self.pick}: {', '.join(plan)}, predicted test loss {loss}.", self.why, ""]
        target = self.budget == "loss"
        what = ("needs", "95 % interval", "times the pick's") if target else ("loss", "95 % interval", "behind the pick")
        head = ("size", "N", "prompts", "steps", *(["hours"] if timed else []), *what, "best in", "notes")
        rows = [head]
        for c in self.candidates:
            shown, digits = (c.needs, ".3g") if c.needs is not None else (c.loss, ".3f")
            gap = "-"
            if c.behind is not None:
                assert c.behind.low is not None and c.behind.high is not None  # `_estimate` makes both ends
                ends = (c.behind.value, c.behind.low, c.behind.high)
                value, low, high = (f"{math.exp(v):.3g}" if target else f"{v:+.3f}" for v in ends)
                gap = f"{value} ({low} to {high})"
            rows.append(
                (
                    c.label, f"{c.params:.3g}", "-" if c.prompts is None else f"{c.prompts:,.0f}",
                    "-" if c.steps is None else f"{c.steps:,.0f}", *([f"{c.hours:.3g}"] if timed else []),
                    f"{shown.value:{digits}}",
                    f"{shown.low:{digits}} to {shown.high:{digits}}", gap, f"{100 * c.best_share:.0f} %",
                    "; ".join(c.notes),
                )
            )  # fmt: skip
        widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
        for reason in self.distrust:
            if reason not in self.why:
                lines.insert(-1, f"Do not trust this: {reason}")
        lines += ["  ".join(v.ljust(w) for v, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        return "\n".join(lines)


def recommend(
    fit: AxisFit,
    *,
    compute: float | None = None,
    prompts: float | None = None,
    target_loss: float | None = None,
    gpu: str | None = None,
    hours: float | None = None,
    num_gpus: int = 1,
    runs: Mapping[str, PlannedRun] | None = None,
    unique_prompts: int | None = None,
    sizes: Mapping[str, float] | None = None,
    kind: str | None = None,
) -> Recommendation:
    """Picks a size for a budget, or the cheapest way to a target loss.

    Args:
        fit: the fit of one axis, "compute" or "data". A budget in the other unit is converted with the measured compute
            a prompt of each size.
        compute: budget in FLOPs (6NT); give exactly one of this, `prompts`, `target_loss` and `hours`.
        prompts: budget in prompts seen.
        target_loss: loss to be reached, in (0, 1); the pick needs the least compute (prompts, where the compute a prompt is
            unknown).
        gpu: a key of `gpus.GPUS`: each candidate gets the hours that `study plan --gpu` gives its run, and the pick's
            memory is checked.
        hours: budget in hours of `num_gpus` such GPUs, start and evaluations included. The compute that it buys depends
            on the size.
        num_gpus: how many; nothing is lost between them.
        runs: size -> its run as it was planned. A size that is not there is timed by N alone, see `assumed_run`.
        unique_prompts: different prompts there are; tells how often each would be seen.
        sizes: candidates, label -> parameters, in the N that the fit used. A label of a measured curve must have its
            parameters; any other is interpolated or extrapolated. None takes the measured ones.
        kind: whose intercepts an unmeasured size gets, where the fit holds several kinds.

    Returns:
        The recommendation.

    Raises:
        ValueError: no law was fitted, not exactly one budget, a budget that is not positive, a label with other
            parameters than were measured, an unknown kind, hours that end before a first step, or a conversion that
            needs a compute a prompt that is unknown.
    """
    joint = fit.joint
    if joint is None:
        raise ValueError(f"fit: there is no joint law to recommend from: {fit.verdict.why}")
    if fit.axis not in ("compute", "data"):
        raise ValueError(f"fit: its axis must be 'compute' or 'data', got {fit.axis!r}")
    given = {"compute": compute, "prompts": prompts, "target_loss": target_loss, "hours": hours}
    budgets = {name: float(value) for name, value in given.items() if value is not None}
    if len(budgets) != 1:
        raise ValueError(f"compute, prompts, target_loss, hours: exactly one must be given, got {list(budgets) or 'none'}")
    if hours is not None and gpu is None:
        raise ValueError(f"gpu: must be one of {list(gpus.GPUS)} with hours, got None")
    device = None if gpu is None else gpus.get_gpu(gpu)
    if num_gpus < 1:
        raise ValueError(f"num_gpus: must be at least 1, got {num_gpus}")
    ((name, amount),) = budgets.items()
    budget = "loss" if name == "target_loss" else name
    if not (amount > 0 and math.isfinite(amount)):
        raise ValueError(f"{budget}: must be positive and finite, got {amount}")
    if budget == "loss" and amount >= 1:
        raise ValueError(f"target_loss: must be below 1, got {amount}")
    if unique_prompts is not None and unique_prompts < 1:
        raise ValueError(f"unique_prompts: must be at least 1, got {unique_prompts}")
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
    rng = np.random.default_rng(joint.bootstrap.seed)  # for the intercept of sizes that were not measured
    paces = {} if device is None else {label: _pace(fit, label, n, device, runs or {}) for label, n in sizes.items()}
    parts, too_short = [], []
    for label, n in sizes.items():
        unit, value, timing = budget, amount, paces.get(label)
        if budget == "hours":
            assert timing is not None  # hours have a gpu
            unit, value = "compute", timing.compute(3600.0 * amount * num_gpus)
            if not value > 0:
                too_short.append(f"{label}'s start and evaluations take {timing.fixed_seconds / 3600 / num_gpus:.3g}")
                continue
        part = _predict(fit, joint, known.get(label), label, n, unit, value, kind, rng, unique_prompts)
        flops = part.fields["compute"]
        timed = None if timing is None or flops is None else timing.seconds(flops)
        part.fields["hours"] = None if timed is None else timed / 3600.0 / num_gpus
        parts.append(part)
    if not parts:
        raise ValueError(f"hours: too few for a first step, got {amount:g}: {', '.join(too_short)}")
    order = sorted(range(len(parts)), key=lambda i: (parts[i].score, parts[i].fields["params"]))
    scores = np.stack([parts[i].draws for i in order])  # [S, draws]
    share = np.bincount(scores.argmin(axis=0), minlength=len(order)) / scores.shape[1]
    candidates, tied = [], []
    for rank, i in enumerate(order):
        p, gap = parts[i], None
        if rank > 0:
            gap = _estimate(p.score - parts[order[0]].score, p.draws - scores[0])
            if gap.low is None or not gap.low > 0:
                tied.append(p.fields["label"])
        candidates.append(Candidate(**p.fields, behind=gap, best_share=float(share[rank])))
    pick = candidates[0]
    distrust = _distrust(fit, joint, pick)
    if too_short:
        distrust += (f"Left out, because the hours end before a first step: {', '.join(too_short)}.",)
    if device is not None and (need := paces[pick.label].peak_bytes) > (room := device.room(num_gpus)):
        distrust += (
            f"{pick.label} needs {need / 1e9:.0f} GB to train, and a run may fill {room / 1e9:.0f} GB of {num_gpus} x "
            f"{gpu}.",
        )
    reasons = [r for r in distrust if r.startswith("The data do not identify")]
    if tied:
        cheapest = min([pick, *(c for c in candidates if c.label in tied)], key=lambda c: c.params)
        reasons.append(
            f"The data cannot tell {pick.label} from {', '.join(tied)}: the interval of their difference holds 0."
            + ("" if reasons else f" The smallest of them, {cheapest.label}, is the cheapest to serve.")
        )
    if pick.notes:
        reasons.append(f"For {pick.label} the law is stretched: {'; '.join(pick.notes)}.")
    others = f" ahead of {', '.join(c.label for c in candidates[1:])}" if len(candidates) > 1 else ""
    if not reasons:
        reasons.append(f"{pick.label} is{others} beyond the 95 % interval of each difference, in the measured range.")
    reasons.append(f"Intervals: {joint.bootstrap.method}.")
    return Recommendation(
        axis=fit.axis, kind=fit.kind, budget=budget, amount=amount, group_size=fit.selection.group_size,
        pick=pick.label, decided=joint.verdict.ok and not tied and not pick.notes, tied=tuple(tied),
        why=" ".join(reasons), candidates=tuple(candidates), distrust=distrust,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierPoint:
    """The best size at one compute budget."""

    compute: float
    pick: str
    params: float  # N*
    params_span: tuple[float, float]  # smallest and largest N that is the best in at least 5 % of the draws
    loss: Estimate
    decided: bool


def frontier(
    fit: AxisFit,
    *,
    count: int = 13,
    sizes: Mapping[str, float] | None = None,
    kind: str | None = None,
) -> tuple[FrontierPoint, ...]:
    """N*(C): the best size at each compute budget inside the measured range.

    Args:
        fit: see `recommend`; along "data" the compute a prompt must be known.
        count: budgets, evenly in the logarithm, from where the first size ends to where the last one does.
        sizes: candidates, see `recommend`.
        kind: see `recommend`.

    Returns:
        The points, compute rising.

    Raises:
        ValueError: see `recommend`.
    """
    ends = []
    for s in fit.sizes:
        per_prompt = 1.0 if fit.axis == "compute" else s.compute_per_prompt
        if per_prompt is None:
            raise ValueError(f"fit: the compute a prompt of {s.label} is unknown, so there is no frontier in compute")
        ends.append(s.x_max * per_prompt)
    out = []
    for c in np.geomspace(min(ends), max(ends), count) if ends else ():
        r = recommend(fit, compute=float(c), sizes=sizes, kind=kind)
        likely = [o.params for o in r.candidates if o.best_share >= 0.05]
        best = r.candidates[0]
        out.append(
            FrontierPoint(compute=float(c), pick=best.label, params=best.params, params_span=(min(likely), max(likely)),
                          loss=best.loss, decided=r.decided)
        )  # fmt: skip
    return tuple(out)


def assumed_run(fit: AxisFit, label: str, n: float) -> PlannedRun:
    """A run instead of one whose plan is not known, as of an imported log, to time it by N.

    Args:
        fit: has the group size, and the tokens and prompts of a step.
        label: of the size.
        n: its parameters.

    Returns:
        A bfloat16 run without evaluations. The whole sequence counts as sampled, because the length of its prompt is not
        known.
    """
    per_prompt, per_step = _rates(fit, label, n)
    group = fit.selection.group_size
    settings = [f"model={{path: {label}, dtype: bfloat16}}", "evaluation.count=0"]
    settings += [] if per_step is None else [f"batch.prompts={max(1, round(per_step))}"]
    settings += [] if group is None else [f"batch.group_size={group}"]
    config = load_run_config(None, settings)
    length = 1000.0 if per_prompt is None else per_prompt / (6.0 * n * config.batch.group_size)
    return PlannedRun(
        config=config, estimate=EstimateConfig(prompt_tokens=1.0, response_tokens=max(length, 1.0), start_s=0.0)
    )


def _pace(fit: AxisFit, label: str, n: float, device: gpus.Gpu, runs: Mapping[str, PlannedRun]) -> Pace:
    run = runs.get(label) or assumed_run(fit, label, n)
    estimate = run.estimate.model_copy(update={"gpu": device.name})
    return pace(run.config, estimate, params=None if label in runs else round(n))


def _distrust(fit: AxisFit, joint: JointFit, pick: Candidate) -> tuple[str, ...]:
    out = []
    if not joint.verdict.ok:
        out.append(f"The data do not identify the law: {joint.verdict.why}.")
    if pick.notes:
        out.append(f"For {pick.label} the law is stretched: {'; '.join(pick.notes)}.")
    if pick.reuse is not None and pick.reuse > 1:
        out.append(
            f"Each prompt would be seen {pick.reuse:.3g} times, and the law was fitted to runs with a reuse of "
            f"{fit.selection.tau:g}."
        )
    largest = [h for h in fit.held_out if h.test == "largest size" and h.used == "nothing"]
    chosen = prediction(largest, largest[-1].target) if largest else None
    if chosen is not None:
        worse = [rule for rule, skill in chosen.skill.items() if skill is not None and skill <= 0]
        if worse:
            out.append(
                f"Predicted from the smaller sizes, {chosen.target} was off by {100 * chosen.log_error:.0f} %, no better "
                f"than the rule {worse[0]!r}."
            )
    curve = next((c for c in joint.curves if c.label == pick.label), None)
    if curve is not None and curve.r2 is not None and curve.r2 < 0.5:
        out.append(f"The law explains {100 * max(curve.r2, 0):.0f} % of the variance of {pick.label}'s own curve.")
    return tuple(out)


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = interval(draws)
    return Estimate(value=float(value), low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """The law of one size: log L = intercept - k (log x - middle), and its draws [draws]."""

    k: float
    intercept: float
    k_draws: np.ndarray
    intercept_draws: np.ndarray
    middle: float

    def loss(self, x: float) -> tuple[float, np.ndarray]:
        """Loss at x, and its draws."""
        u = math.log(x) - self.middle
        return math.exp(self.intercept - self.k * u), np.exp(self.intercept_draws - self.k_draws * u)

    def log_x(self, loss: float) -> tuple[float, np.ndarray]:
        """Log of the x at which the loss is reached, and its draws; infinite where the loss does not fall."""

        def solve(k: np.ndarray, intercept: np.ndarray) -> np.ndarray:
            out = self.middle + (intercept - math.log(loss)) / np.where(k > 0, k, 1.0)
            return np.where(k > 0, np.minimum(out, MOST_LOG_X), MOST_LOG_X)

        return float(solve(np.array(self.k), np.array(self.intercept))), solve(self.k_draws, self.intercept_draws)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A candidate before it is compared: the smallest score wins."""

    score: float
    draws: np.ndarray
    fields: dict[str, Any]


def _predict(
    fit: AxisFit, joint: JointFit, curve: JointCurve | None, label: str, n: float, budget: str, amount: float,
    kind: str | None, rng: np.random.Generator, unique_prompts: int | None,
) -> _Part:  # fmt: skip
    per_prompt, per_step = _rates(fit, label, n)
    unit = 1.0  # x of the law for one FLOP or prompt of the budget
    if budget != "loss" and (budget == "compute") != (fit.axis == "compute"):
        if per_prompt is None:
            raise ValueError(
                f"{budget}: the fit is along {fit.axis}, and the compute a prompt of {label} is unknown, so the budget "
                "cannot be converted"
            )
        unit = per_prompt if budget == "prompts" else 1.0 / per_prompt
    notes = []
    if curve is not None:
        i = joint.index(curve.label)
        k_draws, e_draws = draws_of(joint, np.array([n]))
        middle = curve.log_x_mean
        line = _Line(
            k=curve.k.value, intercept=curve.E.value - curve.k.value * middle, k_draws=k_draws[:, 0],
            intercept_draws=e_draws[:, i] - k_draws[:, 0] * middle, middle=middle,
        )  # fmt: skip
        low, high = curve.x_min, curve.x_max
    else:
        same = _curves_of(joint, kind)
        line, how = _unmeasured(joint, same, n, rng)
        notes.append(how)
        low, high = min(c.x_min for c in same), max(c.x_max for c in same)
    needs = None
    if budget == "loss":
        log_x, log_draws = line.log_x(amount)
        x = math.exp(log_x)
        # along "data" the compute decides, where it is known
        scale = per_prompt if fit.axis == "data" and per_prompt is not None else 1.0
        needs = _estimate(scale * x, scale * np.exp(log_draws))
        score, draws = log_x + math.log(scale), log_draws + math.log(scale)
        loss = Estimate(value=amount, low=amount, high=amount)
        if log_x >= MOST_LOG_X:
            notes.append("its loss does not fall to the target")
    else:
        x = amount * unit
        score, draws = line.loss(x)
        loss = _estimate(score, draws)
        if score > 1:
            notes.append("a loss above 1 does not exist: the law does not hold here")
    if x > 1.05 * high:
        notes.append(f"{x / high:.3g} times beyond the last measured point, and the law has no floor")
    elif x < low / 1.05:
        notes.append(f"before the first measured point by a factor of {low / x:.3g}")
    compute = x if fit.axis == "compute" else (None if per_prompt is None else x * per_prompt)
    prompts = x if fit.axis == "data" else (None if per_prompt is None else x / per_prompt)
    fields = {
        "label": label, "params": float(n), "measured": curve is not None, "prompts": prompts, "compute": compute,
        "steps": None if per_step is None or prompts is None else prompts / per_step,
        "tokens": None if compute is None else compute / (6.0 * n),
        "reuse": None if unique_prompts is None or prompts is None else prompts / unique_prompts,
        "loss": loss, "needs": needs, "notes": tuple(notes),
    }  # fmt: skip
    return _Part(score=score, draws=draws, fields=fields)


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


def _curves_of(joint: JointFit, kind: str | None) -> list[JointCurve]:
    kinds = sorted({c.kind for c in joint.curves})
    if kind is None and len(kinds) > 1:
        raise ValueError(f"kind: must be one of {kinds} for a size that was not measured, got None")
    if kind is not None and kind not in kinds:
        raise ValueError(f"kind: must be one of {kinds}, got {kind!r}")
    return sorted((c for c in joint.curves if kind in (None, c.kind)), key=lambda c: c.params)


def _intercept(log_n: float, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values [..., S] at log N `known` [S], interpolated at log_n, or continued from the three nearest sizes."""
    if known[0] <= log_n <= known[-1]:
        right = min(max(int(np.searchsorted(known, log_n)), 1), len(known) - 1)
        t = (log_n - known[right - 1]) / (known[right] - known[right - 1])
        return (1 - t) * values[..., right - 1] + t * values[..., right]
    near = slice(0, 3) if log_n < known[0] else slice(-3, None)
    u, v = known[near], values[..., near]
    slope = (v - v.mean(axis=-1, keepdims=True)) @ (u - u.mean()) / float((u - u.mean()) @ (u - u.mean()))
    return v.mean(axis=-1) + slope * (log_n - u.mean())


def _unmeasured(joint: JointFit, same: Sequence[JointCurve], n: float, rng: np.random.Generator) -> tuple[_Line, str]:
    """The law of a size without a curve, and a note."""
    if len(same) < 2:
        raise ValueError(f"sizes: the intercept of a size that was not measured needs two measured ones, got {len(same)}")
    known = np.log([c.params for c in same])
    columns = [joint.index(c.label) for c in same]
    k_draws, e_draws = draws_of(joint, np.array([*(c.params for c in same), n]))
    k_value = np.append([c.k.value for c in same], joint.slope.k(n))
    middle = float(np.mean([c.log_x_mean for c in same]))  # intercepts are told apart from slopes there
    intercepts = np.array([c.E.value for c in same]) - k_value[:-1] * middle
    intercept_draws = e_draws[:, columns] - k_draws[:, :-1] * middle
    log_n = math.log(n)
    inside = known[0] <= log_n <= known[-1]
    # what the procedure gets wrong where the answer is known: interior sizes for interpolation, the ends otherwise
    left_out = range(1, len(same) - 1) if inside else (0, len(same) - 1)
    errors = [
        float(_intercept(known[i], np.delete(known, i), np.delete(intercepts, i))) - intercepts[i]
        for i in left_out
        if len(same) > 2
    ]
    scatter = float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0
    line = _Line(
        k=float(k_value[-1]), intercept=float(_intercept(log_n, known, intercepts)), k_draws=k_draws[:, -1],
        intercept_draws=_intercept(log_n, known, intercept_draws) + scatter * rng.standard_normal(len(k_draws)),
        middle=middle,
    )  # fmt: skip
    how = "not measured: its intercept is that between its neighbours" if inside else "not measured, beyond the measured N"
    if not errors:
        how += ", with an error that two sizes cannot tell"
    return line, how
