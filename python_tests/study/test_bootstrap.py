"""The width of intervals, where a formula says what it must be. How often they hold the truth: test_recovery.py."""

import numpy as np
import pytest
from scipy.special import ndtri, stdtrit

from grpo_engine.evaluate.intervals import CONFIDENCE, interval
from grpo_engine.study.laws import bootstrap
from grpo_engine.study.laws import forms as laws
from grpo_engine.study.laws.bootstrap import resample
from grpo_engine.study.laws.curves import Curve
from grpo_engine.study.laws.law_fit import fit_curve

X = np.geomspace(64, 6400, 60)
UPPER = (1 + CONFIDENCE) / 2


def curve(by_run):
    return Curve(label="m", size="m", kind="base", params=1e6, step=np.arange(1, len(X) + 1), x=X, loss=by_run.mean(axis=0),
                 by_run=by_run, loss_before=None, compute_per_prompt=None, prompts_per_step=None)  # fmt: skip


def test_an_interval_leaves_the_same_share_out_on_either_side():
    draws = np.stack([np.arange(1001.0), -np.arange(1001.0)], axis=1)
    low, high = interval(draws, 0.9)
    assert low == pytest.approx([50, -950]) and high == pytest.approx([950, -50])
    low, high = interval(draws)
    assert (high - low) / 1000 == pytest.approx([CONFIDENCE, CONFIDENCE])


@pytest.mark.parametrize("runs", [2, 3, 6])
def test_draws_spread_as_the_mean_of_few_runs_does(runs):
    offsets = np.linspace(-0.02, 0.02, runs)
    c = curve(laws.LogLinear(k=0.1, E=0.3).loss(X) + offsets[:, None])
    # the fitted values are the mean of the runs, so nothing scatters about them
    draws = resample([c], c.loss, c.loss, log=False, draws=20_000, rng=np.random.default_rng(0), alone=True)
    error = offsets.std(ddof=1) / np.sqrt(runs) * stdtrit(runs - 1, UPPER) / ndtri(UPPER)
    assert draws.mean(axis=0) == pytest.approx(c.loss, abs=0.03 * error)
    assert draws.std(axis=0) == pytest.approx(np.full(len(X), error), rel=0.03)


def test_profile_intervals_are_the_textbooks_where_noise_is_independent(monkeypatch):
    noise = np.random.default_rng(0).normal(0, 0.01, len(X))
    c = curve((laws.LogLinear(k=0.1, E=0.3).loss(X) * np.exp(noise))[None])
    freedom = len(X) - 2
    monkeypatch.setattr(bootstrap, "inflation", lambda *_: (np.ones(2), freedom))  # of noise that does not last
    k = fit_curve(c, laws.LogLinear, objective="log").parameters["k"]

    design = np.stack([np.ones(len(X)), np.log(X)], axis=1)
    found, (squares,), *_ = np.linalg.lstsq(design, np.log(c.loss), rcond=None)
    half = stdtrit(freedom, UPPER) * np.sqrt(squares / freedom * np.linalg.inv(design.T @ design)[1, 1])
    assert k.value == pytest.approx(-found[1], rel=1e-6)
    assert (k.low, k.high) == pytest.approx((-found[1] - half, -found[1] + half), rel=1e-4)
