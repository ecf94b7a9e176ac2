"""Single laws, fitted: what is found, and what is said to be out of sight."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from law_tables import SIZES, law_table

from grpo_engine.study.laws import fit
from grpo_engine.study.laws import forms as laws
from grpo_engine.study.laws.curves import Curve, curves_by, select_curves
from grpo_engine.study.laws.law_fit import fit_curve, fit_intercepts, fit_reuse, fit_surface


def make_curve(law, x, noise=0.0, before=None, seed=0):
    loss = law.loss(x) + (np.random.default_rng(seed).normal(0, noise, len(x)) if noise else 0.0)
    return Curve(
        label="m", size="m", kind="base", params=1e6, step=np.arange(1, len(x) + 1), x=x, loss=loss, by_run=loss[None],
        loss_before=before, compute_per_prompt=None, prompts_per_step=None,
    )  # fmt: skip


SIGMOID = laws.ScaleRLSigmoid(A=0.6, B=2.0, X_mid=1000.0, R0=0.2)


@pytest.mark.parametrize("before", [None, 0.8])
def test_sigmoid_is_recovered_with_its_ceiling(before):
    got = fit_curve(make_curve(SIGMOID, np.geomspace(50, 20000, 40), 0.003, before), laws.ScaleRLSigmoid)
    p = got.parameters
    assert p["A"].value == pytest.approx(0.6, abs=0.01)
    assert p["A"].low < 0.6 < p["A"].high
    assert p["B"].value == pytest.approx(2.0, rel=0.15)
    assert p["X_mid"].value == pytest.approx(1000, rel=0.1)
    assert got.rmse < 0.004
    assert got.verdict.ok
    assert ("R0" in p) == (before is None)
    if before is not None:
        assert got.fixed["R0"] == pytest.approx(0.2)


def test_ceiling_that_was_not_reached_is_not_claimed():
    """All points lie below the middle of the rise: any higher ceiling will do."""
    got = fit_curve(make_curve(SIGMOID, np.geomspace(20, 500, 40), 0.004), laws.ScaleRLSigmoid)
    assert not got.verdict.ok
    assert "A " in got.verdict.why
    assert got.parameters["A"].high is None


def test_exponential_saturation_is_recovered():
    law = laws.ExponentialSaturation(A=0.5, X_scale=800.0, R0=0.1)
    got = fit_curve(make_curve(law, np.linspace(64, 6400, 60), 0.003), laws.ExponentialSaturation)
    assert got.parameters["A"].value == pytest.approx(0.5, abs=0.01)
    assert got.parameters["X_scale"].value == pytest.approx(800, rel=0.1)
    assert got.verdict.ok
    with pytest.raises(ValueError, match="exponential needs at least 4 points, got 3"):
        fit_curve(make_curve(law, np.linspace(64, 6400, 3)), laws.ExponentialSaturation)


def test_floor_is_seen_or_not():
    law = laws.FloorPower(A=0.5, alpha=0.6, L_inf=0.3, x_ref=64.0)
    seen = fit_curve(make_curve(law, np.geomspace(64, 64000, 40), 0.003), laws.FloorPower)
    assert seen.verdict.ok
    assert seen.parameters["L_inf"].low < 0.3 < seen.parameters["L_inf"].high
    line = fit_curve(make_curve(laws.LogLinear(k=0.1, E=0.3), np.geomspace(64, 6400, 40), 0.01), laws.FloorPower)
    assert line.parameters["L_inf"].low is None and not line.verdict.ok


def test_intercepts_of_a_joint_law():
    """law_table's intercepts fall evenly in log N: 0.9, 0.8, ... 0.5."""
    curves, _, _ = select_curves(law_table(noise=0.003, runs=2), axis="data")
    joint = fit.fit_joint(curves, axis="data", n_boot=60)
    fits = fit_intercepts(joint, x=64.0)
    assert {f.law for f in fits} == set(laws.INTERCEPTS)
    assert [f.misfit for f in fits] == sorted(f.misfit for f in fits)
    for i, size in enumerate(SIZES):
        e = fits[0].intercepts[size]
        assert e.value == pytest.approx(np.log(0.9 - 0.1 * i), abs=0.01)
        assert 0 < e.high - e.low < 0.1
    two = fit.fit_joint(curves[:2], axis="data", n_boot=20)
    assert fit_intercepts(two) == []


def surface(law, noise=0.003):
    curves, _, _ = select_curves(law_table(noise=0.0), axis="data")
    rng = np.random.default_rng(3)
    out = []
    for i, c in enumerate(curves):
        where = (i,) if isinstance(law, laws.LossDecomposition) else ()
        loss = law.loss(c.params, c.x, *where) + rng.normal(0, noise, len(c.x))
        out.append(dataclasses.replace(c, loss=loss, by_run=loss[None]))
    return out


