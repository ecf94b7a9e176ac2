"""What a study says about the usual claims of scaling studies: effect, interval, verdict.

Each comparison is of two groups of runs, on the same problems. Two things are uncertain and both are drawn anew:
  * the problems, once for both groups, because both answered the same ones (where records tell each problem's right
    answers; else by the recorded standard errors, as if the groups were independent, which is cautious). The answers
    that were drawn to a problem are in that;
  * the runs: a normal deviate for each side with the spread between seeds, as Student's t. Two or three seeds do not
    tell their spread, so it is pooled over every group of the study that has several.

A verdict is "supported", "not supported" or "undecided", and a difference that is not significant supports nothing:
  * *superiority* (larger is better): supported when the whole interval is above 0; not supported when it is below the
    smallest effect that matters (the margin);
  * *equivalence* (alike) and *non-inferiority* (is free): supported when the whole interval is inside the margin; not
    supported when it is outside.
A claim that makes m comparisons takes intervals at 1 - 0.05 / m (Bonferroni; 1 - 0.1 / m where a margin is tested, from
one side at a time), so that all its verdicts hold together with 95 %. It is supported when all of its comparisons are,
and not supported when one is not. Claims are not adjusted for one another: of twenty, one may be wrong by chance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtri

from grpo_engine.evaluate.intervals import interval
from grpo_engine.records.records import EvalRecord, Run
from grpo_engine.study.laws.results import Answer, Claim, Comparison, Estimate, Test

if TYPE_CHECKING:
    from grpo_engine.study.data import StudyData

ALPHA = 0.05  # of all comparisons of a claim together
MARGIN = 0.02  # of a loss: two problems in a hundred
GAIN_MARGIN = 0.1  # of log(loss before / loss after): a tenth of the loss
MOST_RUNS = 100  # more runs a side than this are not proposed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Side:
    """Mean loss of a group of runs somewhere along their curves."""

    value: float
    lasting: np.ndarray  # [draws], problems drawn anew: what more runs do not reduce
    draws: np.ndarray  # [draws], and runs
    runs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """A difference that a claim is about."""

    label: str
    effect: float
    lasting: np.ndarray  # [draws], see `_Side`
    draws: np.ndarray  # [draws]
    runs: tuple[int, int]
    per_run: float  # its variance for one run a side, beyond what lasts


@dataclass(slots=True)
class _Drawer:
    """Draws for all comparisons of a study: the same problems in each draw, whatever is compared."""

    rng: np.random.Generator
    draws: int
    spread: float  # standard deviation between seeds of the loss at the end
    freedom: int
    weights: dict[tuple[str, int], np.ndarray]  # (set, problems) -> [draws, problems]

    def side(self, runs: Sequence[Run], eval_set: str, axis: str, x: float | None) -> _Side:
        """The loss of runs at x along an axis; None: before RL."""
        points = [_at(run, eval_set, axis, x) for run in runs]
        value = float(np.mean([p[0] for p in points]))
        rates = [p[1] for p in points if p[1] is not None]
        if len(rates) == len(points):
            rate = np.mean(rates, axis=0)
            key = (eval_set, len(rate))
            if key not in self.weights:
                n = len(rate)
                self.weights[key] = self.rng.multinomial(n, np.full(n, 1 / n), size=self.draws) / n
            lasting = self.weights[key] @ rate
        else:
            error = math.sqrt(float(np.mean([p[2] ** 2 for p in points])))
            lasting = value + error * self.rng.standard_normal(self.draws)
        draws = lasting
        if x is not None and self.freedom:
            spread = self.spread / math.sqrt(len(runs))
            draws = draws + spread * self.rng.standard_t(self.freedom, self.draws)
        return _Side(value=value, lasting=lasting, draws=draws, runs=len(runs))

    def compare(self, pair: _Pair, test: Test, margin: float, confidence: float) -> Comparison:
        """The verdict of a difference."""
        low, high = map(float, interval(pair.draws, confidence))
        verdict = _decide(low, high, test, margin)
        needed, note = None, ""
        if not self.freedom:
            note = "no group has two runs, so the spread between seeds is unknown and not in the interval"
            verdict = "undecided"
        elif verdict == "undecided":
            needed, note = _runs_needed(pair, test, margin, confidence)
        return Comparison(
            label=pair.label, effect=Estimate(value=pair.effect, low=low, high=high), confidence=confidence, verdict=verdict,
            runs=pair.runs, runs_needed=needed, note=note,
        )  # fmt: skip


def study_claims(data: StudyData, *, draws: int = 4000, seed: int = 0) -> tuple[Claim, ...]:
    """Tests the claims that the cells of a study allow.

    Args:
        data: of `report.load_data`.
        draws: behind each interval.
        seed: of the draws; the same seed gives the same intervals.

    Returns:
        In this order, where there is anything to compare: each model is better than the next smaller one at fixed compute;
        at fixed data; loss falls along the ladder, likewise; reuse is free; base and instruct models gain alike; RL
        improves each set; larger groups are better at equal
        prompts, and at equal compute. A claim at fixed compute or prompts is left out where a run does not tell them.
    """
    trained = {n: r for n, r in data.runs.items() if any(e.step > 0 for e in _evals(r, data.headline))}
    data = dataclasses.replace(data, runs=trained)  # a log may end before the first step
    spread, freedom = _seed_spread(data)
    drawer = _Drawer(rng=np.random.default_rng([seed, 6]), draws=draws, spread=spread, freedom=freedom, weights={})
    evals = [e for run in data.runs.values() for e in _evals(run, data.headline)]
    compute, prompts = (
        all(math.isfinite(getattr(e, axis)) for e in evals) for axis in ("compute_6nt", "prompts_seen")
    )  # other trainers' logs may lack one
    claims = [
        _larger(data, drawer, "compute_6nt", "compute") if compute else None,
        _larger(data, drawer, "prompts_seen", "data") if prompts else None,
        _ladder(data, drawer, "compute_6nt", "compute") if compute else None,
        _ladder(data, drawer, "prompts_seen", "data") if prompts else None,
        _reuse(data, drawer) if prompts else None,
        _alike(data, drawer) if prompts else None,
        _transfer(data, drawer) if prompts else None,
        _groups(data, drawer, "prompts_seen", "prompts") if prompts else None,
        _groups(data, drawer, "compute_6nt", "compute") if compute else None,
    ]
    return tuple(c for c in claims if c is not None)


# ------------------------------------------------------------------------------------------ the claims


def _larger(data: StudyData, drawer: _Drawer, axis: str, name: str) -> Claim | None:
    pairs = []
    for kind in data.kinds:
        sizes = [s for s in data.sizes if data.main(s, kind)]
        for small, large in zip(sizes, sizes[1:], strict=False):
            groups = [data.main(s, kind) for s in (small, large)]
            pairs.append(_difference(drawer, f"{large} against {small}, {kind}", groups, data.headline, axis))
    return _claim(
        f"larger at fixed {name}", f"At the same {name}, each model ends with a smaller loss than the next smaller one.",
        "superiority", MARGIN, pairs, drawer,
    )  # fmt: skip


def _ladder(data: StudyData, drawer: _Drawer, axis: str, name: str) -> Claim | None:
    """Neighbours of a ladder differ by little, and all of them together by more than their noise."""
    pairs = []
    for kind in data.kinds:
        sizes = [s for s in data.sizes if data.main(s, kind)]
        groups = [data.main(s, kind) for s in sizes]
        if len({data.params[s] for s in sizes}) < 3:
            continue
        x = _last(groups, data.headline, axis)
        if any(_first(run, data.headline, axis) > x for runs in groups for run in runs):
            continue  # the largest model has spent more in its first step than the smallest in all
        decades = np.log10([data.params[s] for s in sizes])
        weight = -(decades - decades.mean()) / np.sum((decades - decades.mean()) ** 2)  # of a least-squares slope
        sides = [drawer.side(runs, data.headline, axis, x) for runs in groups]
        least = min(side.runs for side in sides)
        pairs.append(
            _Pair(
                label=f"ten times the parameters, {sizes[0]} to {sizes[-1]}, {kind}",
                effect=float(weight @ [side.value for side in sides]),
                lasting=weight @ np.array([side.lasting for side in sides]),
                draws=weight @ np.array([side.draws for side in sides]),
                runs=(least, least),
                per_run=float(np.sum(weight**2)) * drawer.spread**2,
            )
        )
    return _claim(
        f"larger along the ladder at fixed {name}", f"At the same {name}, loss falls along the ladder of sizes.",
        "superiority", MARGIN, pairs, drawer,
    )  # fmt: skip


def _reuse(data: StudyData, drawer: _Drawer) -> Claim | None:
    pairs = []
    for (size, kind), groups in _by(data, "tau").items():
        fresh = groups.pop(1.0, None)
        for tau, runs in sorted(groups.items()):
            if fresh:
                label = f"tau {tau:g} against 1, {size} {kind}"
                pairs.append(_difference(drawer, label, [fresh, runs], data.headline, "prompts_seen"))
    claim = _claim(
        "reuse is free", f"Seeing each prompt tau times costs less than {MARGIN:g} of loss at the same number of prompts.",
        "non-inferiority", MARGIN, pairs, drawer,
    )  # fmt: skip
    if claim is None:
        return None
    free = []
    for c in claim.comparisons:
        if c.verdict != "supported":
            break
        free.append(c.label.split(" against")[0])
    upto = f"free up to {free[-1]}" if free else "no reuse is shown to be free"
    return Claim(
        name=claim.name, statement=claim.statement, test=claim.test, margin=claim.margin, comparisons=claim.comparisons,
        verdict=claim.verdict, why=f"{upto}; {claim.why}",
    )  # fmt: skip


def _alike(data: StudyData, drawer: _Drawer) -> Claim | None:
    pairs = []
    for size in data.sizes:
        groups = [data.main(size, kind) for kind in ("instruct", "base")]
        if not all(groups):
            continue
        end = _last(groups, data.headline, "prompts_seen")
        gains, variance = [], 0.0
        for runs in groups:
            before = drawer.side(runs, data.headline, "prompts_seen", None)
            after = drawer.side(runs, data.headline, "prompts_seen", end)
            gains.append(
                [_log(getattr(before, part)) - _log(getattr(after, part)) for part in ("value", "lasting", "draws")]
            )
            variance += (drawer.spread / max(after.value, 1e-9)) ** 2
        effect, lasting, draws = (base - instruct for instruct, base in zip(*gains, strict=True))
        pairs.append(
            _Pair(label=f"base less instruct, {size}", effect=float(effect), lasting=lasting, draws=draws,
                  runs=(len(groups[1]), len(groups[0])), per_run=variance)
        )  # fmt: skip
    return _claim(
        "base and instruct alike", "RL lowers the log of the loss of base and instruct models of a size equally far, to "
        f"{GAIN_MARGIN:g}.", "equivalence", GAIN_MARGIN, pairs, drawer,
    )  # fmt: skip


def _log(v: np.ndarray | float) -> np.ndarray:
    return np.log(np.maximum(v, 1e-9))


def _transfer(data: StudyData, drawer: _Drawer) -> Claim | None:
    names: dict[str, bool] = {}
    for run in data.runs.values():
        names |= {e.eval_set: e.in_domain for e in run.evals}
    pairs = []
    for name, inside in sorted(names.items(), key=lambda v: not v[1]):
        for kind in data.kinds:
            effects, lasting, draws, num = [], [], [], 0
            for size in data.sizes:
                runs = [r for r in data.main(size, kind) if len(_evals(r, name)) > 1]
                if not runs:
                    continue
                before = drawer.side(runs, name, "prompts_seen", None)
                after = drawer.side(runs, name, "prompts_seen", _last([runs], name, "prompts_seen"))
                effects.append(before.value - after.value)
                lasting.append(before.lasting - after.lasting)
                draws.append(before.draws - after.draws)
                num += len(runs)
            if effects:
                where = "in domain" if inside else "out of domain"
                label = f"{name} ({where}), {kind}, mean of {len(effects)} sizes"
                each = round(num / len(effects))
                pairs.append(
                    _Pair(label=label, effect=float(np.mean(effects)), lasting=np.mean(lasting, axis=0),
                          draws=np.mean(draws, axis=0), runs=(each, each), per_run=drawer.spread**2 / len(effects))
                )  # fmt: skip
    return _claim(
        "transfer", "RL lowers the loss on each test set, in and out of domain.", "superiority", MARGIN, pairs, drawer
    )


def _groups(data: StudyData, drawer: _Drawer, axis: str, name: str) -> Claim | None:
    pairs = []
    for (size, kind), groups in _by(data, "group_size").items():
        values = sorted(groups)
        for small, large in zip(values, values[1:], strict=False):
            label = f"G {large:g} against {small:g}, {size} {kind}"
            pairs.append(_difference(drawer, label, [groups[small], groups[large]], data.headline, axis))
    return _claim(
        f"larger groups at equal {name}", f"At the same {name}, more answers to a prompt end with a smaller loss.",
        "superiority", MARGIN, pairs, drawer,
    )  # fmt: skip


def _by(data: StudyData, field: str) -> dict[tuple[str, str], dict[float, list[Run]]]:
    """(size, kind) -> value of an ablated field -> GRPO runs; only where the field takes several values."""
    found = {(size, kind): data.ablation(size, kind, field) for size in data.sizes for kind in ("base", "instruct")}
    return {k: v for k, v in found.items() if v}


def _difference(drawer: _Drawer, label: str, groups: Sequence[Sequence[Run]], eval_set: str, axis: str) -> _Pair:
    """Loss of the first group minus that of the second, at the largest x that both reached."""
    x = _last(groups, eval_set, axis)
    a, b = (drawer.side(g, eval_set, axis, x) for g in groups)
    return _Pair(
        label=label, effect=a.value - b.value, lasting=a.lasting - b.lasting, draws=a.draws - b.draws,
        runs=(a.runs, b.runs), per_run=2 * drawer.spread**2,
    )  # fmt: skip


def _claim(name: str, statement: str, test: Test, margin: float, pairs: Sequence[_Pair], drawer: _Drawer) -> Claim | None:
    if not pairs:
        return None
    # a margin is tested from one side at a time, so its interval leaves out twice as much (Schuirmann 1987)
    confidence = 1 - ALPHA / len(pairs) * (1 if test == "superiority" else 2)
    comparisons = tuple(drawer.compare(pair, test, margin, confidence) for pair in pairs)
    answers: list[str] = [c.verdict for c in comparisons]
    verdict: Answer = "undecided"
    if all(a == "supported" for a in answers):
        verdict = "supported"
    elif "not supported" in answers:
        verdict = "not supported"
    why = ", ".join(f"{answers.count(a)} {a}" for a in ("supported", "not supported", "undecided") if a in answers)
    return Claim(
        name=name, statement=statement, test=test, margin=margin, comparisons=comparisons, verdict=verdict,
        why=f"of {len(answers)} comparisons {why}",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- the decisions


def _decide(low: float, high: float, test: Test, margin: float) -> Answer:
    if test == "superiority":
        return "supported" if low > 0 else ("not supported" if high < margin else "undecided")
    if test == "non-inferiority":  # the effect is what the first side loses, with its sign turned
        return "supported" if low > -margin else ("not supported" if high < -margin else "undecided")
    if -margin < low and high < margin:
        return "supported"
    return "not supported" if low > margin or high < -margin else "undecided"


def _runs_needed(pair: _Pair, test: Test, margin: float, confidence: float) -> tuple[int | None, str]:
    """How many runs a side would decide it, should the effect be what it seems; or why none would."""
    lasting, z, effect = float(np.var(pair.lasting)), float(ndtri((1 + confidence) / 2)), pair.effect
    for r in range(min(pair.runs) + 1, MOST_RUNS + 1):
        half = z * math.sqrt(lasting + pair.per_run / r)
        if _decide(effect - half, effect + half, test, margin) != "undecided":
            return r, f"{r} runs a side would decide it, if the effect is what it seems"
    half = z * math.sqrt(lasting)
    if _decide(effect - half, effect + half, test, margin) == "undecided":
        return None, "more runs would not decide it: the number of test problems limits it"
    return None, f"over {MOST_RUNS} runs a side would be needed"


# ------------------------------------------------------------------------------------------ the records


def _evals(run: Run, eval_set: str) -> list[EvalRecord]:
    return [e for e in run.evals if e.eval_set == eval_set and e.mode == "sample" and math.isfinite(e.loss)]


def _last(groups: Sequence[Sequence[Run]], eval_set: str, axis: str) -> float:
    """The largest x that every run reached."""
    return float(min(getattr(_evals(run, eval_set)[-1], axis) for runs in groups for run in runs))


def _first(run: Run, eval_set: str, axis: str) -> float:
    """The smallest x after the start."""
    return float(min(x for e in _evals(run, eval_set) if (x := getattr(e, axis)) > 0))


def _at(run: Run, eval_set: str, axis: str, x: float | None) -> tuple[float, np.ndarray | None, float]:
    """(loss, share wrong of each problem, standard error) of a run: interpolated in log x, or before RL."""
    evals = _evals(run, eval_set)
    if x is None:
        near, share = [evals[0]], [1.0]
    else:
        rest = [e for e in evals if getattr(e, axis) > 0]
        log_x = np.log([getattr(e, axis) for e in rest])
        right = min(max(int(np.searchsorted(log_x, math.log(x) - 1e-9)), 0), len(rest) - 1)
        left = max(right - 1, 0)
        gap = log_x[right] - log_x[left]
        t = 1.0 if gap <= 0 else float(np.clip((math.log(x) - log_x[left]) / gap, 0.0, 1.0))
        near, share = [rest[left], rest[right]], [1 - t, t]
    loss = sum(s * e.loss for s, e in zip(share, near, strict=True))
    error = math.sqrt(sum(s * (e.stderr or 0.0) ** 2 for s, e in zip(share, near, strict=True)))
    rates = [1 - np.array(e.right) / e.num_samples for e in near if e.right is not None]
    if len(rates) < len(near):
        return loss, None, error
    return loss, sum((s * r for s, r in zip(share, rates, strict=True)), start=np.zeros(1)), error


def _seed_spread(data: StudyData) -> tuple[float, int]:
    """Standard deviation between seeds of the loss at the end, pooled over all groups, and its degrees of freedom."""
    groups: dict[tuple, list[float]] = {}
    for name, run in data.runs.items():
        c = data.cells[name]
        if c.method == "grpo" and (evals := _evals(run, data.headline)):
            groups.setdefault((c.size, c.kind, c.variant, c.tau, c.group_size, c.prompts), []).append(evals[-1].loss)
    several = [np.array(v) for v in groups.values() if len(v) > 1]
    freedom = sum(len(v) - 1 for v in several)
    total = sum(float(np.sum((v - v.mean()) ** 2)) for v in several)
    return (math.sqrt(total / freedom), freedom) if freedom else (0.0, 0)
