"""Bounded least squares for many data sets and many starts at once; derivatives are exact.

A search from several starts, the draws of a bootstrap and the points of a profile are all the same thing: a batch of
small problems. They go through Levenberg and Marquardt's iteration together, a row each, so that a thousand fits take
about as long as a hundred of them one by one. Nothing is random: the same input gives the same digits.

Derivatives come from a complex step (Squire and Trapp 1998): d f / d t = Im f(t + ih) / h with h = 1e-30. No difference
of near numbers is taken, so it is exact to rounding, and a law need only be written once, as a formula.

Two ways keep the searches small. *Starts*: over a grid of the parameters that are not linear, the linear ones are
solved for, and the best corners of the grid begin a search (`starts`). *Projection*: in a joint law every curve has a
free intercept; given the slopes, the best intercepts have a closed form, so that only the parameters of k(N) are searched,
however many sizes there are (`Joint`; variable projection, Golub and Pereyra 1973).

| objective | what is minimised |
|---|---|
| linear | the squared error of the loss (Tan et al. 2025, in their code) |
| log | the squared error of log L |
| huber | Huber's function of the error of log L: beyond 1.345 robust standard deviations a point counts linearly |
| binomial | the deviance of the counts of wrong answers: -2 log likelihood, up to a constant |

The last two are the first two with weights that depend on the fit, so they are solved by reweighting.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from grpo_engine.study.laws.curves import Curve
from grpo_engine.study.laws.forms import Law
from grpo_engine.study.laws.levenberg_marquardt import Residual, levenberg_marquardt

OBJECTIVES = ("linear", "log", "huber", "binomial")
LOGARITHMIC = ("log", "huber")  # objectives of errors of log L
HUBER = 1.345  # standard deviations: 95 % efficient where the noise is normal
STEP = 1e-30  # of the complex step
GRID = {0: 1, 1: 25, 2: 11, 3: 7}  # values of each parameter that is not linear, by their number; more take 5
LEAST = 1e-9  # a smaller loss counts as this where its logarithm is taken
CHUNK = 4_000_000  # complex numbers of a derivative held at once


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Space:
    """The free parameters of a law as one vector theta [q], those of LOG as logarithms."""

    form: type[Law]
    names: tuple[str, ...]  # free parameters in order
    widths: tuple[int, ...]  # 1, or the number of curves
    low: np.ndarray  # [q]
    high: np.ndarray  # [q]
    fixed: dict[str, float]

    @classmethod
    def of(cls, form: type[Law], coordinates: Sequence[np.ndarray], known: Mapping[str, float] | None = None) -> Space:
        """The space of a law on given data.

        Args:
            form: the law.
            coordinates: what its method takes, each [n]; of a law with per-curve parameters the last are the curves.
            known: parameters that are not fitted, by name.

        Returns:
            The space.
        """
        bounds, known = form.bounds(*coordinates), dict(known or {})
        names = tuple(q for q in form.PARAMETERS if q not in known)
        num_curves = int(np.max(coordinates[-1])) + 1 if form.PER_CURVE else 1
        widths = tuple(num_curves if q in form.PER_CURVE else 1 for q in names)
        ends = [
            [math.log(v) if q in form.LOG else v for v in (bounds[q].low, bounds[q].high)]
            for q, w in zip(names, widths, strict=True)
            for _ in range(w)
        ]
        low, high = np.array(ends).reshape(-1, 2).T
        return cls(form=form, names=names, widths=widths, low=low, high=high, fixed={**form.fixed(*coordinates), **known})

    def part(self, name: str) -> slice:
        """Where a parameter is in theta."""
        i = self.names.index(name)
        first = sum(self.widths[:i])
        return slice(first, first + self.widths[i])

    def values(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters [..., width] of theta [..., q], on their own scale."""
        out = {}
        for q in self.names:
            v = theta[..., self.part(q)]
            out[q] = np.exp(v) if q in self.form.LOG else v
        return out

    def theta(self, **values: float | Sequence[float]) -> np.ndarray:
        """theta [q] of given parameters; the inverse of `values`."""
        parts = [np.atleast_1d(np.asarray(values[q], dtype=np.float64)) for q in self.names]
        return np.concatenate([np.log(v) if q in self.form.LOG else v for q, v in zip(self.names, parts, strict=True)])

    def law(self, theta: np.ndarray) -> Law:
        """The law of one theta [q]: scalars as floats, per-curve parameters as tuples."""
        values = {
            q: tuple(map(float, v)) if q in self.form.PER_CURVE else float(v[0]) for q, v in self.values(theta).items()
        }
        return self.form(**values, **self.fixed)

    def evaluate(self, theta: np.ndarray, coordinates: Sequence[np.ndarray]) -> np.ndarray:
        """What laws [..., q] give at coordinates [n]: [..., n]."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            law = self.form(**self.values(theta), **self.fixed)
            return getattr(law, self.form.GIVES)(*coordinates)

    def jacobian(self, theta: np.ndarray, coordinates: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """What laws [B, q] give [B, n], and its derivative [B, q, n] by theta, exact to rounding."""
        moved = theta[:, None, :] + 1j * STEP * np.eye(theta.shape[1])
        given = self.evaluate(moved, coordinates)
        given = np.broadcast_to(given, (*theta.shape, given.shape[-1]))
        return given[:, 0].real, given.imag / STEP

    def end_of(self, i: int, theta: np.ndarray) -> str:
        """At which bound the search of theta[i] ended, if at one: within a millionth of its range, a thousandth in logs."""
        name = next(q for q in self.names if i < self.part(q).stop)
        near = (1e-3 if name in self.form.LOG else 1e-6) * (self.high[i] - self.low[i])
        return "low" if theta[i] - self.low[i] < near else ("high" if self.high[i] - theta[i] < near else "")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Data:
    """What a law is fitted to, and how an error counts: n points."""

    y: np.ndarray  # [n] loss, or log loss where the objective is of log L
    weight: np.ndarray  # [n] of a squared error
    objective: str
    scale: float = 1.0  # huber: where an error begins to count linearly
    answers: np.ndarray | None = None  # [n] binomial: answers behind each loss

    @classmethod
    def of(
        cls, loss: np.ndarray, weight: np.ndarray, objective: str, *, label: str = "data",
        answers: np.ndarray | None = None,
    ) -> Data:  # fmt: skip
        """Checks that an objective can be had.

        Args:
            loss: [n] float64.
            weight: [n] float64, of a squared error.
            objective: one of `OBJECTIVES`.
            label: of the data, for errors.
            answers: [n], for "binomial".

        Returns:
            The data, scale not set.

        Raises:
            ValueError: an unknown objective, a loss of 0 for one that takes its log, or no counts for "binomial".
        """
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {list(OBJECTIVES)}, got {objective!r}")
        log = objective in LOGARITHMIC
        if log and not np.all(loss > 0):
            raise ValueError(f"objective {objective!r}: {label} has a mean loss of 0 somewhere; use 'linear'")
        if objective == "binomial":
            if answers is None:
                raise ValueError(f"objective 'binomial': {label} does not tell how many answers are behind each loss")
            weight = np.full_like(weight, 1.0 / len(weight))  # a likelihood weighs points by their answers alone
        return cls(y=np.log(loss) if log else loss, weight=weight, objective=objective, answers=answers)

    @property
    def log(self) -> bool:
        """Whether errors are those of log L."""
        return self.objective in LOGARITHMIC

    def reweighted(self, residual: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Weights [..., n] under which the squared errors have the gradient of the objective."""
        if self.objective == "huber":
            return self.weight * np.minimum(1.0, self.scale / np.maximum(np.abs(residual), 1e-300))
        if self.objective == "binomial":
            p = np.clip(y + residual, 1e-4, 1 - 1e-4)
            return self.weight * self.answers / (p * (1 - p))
        return self.weight

    def cost(self, residual: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The objective [...] of residuals [..., n]."""
        if self.objective == "huber":
            r, c = np.abs(residual), self.scale
            return np.sum(self.weight * np.where(r <= c, r * r, 2 * c * r - c * c), axis=-1)
        if self.objective == "binomial":
            p, q = np.clip(y + residual, 1e-9, 1 - 1e-9), np.clip(y, 1e-12, 1 - 1e-12)
            deviance = 2 * (q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p)))
            return np.sum(self.weight * self.answers * deviance, axis=-1)
        return np.sum(self.weight * residual**2, axis=-1)


def solve(residual: Residual, data: Data, y: np.ndarray, theta: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The best parameters of each row.

    Args:
        residual: of the problem.
        data: how an error counts.
        y: [B, n], the data set of each row.
        theta: [B, q], where each search begins.
        low, high: [q] or [B, q]; a parameter with equal bounds stays there.

    Returns:
        [B, q] float64.
    """
    weight = np.broadcast_to(data.weight, y.shape)
    if data.objective in ("linear", "log"):
        return levenberg_marquardt(residual, y, weight, theta, low, high)
    theta, low, high = theta.copy(), np.broadcast_to(low, theta.shape), np.broadcast_to(high, theta.shape)
    live, weight = np.arange(len(theta)), weight.copy()
    for _ in range(40):
        before = theta[live]
        weight[live] = data.reweighted(residual(before, y[live], weight[live])[0], y[live])
        theta[live] = levenberg_marquardt(residual, y[live], weight[live], before, low[live], high[live], steps=4)
        live = live[np.max(np.abs(theta[live] - before) / (1e-3 + np.abs(before)), axis=1) > 1e-6]
        if not len(live):
            break
    return theta


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FitProblem:
    """A law and the data that it is fitted to."""

    space: Space
    coordinates: tuple[np.ndarray, ...]  # each [n]
    data: Data

    def residual(self, theta: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Residual`."""
        given, slope = self.space.jacobian(theta, self.coordinates)
        if self.data.log:
            safe = np.maximum(given, LEAST)
            return np.log(safe) - y, slope / safe[:, None, :]
        return given - y, slope

    def solve(
        self, y: np.ndarray, theta: np.ndarray, low: np.ndarray | None = None, high: np.ndarray | None = None
    ) -> np.ndarray:
        """`solve` for this law, in chunks that fit the memory; low and high [q] or [B, q] narrow the bounds."""
        low = np.broadcast_to(self.space.low if low is None else low, theta.shape)
        high = np.broadcast_to(self.space.high if high is None else high, theta.shape)
        rows = max(1, CHUNK // (theta.shape[1] * y.shape[1]))
        parts = [slice(i, i + rows) for i in range(0, len(theta), rows)]
        return np.concatenate([solve(self.residual, self.data, y[p], theta[p], low[p], high[p]) for p in parts])

    def cost(self, theta: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The objective [B] of theta [B, q] on data sets [B, n]."""
        return self.data.cost(self.error(theta, y), y)

    def error(self, theta: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Fitted minus measured [..., n], of log L where the objective is."""
        given = self.space.evaluate(theta, self.coordinates)
        return (np.log(np.maximum(given, LEAST)) if self.data.log else given) - y

    def design(self, theta: np.ndarray) -> np.ndarray:
        """Derivative [n, q] of the fitted values (of their logs, where errors are those of log L)."""
        return self.residual(theta[None], self.data.y[None], self.data.weight[None])[1][0].T

    def weighted(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weighted residual [n] of the data, and its derivative [n, q]; a parameter at its bound counts as known."""
        y = self.data.y
        r, d = (v[0] for v in self.residual(theta[None], y[None], self.data.weight[None]))
        root = np.sqrt(self.data.reweighted(r, y))
        held = (theta <= self.space.low) | (theta >= self.space.high)
        return root * r, np.where(held, 0.0, (root * d).T)

    @classmethod
    def of(
        cls, form: type[Law], coordinates: Sequence[np.ndarray], data: Data, known: Mapping[str, float] | None = None
    ) -> FitProblem:
        """The problem of fitting a law.

        Args:
            form: the law.
            coordinates: what its method takes, each [n].
            data: what it is fitted to; for "huber" the scale is found here, by a fit in log L.
            known: parameters that are not fitted, by name.

        Returns:
            The problem.
        """
        space = Space.of(form, coordinates, known)
        out = cls(space=space, coordinates=tuple(coordinates), data=data)
        if data.objective != "huber":
            return out
        plain = replace(out, data=replace(data, objective="log"))
        return replace(out, data=replace(data, scale=huber_scale(plain.error(plain.best(), data.y))))

    def best(self, count: int = 8) -> np.ndarray:
        """theta [q] of the data, from the best `count` corners of the grid of `starts`."""
        first = starts(self.space, self.coordinates, self.data, count)
        y = np.broadcast_to(self.data.y, (len(first), len(self.data.y)))
        found = self.solve(y, first)
        cost = self.cost(found, y)
        # of starts that end at the same objective the first wins, so that rounding does not choose
        return found[int(np.argmax(cost <= np.nanmin(cost) * (1 + 1e-9) + 1e-300))]


def huber_scale(residual: np.ndarray) -> float:
    """1.345 robust standard deviations (from the median absolute residual)."""
    return max(HUBER * 1.4826 * float(np.median(np.abs(residual))), 1e-12)


def starts(space: Space, coordinates: Sequence[np.ndarray], data: Data, count: int) -> np.ndarray:
    """Where searches begin: the best corners of a grid, the linear parameters being solved for.

    Args:
        space: of the law.
        coordinates: each [n].
        data: what is fitted.
        count: how many starts.

    Returns:
        [at most count, q], the best first.
    """
    form = space.form
    linear = [q for q in space.names if q in form.LINEAR]
    grid_names = [q for q in space.names if q not in linear]
    # the ends of a range are left out: a law is often singular there
    ticks = np.linspace(0, 1, GRID.get(len(grid_names), 5) + 2)[1:-1]
    corners = np.array(list(itertools.product(ticks, repeat=len(grid_names))))
    theta = np.zeros((len(corners), len(space.low)))
    for i, q in enumerate(grid_names):
        part = space.part(q)
        theta[:, part] = space.low[part] + corners[:, i : i + 1] * (space.high[part] - space.low[part])
    in_log = form.LOG_LINEAR
    y = data.y if data.log == in_log else (np.log(np.maximum(data.y, 1e-9)) if in_log else np.exp(data.y))

    def given(t: np.ndarray) -> np.ndarray:
        v = space.evaluate(t, coordinates)
        return np.log(np.maximum(v, 1e-300)) if in_log else v

    weight = data.weight
    offset = given(theta)
    error = np.broadcast_to(y, offset.shape) - offset
    where = [j for q in linear for j in range(*space.part(q).indices(len(space.low)))]
    if where:
        moved = []
        for j in where:
            one = theta.copy()
            one[:, j] = 1.0
            moved.append(given(one) - offset)
        basis = np.stack(moved, axis=1)  # [G, m, n]
        right = np.einsum("gmn,gn->gm", basis * weight, error)
        left = np.einsum("gmn,gkn->gmk", basis * weight, basis)
        diagonal = np.maximum(np.einsum("gmm->gm", left), 1e-300)
        solution = np.linalg.solve(left + 1e-9 * np.eye(len(where)) * diagonal[:, :, None], right[:, :, None])[:, :, 0]
        low, high = space.low[where], space.high[where]
        solution = np.clip(solution, low, high)
        for _ in range(20):  # towards the best inside the bounds, one parameter after another
            for m in range(len(where)):
                rest = right[:, m] - np.einsum("gk,gk->g", left[:, m], solution) + left[:, m, m] * solution[:, m]
                solution[:, m] = np.clip(rest / diagonal[:, m], low[m], high[m])
        theta[:, where] = solution
    cost = np.sum(weight * (given(theta) - y) ** 2, axis=1)
    order = np.argsort(np.where(np.isfinite(cost), cost, np.inf), kind="stable")
    return theta[order[:count]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Joint:
    """All points of several curves end to end, the intercept of each curve being projected out: M curves, n points."""

    n: np.ndarray  # [M] parameters
    center: np.ndarray  # [M] mean of log x
    u: np.ndarray  # [n] log x minus the center of its curve
    curve: np.ndarray  # [n] int, which curve
    start: np.ndarray  # [M] int, first point of each curve
    count: np.ndarray  # [M] int
    data: Data

    @classmethod
    def of(cls, curves: Sequence[Curve], objective: str) -> Joint:
        """The points of curves.

        Args:
            curves: at least one.
            objective: one of `OBJECTIVES`; the scale of "huber" is that of the residuals of each curve by itself.

        Returns:
            The points; every curve has the same total weight (but for "binomial").

        Raises:
            ValueError: see `Data.of`; the curve is named.
        """
        count = np.array([len(c.x) for c in curves])
        curve = np.repeat(np.arange(len(curves)), count)
        center = np.array([np.mean(np.log(c.x)) for c in curves])
        parts = [
            Data.of(
                c.loss, np.full(len(c.x), 1.0 / (len(c.x) * len(curves))), objective, label=f"size {c.label!r}",
                answers=c.answers,
            )
            for c in curves
        ]  # fmt: skip
        answers = np.concatenate([p.answers for p in parts]) if objective == "binomial" else None
        data = Data(
            y=np.concatenate([p.y for p in parts]), weight=np.concatenate([p.weight for p in parts]),
            objective=objective, answers=answers,
        )  # fmt: skip
        out = cls(
            n=np.array([c.params for c in curves]), center=center,
            u=np.concatenate([np.log(c.x) for c in curves]) - center[curve], curve=curve,
            start=np.concatenate([[0], np.cumsum(count)[:-1]]), count=count, data=data,
        )  # fmt: skip
        if objective != "huber":
            return out
        plain = replace(out, data=replace(data, objective="log"))
        residual = plain.project(plain.own_slopes(data.y[None])[0], data.y)[0]
        return replace(out, data=replace(data, scale=huber_scale(residual)))

    def sizes(self) -> np.ndarray:
        """Different parameters, rising."""
        return np.unique(self.n)

    def project(
        self, k: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Residuals for given slopes, the intercepts being the best.

        Args:
            k: [..., M], slope of each curve.
            y: [..., n], data sets.
            weight: [..., n]; None takes those of the data.

        Returns:
            residual [..., n], its derivative by the slope of its curve [..., n], log of the intercept at the curve's
            center [..., M].
        """
        weight = self.data.weight if weight is None else weight

        def total(v: np.ndarray) -> np.ndarray:
            return np.add.reduceat(v, self.start, axis=-1)

        if self.data.log:
            all_of = total(weight)
            intercept = total(weight * (y + k[..., self.curve] * self.u)) / all_of
            residual = intercept[..., self.curve] - k[..., self.curve] * self.u - y
            slope = (total(weight * self.u) / all_of)[..., self.curve] - self.u
            return residual, np.broadcast_to(slope, residual.shape), intercept
        z = np.exp(-k[..., self.curve] * self.u)
        wz = weight * z
        zz = total(wz * z)
        intercept = total(wz * y) / zz
        d_intercept = (-total(self.u * wz * y) + 2.0 * intercept * total(self.u * wz * z)) / zz
        residual = intercept[..., self.curve] * z - y
        slope = (d_intercept[..., self.curve] - intercept[..., self.curve] * self.u) * z
        return residual, slope, np.log(np.maximum(intercept, 1e-300))

    def best_intercepts(self, k: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(residual [..., n], log intercept [..., M]) under the objective itself, with weights that depend on the fit."""
        residual, _, intercept = self.project(k, y)
        if self.data.objective in ("huber", "binomial"):
            for _ in range(40):
                before = intercept
                residual, _, intercept = self.project(k, y, self.data.reweighted(residual, y))
                if np.max(np.abs(intercept - before)) < 1e-9:
                    break
        return residual, intercept

    def own_slopes(self, y: np.ndarray) -> np.ndarray:
        """The best slope of each curve by itself: y [B, n] -> k [B, M]."""
        out = np.empty((len(y), len(self.n)))
        for m, (first, count) in enumerate(zip(self.start, self.count, strict=True)):
            part = slice(first, first + count)
            one = self._curve(m, part)
            loss = np.exp(y[:, part]) if self.data.log else y[:, part]
            u = one.u - one.u.mean()
            rough = -(np.log(np.maximum(loss, 1e-3)) @ u) / float(u @ u)

            def residual(k: np.ndarray, y: np.ndarray, w: np.ndarray, one: Joint = one) -> tuple:
                r, d, _ = one.project(k, y, w)
                return r, d[:, None, :]

            out[:, m] = solve(residual, one.data, y[:, part], rough[:, None], np.array([-2.0]), np.array([2.0]))[:, 0]
        return out

    def _curve(self, m: int, part: slice) -> Joint:
        one, answers = slice(m, m + 1), self.data.answers
        return Joint(
            n=self.n[one], center=self.center[one], u=self.u[part], curve=np.zeros(self.count[m], dtype=int),
            start=np.array([0]), count=self.count[one],
            data=replace(
                self.data, y=self.data.y[part], weight=self.data.weight[part],
                answers=None if answers is None else answers[part],
            ),
        )  # fmt: skip

    def fit_many(
        self, space: Space, y: np.ndarray, theta: np.ndarray, low: np.ndarray | None = None,
        high: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Parameters of k(N) for data sets y [B, n] from theta [B, q]; low and high as in `FitProblem.solve`."""

        def residual(t: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            k, by_theta = space.jacobian(t, (self.n,))
            r, by_k, _ = self.project(k, y, weight)
            return r, by_theta[:, :, self.curve] * by_k[:, None, :]

        low = space.low if low is None else low
        high = space.high if high is None else high
        return solve(residual, self.data, y, theta, low, high)

    def fit(self, form: type[Law], own: np.ndarray) -> tuple[Space, np.ndarray]:
        """Parameters of k(N), from the eight best corners of the grid that describe the curves' own slopes.

        Args:
            form: a slope law.
            own: [M], slope of each curve by itself.

        Returns:
            The space of the law, and theta [q].
        """
        space = Space.of(form, (self.n,))
        rough = Data(y=own, weight=np.full(len(own), 1.0 / len(own)), objective="linear")
        theta = starts(space, (self.n,), rough, 8)
        y = np.broadcast_to(self.data.y, (len(theta), len(self.data.y)))
        found = self.fit_many(space, y, theta)
        cost = self.data.cost(self.best_intercepts(space.evaluate(found, (self.n,)), y)[0], y)
        return space, found[int(np.argmax(cost <= cost.min() * (1 + 1e-9) + 1e-300))]
