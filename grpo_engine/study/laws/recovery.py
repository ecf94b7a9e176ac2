"""Plants every law in simulated studies and measures how often the intervals hold the truth.

    python -m grpo_engine.study.laws.recovery [--sets 200] [--runs 1 3] [--laws 'saturating k' sigmoid]

A simulated study has the noise of a real one. A test set of 500 problems is answered 4 times each: the problems are the
same throughout, so what remains is the drawing of answers, with a share of the binomial variance that problems of
unequal difficulty leave. A run drifts: its deviation from the law is a stationary chain along the evaluations
(correlation 0.7 from one to the next), which the mean over runs does not remove. Intervals have a confidence of 0.9.

docs/laws.md holds the table of the full run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_engine.study.laws.curves import Curve
from grpo_engine.study.laws.fit import fit_joint, fit_sizes
from grpo_engine.study.laws.forms import (
    AdditiveLaw,
    ExponentialSaturation,
    FloorPower,
    LineIntercept,
    LogisticIntercept,
    LogLinear,
    LogSlope,
    LossDecomposition,
    PowerSlope,
    ReuseLaw,
    SaturatingIntercept,
    SaturatingSlope,
    ScaleRLSigmoid,
)
from grpo_engine.study.laws.law_fit import fit_curve, fit_intercepts, fit_reuse, fit_surface
from grpo_engine.study.laws.results import Estimate

CONFIDENCE = 0.9
ANSWERS = 500 * 4
WITHIN = 0.6  # share of L (1 - L) that answers to problems of unequal difficulty have among themselves
POINTS, STEPS, BATCH = 24, 100, 64
SIZES = np.array([2e5, 6e5, 2e6, 6e6, 2e7])
DRAWS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How a run deviates from its law: a stationary chain along the evaluations."""

    size: float = 0.008  # standard deviation of the loss
    chain: float = 0.7  # correlation from one evaluation to the next


@dataclass(frozen=True, kw_only=True, slots=True)
class Plant:
    """A law with its truth, and the fit that must find it."""

    truth: dict[str, float]
    simulate: Simulate
    fit: Callable[[list[Curve], int], Mapping[str, Estimate]]  # (curves, seed) -> estimates by name


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """How one parameter fared."""

    law: str
    parameter: str
    runs: int  # a size
    truth: float
    sets: int
    held: float  # share of the sets whose interval holds the truth; an open end is infinite
    open: float  # share with an open end
    bias: float  # median of estimate - truth, as a share of the truth
    width: float  # median width of the closed intervals, as a share of the truth


Simulate = Callable[[np.random.Generator, int, Drift], list[Curve]]
"""(rng, runs, drift) -> curves."""


def steps() -> np.ndarray:
    """Evaluated steps [n], evenly in the logarithm."""
    return np.unique(np.round(np.geomspace(1, STEPS, POINTS))).astype(int)


def make_curve(
    rng: np.random.Generator, loss: np.ndarray, *, params: float, runs: int, label: str, drift: Drift,
    before: float | None = None, unique: np.ndarray | None = None,
) -> Curve:  # fmt: skip
    """A curve of several runs that scatter about the given losses [n] at `steps()`."""
    sampled = np.sqrt(WITHIN * np.clip(loss * (1 - loss), 1e-4, None) / ANSWERS)
    n = len(loss)
    away = np.empty((runs, n))
    away[:, 0] = rng.standard_normal(runs)
    for j in range(1, n):
        away[:, j] = drift.chain * away[:, j - 1] + math.sqrt(1 - drift.chain**2) * rng.standard_normal(runs)
    by_run = loss + sampled * rng.standard_normal((runs, n)) + drift.size * away
    by_run = np.clip(by_run, 1e-3, 1.0)
    at = steps()
    return Curve(
        label=label, size=label, kind="base", params=params, step=at, x=at * float(BATCH), loss=by_run.mean(axis=0),
        by_run=by_run, loss_before=before, compute_per_prompt=None, prompts_per_step=BATCH,
        answers=np.full(n, float(ANSWERS * runs)), unique=unique,
    )  # fmt: skip


def _ladder(loss: Callable[[float, np.ndarray, int], np.ndarray]) -> Simulate:
    """Curves of all sizes of a law (N, D, number of the curve) -> loss."""
    d = steps() * float(BATCH)
    return lambda rng, runs, drift: [
        make_curve(rng, loss(n, d, i), params=n, runs=runs, label=f"s{i}", drift=drift) for i, n in enumerate(SIZES)
    ]


def _single(loss: np.ndarray, before: float | None = None) -> Simulate:
    return lambda rng, runs, drift: [make_curve(rng, loss, params=1e6, runs=runs, label="m", drift=drift, before=before)]


