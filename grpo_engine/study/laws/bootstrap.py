"""Resampling and intervals.

Two things of a curve are drawn anew, both around what was fitted:
  * the scatter of its points, which lasts from one to the next (`noise`);
  * runs, wherever a size has at least two: the deviations of whole runs from their mean, each with a normal factor. The
    scatter is then scaled down to the part of the residuals that the spread of runs does not explain already. The
    spread of few runs is itself uncertain, so it is widened as Student's t is wider than the normal distribution.

A *profile* interval needs no draws: one parameter is held, the others are fitted again, and the interval is where the
sum of squares rises no more than chance explains. It sees an asymptote that the data do not limit: the interval is open
on that side.

Neither covers which problems were evaluated, because all runs answer the same ones, nor which sizes were chosen. How
often the intervals hold the truth is measured by `recovery`; docs/laws.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri, stdtrit

from grpo_engine.evaluate.intervals import CONFIDENCE
from grpo_engine.study.laws.curves import Curve
from grpo_engine.study.laws.least_squares import FitProblem
from grpo_engine.study.laws.noise import inflation, noise_of


def resample(
    curves: Sequence[Curve],
    y: np.ndarray,
    fitted: np.ndarray,
    *,
    log: bool,
    draws: int,
    rng: np.random.Generator,
    design: np.ndarray | None = None,
    alone: bool = False,
    confidence: float = CONFIDENCE,
) -> np.ndarray:
    """Data sets around fitted values.

    The widening for few runs is at the degrees of freedom of all curves together, because a joint law averages over them
    (Welch and Satterthwaite within a curve).

    Args:
        curves: M curves, n points in all.
        y: [n], their losses end to end, or log losses.
        fitted: [n], likewise.
        log: whether y are log losses.
        draws: how many data sets.
        rng: of the draws.
        design: [n, q], derivative of the fitted values by the parameters; None takes an intercept and a slope a curve.
        alone: whether each curve is fitted by itself, and so is widened at its own degrees of freedom.
        confidence: of the intervals that will be taken: the widening is exact there.

    Returns:
        [draws, n] float64.
    """
    ends = np.cumsum([len(c.x) for c in curves])[:-1]
    residuals = np.split(y - fitted, ends)
    if design is None:
        # d loss = loss d log loss
        scale = np.split(np.ones(len(y)) if log else fitted, ends)
        designs = [
            s[:, None] * np.stack([np.ones(len(c.x)), np.log(c.x)], axis=1) for s, c in zip(scale, curves, strict=True)
        ]
    else:
        designs = np.split(design, ends)
    deviations = [_deviation(c, log) for c in curves]
    noise = noise_of(residuals, designs, [d for d in deviations if d is not None])
    parts, freedoms = [], []
    for c, drawn, deviation, residual, pieces in zip(
        curves, noise.draw([len(c.x) for c in curves], draws, rng), deviations, residuals, noise.freedom, strict=True
    ):
        explained, out = 0.0, 0.0
        total = float(residual @ residual) / pieces
        if deviation is not None:
            explained = float(np.mean(np.sum(deviation**2, axis=0)))
            out = rng.standard_normal((draws, len(c.by_run))) @ deviation
        rest = max(0.0, total - explained)
        freedom = 0.0
        if deviation is not None and explained + rest > 0:
            freedom = (explained + rest) ** 2 / (explained**2 / (len(c.by_run) - 1) + rest**2 / pieces)
            if alone:
                out = out * _wider(freedom, confidence)
        freedoms.append(freedom)
        parts.append((out, drawn * math.sqrt(rest / total) if total > 0 else 0.0 * drawn))
    wider = 1.0 if alone else _wider(sum(freedoms), confidence)
    return fitted + np.concatenate([wider * runs + scatter for runs, scatter in parts], axis=1)


def _deviation(c: Curve, log: bool) -> np.ndarray | None:
    """Deviations of runs from their mean [runs, n], scaled to those of the mean; None for a single run."""
    if len(c.by_run) < 2:
        return None
    deviation = c.by_run - c.loss
    if log:
        deviation = deviation / c.loss  # d log L
    there = ~np.isnan(deviation)
    runs = there.sum(axis=0)
    return np.where(there, deviation, 0.0) / np.sqrt(np.maximum(runs * (runs - 1), 1))


def _wider(freedom: float, confidence: float) -> float:
    q = (1 + confidence) / 2
    return float(stdtrit(freedom, q) / ndtri(q)) if freedom > 0 else 1.0


def profile_limits(
    residual: np.ndarray, design: np.ndarray, curves: Sequence[Curve], *, log: bool, confidence: float = CONFIDENCE
) -> np.ndarray:
    """How far the square root of (objective / its minimum - 1) rises by chance along each parameter's profile.

    For independent points it is Student's t over the root of the degrees of freedom (an F test of one parameter). Noise
    that lasts makes it as much larger as it makes the standard error of least squares.

    Args:
        residual: [n], weighted, of all curves end to end.
        design: [n, q], derivative of the weighted residuals by the parameters.
        curves: that the points are of.
        log: whether residuals are those of log L.
        confidence: of the intervals.

    Returns:
        [q] float64.
    """
    ends = np.cumsum([len(c.x) for c in curves])[:-1]
    deviations = [d for c in curves if (d := _deviation(c, log)) is not None]
    noise = noise_of(np.split(residual, ends), np.split(design, ends), deviations)
    factor, freedom = inflation(residual, design, noise, ends)
    return factor * float(stdtrit(freedom, (1 + confidence) / 2)) / math.sqrt(max(len(residual) - design.shape[1], 1))


def profile_interval(
    problem: FitProblem, theta: np.ndarray, limits: np.ndarray, names: Sequence[str]
) -> dict[str, tuple[float | None, float | None]]:
    """Profile intervals of parameters, all searched at once.

    Args:
        problem: the law and its data.
        theta: [q], the best parameters.
        limits: [q], how far the square root of (objective / its minimum - 1) rises by chance, of `profile_limits`.
        names: free parameters of the law that are not per curve.

    Returns:
        (low, high) by name, on the parameter's own scale; None on a side where every value up to the bound describes
        the data as well as chance allows.
    """
    space, y = problem.space, problem.data.y
    best = float(problem.cost(theta[None], y[None])[0])
    best = max(best, 1e-24 * float(np.sum(problem.data.weight * y * y)), 1e-300)
    where = np.array([space.part(q).start for q in names for _ in (0, 1)])
    rows, limit = np.arange(len(where)), limits[where]
    ends = np.where(rows % 2 == 0, space.low[where], space.high[where])
    warm = np.repeat(theta[None], len(where), axis=0)

    def excess(at: np.ndarray) -> np.ndarray:
        """Square root of the relative rise of the objective: nearly linear in the distance from the best."""
        low, high = (np.repeat(b[None], len(at), axis=0) for b in (space.low, space.high))
        start = warm.copy()
        for b in (low, high, start):
            b[rows, where] = at
        found = problem.solve(np.broadcast_to(y, (len(at), len(y))), start, low, high)
        warm[:] = found
        return np.sqrt(np.maximum(problem.cost(found, y[None]) / best - 1.0, 0.0)) - limit

    def share() -> np.ndarray:
        """Where between inside and outside a straight line through both rises to chance."""
        rise = above - below
        return np.where(rise > 0, -below / np.where(rise > 0, rise, 1.0), 0.5)

    inside, below = theta[where].copy(), -limit
    # outwards in growing steps until chance no longer explains the rise, so that each search begins near the last one
    step = (ends - inside) / 64
    outside, above = inside.copy(), below.copy()
    open_ = np.zeros(len(where), dtype=bool)
    for _ in range(7):
        going = above <= 0
        if not going.any():
            break
        inside, below = np.where(going, outside, inside), np.where(going, above, below)
        outside = np.where(going, np.where(np.abs(outside + step - ends) < 1e-12, ends, outside + step), outside)
        outside = np.where(step > 0, np.minimum(outside, ends), np.maximum(outside, ends))
        above = np.where(going, excess(outside), above)
        step = step * 2
    open_ = above <= 0
    at = outside
    for _ in range(5):
        at = inside + (outside - inside) * np.clip(share(), 0.05, 0.95)
        here = excess(at)
        left = here <= 0
        inside, below = np.where(left, at, inside), np.where(left, here, below)
        outside, above = np.where(left, outside, at), np.where(left, above, here)
    at = inside + (outside - inside) * share()
    out = {}
    for i, q in enumerate(names):
        pair = [None if open_[r] else float(np.exp(at[r]) if q in space.form.LOG else at[r]) for r in (2 * i, 2 * i + 1)]
        out[q] = (pair[0], pair[1])
    return out
