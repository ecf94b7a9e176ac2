"""The search against another library's, its derivatives against differences, and what its objectives mean."""

import numpy as np
import pytest
from law_tables import k_saturating, law_table
from scipy.optimize import least_squares, minimize

from grpo_engine.study.laws import forms as laws
from grpo_engine.study.laws.curves import select_curves
from grpo_engine.study.laws.least_squares import Data, FitProblem, Joint, Space

X = np.geomspace(64, 6400, 30)
N = np.repeat([2e5, 2e6, 2e7], 10)
D = np.tile(np.geomspace(64, 6400, 10), 3)
WHICH = np.repeat([0, 1, 2], 10)
CASES = {
    "loglinear": (laws.LogLinear(k=0.1, E=0.3), (X,)),
    "floor": (laws.FloorPower(A=0.5, alpha=0.5, L_inf=0.2, x_ref=64.0), (X,)),
    "sigmoid": (laws.ScaleRLSigmoid(A=0.7, B=1.5, X_mid=600.0, R0=0.2), (X,)),
    "exponential": (laws.ExponentialSaturation(A=0.6, X_scale=900.0, R0=0.2), (X,)),
    "additive": (laws.AdditiveLaw(A=0.2, a=0.3, B=0.1, b=0.4, L_inf=0.2, n_ref=2e6, d_ref=640.0), (N, D)),
    "decomposition": (
        laws.LossDecomposition(L_inf=0.1, A=0.3, alpha=0.3, beta=1.2, lam=(0.1, 0.2, 0.3), D0=(500.0, 600.0, 700.0),
                               n_ref=2e6), (N, D, WHICH),
    ),
    "reuse": (laws.ReuseLaw(k=0.15, E=0.4, worth=6.0), (X, np.minimum(X, 200.0))),
}  # fmt: skip