def test_additive_surface():
    law = laws.AdditiveLaw(A=0.2, a=0.3, B=0.06, b=0.4, L_inf=0.2, n_ref=2e6, d_ref=640.0)
    got = fit_surface(surface(law), laws.AdditiveLaw)
    for q in ("a", "b", "L_inf"):
        e = got.parameters[q]
        assert (e.low or 0) < getattr(law, q) < (e.high or 1)
    assert len(got.curves) == 5 and min(c.r2 for c in got.curves) < got.r2


def test_decomposition_surface():
    law = laws.LossDecomposition(
        L_inf=0.1, A=0.3, alpha=0.3, beta=1.2, lam=(0.1, 0.15, 0.2, 0.25, 0.3), D0=(500.0, 600.0, 700.0, 600.0, 500.0),
        n_ref=2e6,
    )  # fmt: skip
    got = fit_surface(surface(law), laws.LossDecomposition)
    assert got.parameters["beta"].low < 1.2 < got.parameters["beta"].high
    assert got.parameters["lam[xl]"].value == pytest.approx(0.3, abs=0.05)
    assert got.parameters["lam[xl]"].low is None
    with pytest.raises(ValueError, match="has 14 parameters here and needs more points, got 10"):
        fit_surface([dataclasses.replace(c, x=c.x[:2], loss=c.loss[:2]) for c in surface(law)], laws.LossDecomposition)


def reuse_curves(law, pools, noise=0.003):
    seen, rng, out = np.geomspace(64, 6400, 20), np.random.default_rng(5), []
    for pool in pools:
        unique = np.minimum(seen, pool)
        c = make_curve(laws.LogLinear(k=0.1, E=0.0), seen)
        loss = law.loss(seen, unique) + rng.normal(0, noise, len(seen))
        out.append(dataclasses.replace(c, loss=loss, by_run=loss[None], unique=unique))
    return out


def test_worth_of_repeats():
    law = laws.ReuseLaw(k=0.15, E=0.5, worth=6.0)
    got = fit_reuse(reuse_curves(law, (6400, 1280, 256, 64)))
    for q in law.PARAMETERS:
        assert got.parameters[q].low < getattr(law, q) < got.parameters[q].high
    assert got.verdict.ok


def test_curves_of_a_table_by_reuse_and_by_set():
    law, rows = laws.ReuseLaw(k=0.1, E=0.0, worth=6.0), []
    schema = law_table().schema
    for tau, pool in ((1.0, 6400), (4.0, 1600), (25.0, 256)):
        for r in law_table(sizes={"m": 2e6, "l": 6e6}, tau=tau).to_pylist():
            seen = max(r["prompts_seen"], 1)
            unique = min(seen, pool)
            new = {"run_id": f"{r['run_id']}-{tau}", "unique_prompts": unique, "loss": float(law.loss(seen, unique))}
            rows.append(r | new)
    rows += law_table(sizes={"m": 2e6}, eval_set="word").to_pylist()
    table = pa.Table.from_pylist(rows, schema=schema)
    by_tau = curves_by(table, "tau", size="m", axis="data", eval_set="chain")
    assert {tau: [c.label for c in curves] for tau, curves in by_tau.items()} == {1: ["m"], 4: ["m"], 25: ["m"]}
    got = fit_reuse([c for curves in by_tau.values() for c in curves])
    assert got.parameters["worth"].value == pytest.approx(6.0, rel=1e-3)
    by_set = curves_by(table, "eval_set", axis="data")
    assert {name: [c.label for c in curves] for name, curves in by_set.items()} == {"chain": ["m", "l"], "word": ["m"]}
    with pytest.raises(ValueError, match="column must be 'tau' or 'eval_set', got 'seed'"):
        curves_by(table, "seed", axis="data")


def test_free_repeats_have_no_upper_end():
    got = fit_reuse(reuse_curves(laws.ReuseLaw(k=0.15, E=0.5, worth=1e9), (6400, 1280, 640)))
    assert got.parameters["worth"].high is None and got.parameters["worth"].low > 5
    assert not got.verdict.ok


def test_reuse_needs_runs_that_repeat():
    law = laws.ReuseLaw(k=0.15, E=0.5, worth=6.0)
    with pytest.raises(ValueError, match="no curve of m repeats its prompts"):
        fit_reuse(reuse_curves(law, (6400,)))
    with pytest.raises(ValueError, match="m does not tell how many different prompts"):
        fit_reuse([make_curve(SIGMOID, np.geomspace(64, 6400, 20))])
    curves = reuse_curves(law, (6400, 640))
    with pytest.raises(ValueError, match="must be of one size and kind"):
        fit_reuse([curves[0], dataclasses.replace(curves[1], params=2e6)])