def _joint(slope: Any) -> Plant:
    middle = math.log(BATCH * math.sqrt(STEPS))
    intercept = LogisticIntercept(N_half=6e6, g=0.6)

    def loss(n: float, d: np.ndarray, i: int) -> np.ndarray:
        return np.exp(float(intercept.intercept(n)) - float(slope.k(n)) * (np.log(d) - middle))

    k = float(slope.k(SIZES[3]))
    truth = {q: getattr(slope, q) for q in slope.PARAMETERS}
    truth |= {"k of s3": k, "E of s3": float(intercept.intercept(SIZES[3])) + k * middle}

    def fit(curves: list[Curve], seed: int) -> dict[str, Estimate]:
        sizes = fit_sizes(curves, n_boot=20, seed=seed)  # their intervals are not looked at
        joint = fit_joint(
            curves,
            axis="data",
            form=slope.NAME,
            n_boot=DRAWS,
            seed=seed,
            confidence=CONFIDENCE,
            sizes=sizes,
            leave_out=False,
        )
        return joint.parameters | {"k of s3": joint.curves[3].k, "E of s3": joint.curves[3].E}

    return Plant(truth=truth, simulate=_ladder(loss), fit=fit)


def _intercept(intercept: Any) -> Plant:
    x, slope = BATCH * math.sqrt(STEPS), SaturatingSlope(K_max=0.15, N0=2e6)

    def loss(n: float, d: np.ndarray, i: int) -> np.ndarray:
        return np.exp(float(intercept.intercept(n)) - float(slope.k(n)) * np.log(d / x))

    def fit(curves: list[Curve], seed: int) -> dict[str, Estimate]:
        sizes = fit_sizes(curves, n_boot=20, seed=seed)
        joint = fit_joint(curves, axis="data", n_boot=DRAWS, seed=seed, confidence=CONFIDENCE, sizes=sizes, leave_out=False)
        return next(f for f in fit_intercepts(joint, x=x, confidence=CONFIDENCE) if f.law == intercept.NAME).parameters

    return Plant(truth={q: getattr(intercept, q) for q in intercept.PARAMETERS}, simulate=_ladder(loss), fit=fit)


def _curve(law: Any, *, measured_start: bool = False) -> Plant:
    before = 1 - law.R0 if measured_start else None

    def fit(curves: list[Curve], seed: int) -> Mapping[str, Estimate]:
        return fit_curve(curves[0], type(law), confidence=CONFIDENCE).parameters

    known = {"R0"} if measured_start else set()
    return Plant(
        truth={q: getattr(law, q) for q in law.PARAMETERS if q not in known},
        simulate=_single(law.loss(steps() * float(BATCH)), before), fit=fit,
    )  # fmt: skip


def _own_slope(law: LogLinear) -> Plant:
    def fit(curves: list[Curve], seed: int) -> dict[str, Estimate]:
        (size,) = fit_sizes(curves, n_boot=DRAWS, seed=seed, confidence=CONFIDENCE)
        return {"k": size.k, "E": size.E}

    return Plant(truth={"k": law.k, "E": law.E}, simulate=_single(law.loss(steps() * float(BATCH))), fit=fit)


def _additive() -> Plant:
    law = AdditiveLaw(A=0.25, a=0.25, B=0.06, b=0.4, L_inf=0.2, n_ref=2e6, d_ref=640.0)

    def fit(curves: list[Curve], seed: int) -> dict[str, Estimate]:
        found = fit_surface(curves, AdditiveLaw, confidence=CONFIDENCE).parameters
        return {q: found[q] for q in ("a", "b", "L_inf")}  # A and B are told at other references

    truth = {q: getattr(law, q) for q in ("a", "b", "L_inf")}
    return Plant(truth=truth, simulate=_ladder(lambda n, d, i: law.loss(n, d)), fit=fit)


def _decomposition() -> Plant:
    law = LossDecomposition(
        L_inf=0.1, A=0.35, alpha=0.3, beta=1.2, lam=(0.08, 0.15, 0.25, 0.3, 0.33), D0=(700.0, 650.0, 600.0, 650.0, 700.0),
        n_ref=2e6,
    )  # fmt: skip

    def fit(curves: list[Curve], seed: int) -> dict[str, Estimate]:
        found = fit_surface(curves, LossDecomposition, confidence=CONFIDENCE).parameters
        return {q: found[q] for q in ("L_inf", "alpha", "beta")}

    truth = {q: getattr(law, q) for q in ("L_inf", "alpha", "beta")}
    return Plant(truth=truth, simulate=_ladder(lambda n, d, i: law.loss(n, d, i)), fit=fit)