def problem_of(name, noise=0.0, objective="linear", **data):
    law, coordinates = CASES[name]
    loss = getattr(law, law.GIVES)(*coordinates)
    loss = loss + (np.random.default_rng(1).normal(0, noise, len(loss)) if noise else 0.0)
    weight = np.full(len(loss), 1.0 / len(loss))
    return law, FitProblem.of(type(law), coordinates, Data.of(loss, weight, objective, **data))


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_the_formula(name):
    law, problem = problem_of(name)
    theta = problem.space.theta(**{q: getattr(law, q) for q in law.PARAMETERS})
    given, slope = problem.space.jacobian(theta[None], problem.coordinates)
    assert given[0] == pytest.approx(law.loss(*problem.coordinates), rel=1e-14)
    for i in range(len(theta)):
        h = 1e-6 * max(abs(theta[i]), 1.0)
        up, down = theta.copy(), theta.copy()
        up[i] += h
        down[i] -= h
        gap = problem.space.evaluate(up, problem.coordinates) - problem.space.evaluate(down, problem.coordinates)
        assert slope[0, i] == pytest.approx(gap / (2 * h), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_an_exact_law_is_found(name):
    law, problem = problem_of(name)
    found = problem.space.law(problem.best())
    for q in law.PARAMETERS:
        want, got = np.atleast_1d(getattr(law, q)), np.atleast_1d(getattr(found, q))
        assert got == pytest.approx(want, rel=1e-3), q


@pytest.mark.parametrize("name", CASES)
def test_the_optimum_is_that_of_another_library(name):
    """scipy's trust region from the planted truth, all parameters at once, by differences."""
    law, problem = problem_of(name, noise=0.01)
    theta, space = problem.best(), problem.space

    def residual(t):
        return np.sqrt(problem.data.weight) * problem.error(t, problem.data.y)

    truth = np.clip(space.theta(**{q: getattr(law, q) for q in law.PARAMETERS}), space.low + 1e-9, space.high - 1e-9)
    plain = least_squares(residual, truth, bounds=(space.low, space.high), x_scale="jac", ftol=1e-12, xtol=1e-12)
    assert float(problem.cost(theta[None], problem.data.y)[0]) <= 2 * plain.cost * (1 + 1e-5)


def test_many_data_sets_at_once_are_the_same_fits_as_one_by_one():
    curves, _, _ = select_curves(law_table(noise=0.01, seed=6), axis="data")
    rng = np.random.default_rng(0)
    for objective in ("linear", "log", "huber"):
        p = Joint.of(curves, objective)
        y = p.data.y + rng.normal(0, 0.02, (8, len(p.data.y)))
        space, start = p.fit(laws.SaturatingSlope, p.own_slopes(p.data.y[None])[0])
        many = p.fit_many(space, y, np.repeat(start[None], len(y), axis=0))
        for one, theta in zip(y, many, strict=True):
            alone = p.fit_many(space, one[None], start[None])[0]
            assert theta == pytest.approx(alone, rel=1e-5)


def test_huber_is_not_moved_by_one_wild_point():
    _, clean = problem_of("loglinear", noise=0.005, objective="huber")
    wild = clean.data.y.copy()
    wild[3] += 1.0
    weight = clean.data.weight
    k = {}
    for objective in ("log", "huber"):
        problem = FitProblem.of(laws.LogLinear, (X,), Data.of(np.exp(wild), weight, objective))
        k[objective] = problem.space.law(problem.best()).k
    assert abs(k["huber"] - 0.1) < 0.005 < abs(k["log"] - 0.1)


def test_huber_is_the_optimum_of_its_function():
    _, problem = problem_of("loglinear", noise=0.02, objective="huber")
    theta, y = problem.best(), problem.data.y
    plain = minimize(lambda t: float(problem.cost(t[None], y)[0]), theta + 0.01, method="Nelder-Mead",
                     options={"xatol": 1e-10, "fatol": 1e-16, "maxiter": 4000})  # fmt: skip
    assert theta == pytest.approx(plain.x, abs=1e-5)


def test_binomial_is_the_maximum_of_the_likelihood():
    rng = np.random.default_rng(2)
    law, answers = laws.LogLinear(k=0.3, E=1.0), rng.integers(20, 400, len(X)).astype(float)
    wrong = rng.binomial(answers.astype(int), law.loss(X))
    problem = FitProblem.of(laws.LogLinear, (X,), Data.of(wrong / answers, np.ones(len(X)), "binomial", answers=answers))

    def negative(t):
        p = np.clip(np.exp(t[1] - t[0] * np.log(X)), 1e-9, 1 - 1e-9)
        return -float(wrong @ np.log(p) + (answers - wrong) @ np.log1p(-p))

    plain = minimize(negative, [0.3, 1.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9, "maxiter": 4000})
    assert problem.best() == pytest.approx(plain.x, abs=1e-4)


def test_binomial_needs_counts():
    with pytest.raises(ValueError, match="objective 'binomial': data does not tell how many answers"):
        Data.of(np.array([0.5]), np.ones(1), "binomial")
    curves, _, _ = select_curves(law_table(noise=0.01), axis="data")
    with pytest.raises(ValueError, match="size 'xs' does not tell how many answers"):
        Joint.of(curves, "binomial")
    curves, _, _ = select_curves(law_table(noise=0.01, num_problems=500, num_samples=4), axis="data")
    assert np.all(curves[0].answers == 2000)
    p = Joint.of(curves, "binomial")
    space, theta = p.fit(laws.SaturatingSlope, p.own_slopes(p.data.y[None])[0])
    assert space.law(theta).k(2e6) == pytest.approx(k_saturating(2e6), rel=0.1)


def test_a_bound_is_told():
    space = Space.of(laws.FloorPower, (X,))
    assert [space.end_of(i, space.low) for i in range(3)] == ["low"] * 3
    assert [space.end_of(i, space.high) for i in range(3)] == ["high"] * 3
    assert space.end_of(1, (space.low + space.high) / 2) == ""


def test_the_same_input_gives_the_same_digits():
    _, problem = problem_of("sigmoid", noise=0.01)
    assert np.array_equal(problem.best(), problem.best())
