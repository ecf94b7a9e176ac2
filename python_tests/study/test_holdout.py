"""Predictions of what was not used: nothing of the target leaks, and "not identified" is an answer."""

import dataclasses

import numpy as np
import pytest
from law_tables import law_table

from grpo_engine.study.laws import forms as laws
from grpo_engine.study.laws import holdout
from grpo_engine.study.laws.curves import Curve, select_curves

SEVEN = {f"z{i}": 1e5 * 3.0**i for i in range(7)}


def curves_of(**options):
    return select_curves(law_table(**({"sizes": SEVEN, "noise": 0.003, "start": 0.95} | options)), axis="data")[0]


@pytest.fixture(scope="module")
def paper_curves(real_data):
    from grpo_engine.study import importers

    path = real_data.parent / "paper" / "digitized_base_D.csv"
    if not path.is_file():
        pytest.skip(f"digitised figures are absent: {path} (beside GRPO_ENGINE_DATA)")
    return select_curves(importers.read_digitized(path), axis="data", params="nominal")[0]


def test_72b_is_predicted_from_smaller_sizes(paper_curves):
    """k and E of the published 72B curve from 0.5B to 32B, by the laws that predicted 14B and 32B best."""
    rows = holdout.growing_sizes(paper_curves)
    got = holdout.prediction(rows, "72B")
    assert got.used == "nothing" and got.num_points == 103
    assert got.law == "saturating k, local line E"
    assert got.log_error == pytest.approx(0.059, abs=0.003)
    assert got.bias == pytest.approx(-0.022, abs=0.003)
    assert 0.6 < got.coverage < 1.0  # the intercept is off by more than three sizes tell
    assert all(s > 0.4 for s in got.skill.values())
    # which pair is best on 72B is known only afterwards, and seven sizes do not tell
    best = min((r for r in rows if r.target == "72B" and r.used == "nothing"), key=lambda r: r.log_error)
    assert best.law == "log k, saturating E" and best.log_error == pytest.approx(0.027, abs=0.003)
    assert holdout.choose(rows).best == ""
    # the slope that the smaller sizes say is too steep, as the published test also finds with the intercept calibrated
    own = next(r for r in rows if r.target == "72B" and r.law == "saturating k, own intercept")
    assert own.r2 == pytest.approx(0.915, abs=0.005) and own.used != "nothing"


def test_the_target_is_not_looked_at():
    """Other losses of the target, at the same X, change no prediction."""
    curves = curves_of()
    other = [c if c is not curves[-1] else dataclasses.replace(c, loss=0.5 * c.loss, by_run=0.5 * c.by_run) for c in curves]
    a, b = (holdout.largest_size(c, draws=20) for c in (curves, other))
    for one, two, c, d in zip(a, b, [curves[-1]] * 9, [other[-1]] * 9, strict=False):
        if one.used == "nothing":
            assert one.bias + np.mean(c.loss) == pytest.approx(two.bias + np.mean(d.loss), rel=1e-12)
    late = [dataclasses.replace(c, loss=np.where(np.arange(len(c.x)) > 7, 0.5, c.loss)) for c in curves[:1]]
    mean = [np.mean(c.loss[-3:]) for c in (curves[0], late[0])]
    for one, two in zip(holdout.late_steps(curves[0]), holdout.late_steps(late[0]), strict=True):
        assert one.bias + mean[0] == pytest.approx(two.bias + mean[1], rel=1e-12)


def test_a_law_that_holds_beats_the_naive_rules():
    rows = holdout.growing_sizes(curves_of(), draws=40)
    assert [r.target for r in rows if r.law == "saturating k, line E"] == ["z3", "z4", "z5", "z6"]
    best = holdout.prediction(rows, "z6")
    assert best.log_error < 0.1 and best.skill["next smaller size"] > 0.5
    assert 0 <= best.coverage <= 1 and best.confidence == 0.9


def test_few_sizes_are_not_predicted():
    assert holdout.largest_size(curves_of()[:3]) == []
    assert holdout.prediction([], "z6") is None


def test_late_steps_by_the_law_that_made_them():
    x = np.linspace(64, 6400, 60)
    law = laws.ExponentialSaturation(A=0.5, X_scale=800.0, R0=0.1)
    loss = law.loss(x) + np.random.default_rng(0).normal(0, 0.003, 60)
    curve = Curve(label="m", size="m", kind="base", params=1e6, step=np.arange(1, 61), x=x, loss=loss, by_run=loss[None],
                  loss_before=None, compute_per_prompt=None, prompts_per_step=None)  # fmt: skip
    rows = {r.law: r for r in holdout.late_steps(curve)}
    assert set(rows) == set(laws.CURVES)
    assert rows["exponential"].log_error < 0.01 < 0.05 < rows["loglinear"].log_error
    assert rows["exponential"].skill["log-linear"] > 0.9
    assert rows["exponential"].coverage > 0.7
    assert rows["loglinear"].bias < -0.03  # a line goes on falling where the curve has stopped
    nine = dataclasses.replace(curve, step=curve.step[:9], x=x[:9], loss=loss[:9], by_run=loss[None, :9])
    assert holdout.late_steps(nine) == []
    with pytest.raises(ValueError, match="positive and at most 1 together, got 0.9 and 0.2"):
        holdout.late_steps(curve, first=0.9)


def test_a_law_is_chosen_by_what_it_did_not_see():
    """Seven curves that saturate: the exponential is named; pure noise names nobody."""
    x, rng = np.linspace(64, 6400, 40), np.random.default_rng(1)

    def curves(loss_of):
        for i in range(7):
            loss = loss_of(i)
            yield Curve(label=f"c{i}", size="m", kind="base", params=1e6, step=np.arange(1, 41), x=x, loss=loss,
                        by_run=loss[None], loss_before=None, compute_per_prompt=None, prompts_per_step=None)  # fmt: skip

    def saturating(i):
        return laws.ExponentialSaturation(A=0.4 + 0.05 * i, X_scale=900.0, R0=0.1).loss(x) + rng.normal(0, 0.002, 40)

    chosen = holdout.choose([r for c in curves(saturating) for r in holdout.late_steps(c)])
    assert chosen.best == "exponential" and chosen.num_targets == 7
    assert list(chosen.errors)[0] == "exponential" and chosen.skill["exponential"]["last value"] > 0
    noise = holdout.choose([r for c in curves(lambda i: 0.5 + rng.normal(0, 0.01, 40)) for r in holdout.late_steps(c)])
    assert noise.best == "" and "not identified by these data" in noise.why
    one = holdout.choose(holdout.late_steps(next(iter(curves(saturating)))))
    assert one.best == "" and "1 target" in one.why
    with pytest.raises(ValueError, match="at least one prediction"):
        holdout.choose([])


def test_another_set_is_predicted_from_its_fellows():
    sets = {
        name: select_curves(law_table(sizes=SEVEN, noise=0.002, seed=i, start=start), axis="data")[0]
        for i, (name, start) in enumerate((("chain", 0.95), ("word", 0.93), ("list", 0.9)))
    }
    rows = holdout.other_set(sets, "list")
    assert [r.target for r in rows] == [f"list {s}" for s in SEVEN]
    assert all(r.used == "its loss before RL" for r in rows)
    assert rows[-1].skill["no change"] > 0.9 and rows[-1].log_error < 0.05
    assert holdout.other_set({"chain": sets["chain"], "list": sets["list"]}, "list") == []
    with pytest.raises(ValueError, match="target must be one of"):
        holdout.other_set(sets, "chess")