def _reuse() -> Plant:
    law, pools = ReuseLaw(k=0.15, E=0.6, worth=8.0), (6400, 1280, 256, 64)

    def simulate(rng: np.random.Generator, runs: int, drift: Drift) -> list[Curve]:
        seen = steps() * float(BATCH)
        return [
            make_curve(rng, law.loss(seen, np.minimum(seen, pool)), params=1e6, runs=runs, label="m", drift=drift,
                       unique=np.minimum(seen, pool))
            for pool in pools
        ]  # fmt: skip

    def fit(curves: list[Curve], seed: int) -> Mapping[str, Estimate]:
        return fit_reuse(curves, confidence=CONFIDENCE).parameters

    return Plant(truth={q: getattr(law, q) for q in law.PARAMETERS}, simulate=simulate, fit=fit)


PLANTS: dict[str, Callable[[], Plant]] = {
    "loglinear": lambda: _own_slope(LogLinear(k=0.1, E=0.3)),
    "saturating k": lambda: _joint(SaturatingSlope(K_max=0.15, N0=2e6)),
    "power k": lambda: _joint(PowerSlope(a=0.07, gamma=0.35, n_ref=float(np.exp(np.mean(np.log(SIZES)))))),
    "log k": lambda: _joint(LogSlope(a=0.08, b=0.025, n_ref=float(np.exp(np.mean(np.log(SIZES)))))),
    "line E": lambda: _intercept(LineIntercept(a=-0.5, b=-0.15, n_ref=float(np.exp(np.mean(np.log(SIZES)))))),
    "logistic E": lambda: _intercept(LogisticIntercept(N_half=6e6, g=0.6)),
    "saturating E": lambda: _intercept(SaturatingIntercept(a=-0.05, b=1.0, N1=4e6)),
    "floor": lambda: _curve(FloorPower(A=0.5, alpha=0.5, L_inf=0.3, x_ref=float(BATCH))),
    "sigmoid": lambda: _curve(ScaleRLSigmoid(A=0.6, B=1.5, X_mid=600.0, R0=0.2)),
    "sigmoid, R0 measured": lambda: _curve(ScaleRLSigmoid(A=0.6, B=1.5, X_mid=600.0, R0=0.2), measured_start=True),
    "exponential": lambda: _curve(ExponentialSaturation(A=0.6, X_scale=1200.0, R0=0.2)),
    "additive": _additive,
    "decomposition": _decomposition,
    "reuse": _reuse,
}


def measure(law: str, *, runs: int, sets: int, seed: int = 0, drift: Drift | None = None) -> list[Coverage]:
    """Fits a planted law in many simulated studies.

    Args:
        law: a key of `PLANTS`.
        runs: runs a size.
        sets: simulated studies.
        seed: of the simulations and of the intervals.
        drift: of the runs; None takes the default.

    Returns:
        One row a parameter.

    Raises:
        ValueError: an unknown law.
    """
    if law not in PLANTS:
        raise ValueError(f"law must be one of {list(PLANTS)}, got {law!r}")
    plant = PLANTS[law]()
    found: dict[str, list[Estimate]] = {q: [] for q in plant.truth}
    for i in range(sets):
        curves = plant.simulate(np.random.default_rng([seed, runs, i]), runs, drift or Drift())
        estimates = plant.fit(curves, i)
        for q, rows in found.items():
            rows.append(estimates[q])
    out = []
    for q, truth in plant.truth.items():
        low = np.array([-np.inf if e.low is None else e.low for e in found[q]])
        high = np.array([np.inf if e.high is None else e.high for e in found[q]])
        width = (high - low)[np.isfinite(high - low)]
        out.append(
            Coverage(
                law=law, parameter=q, runs=runs, truth=truth, sets=sets,
                held=float(np.mean((low <= truth) & (truth <= high))),
                open=float(np.mean(~np.isfinite(high - low))),
                bias=float(np.median([e.value for e in found[q]])) / truth - 1,
                width=float(np.median(width)) / abs(truth) if len(width) else math.inf,
            )
        )  # fmt: skip
    return out


def table(rows: list[Coverage]) -> str:
    """Coverage as a Markdown table."""
    lines = [
        "| law | parameter | runs | truth | held | open | bias | width |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r.law} | {r.parameter} | {r.runs} | {r.truth:.3g} | {100 * r.held:.0f} % | {100 * r.open:.0f} % | "
            f"{100 * r.bias:+.0f} % | {100 * r.width:.0f} % |"
            for r in rows
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sets", type=int, default=200, help="simulated studies for each law")
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 3], help="runs a size")
    parser.add_argument("--laws", nargs="+", choices=list(PLANTS), default=list(PLANTS), help="which")
    parser.add_argument("--drift", type=float, default=Drift().size, help="standard deviation of a run's deviation")
    parser.add_argument("--chain", type=float, default=Drift().chain, help="its correlation between evaluations")
    args = parser.parse_args()
    drift = Drift(size=args.drift, chain=args.chain)
    rows = [row for law in args.laws for runs in args.runs for row in measure(law, runs=runs, sets=args.sets, drift=drift)]
    print(table(rows))


if __name__ == "__main__":
    main()
