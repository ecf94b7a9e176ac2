"""Fits against planted laws, published figures and data that identify nothing."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
from law_tables import BATCH, K_MAX, N0, SIZES, STEPS, TOKENS, k_saturating, law_table
from scipy.optimize import least_squares

from grpo_engine.records import jsonl
from grpo_engine.study import importers
from grpo_engine.study.laws import fit
from grpo_engine.study.laws import forms as laws
from grpo_engine.study.laws.curves import select_curves
from grpo_engine.study.laws.results import residuals

THREE = {n: SIZES[n] for n in ("s", "m", "l")}


def axis_fit(table, axis="data", **options):
    return fit.fit_axis(table, axis=axis, **({"n_boot": 20, "shapes": False} | options))


def edit(table, change):
    return pa.Table.from_pylist([change(r) for r in table.to_pylist()], schema=table.schema)


# ------------------------------------------------------------------------------- the published figures


@pytest.fixture(scope="module")
def base_curves(real_data):
    path = real_data.parent / "paper" / "digitized_base_D.csv"
    if not path.is_file():
        pytest.skip(f"digitised figures are absent: {path} (beside GRPO_ENGINE_DATA)")
    return importers.read_digitized(path)


@pytest.mark.parametrize(
    ("max_params", "k_max", "n0", "r2"), [(None, 0.1400, 13.0e9, 0.9958), (33e9, 0.1631, 16.95e9, 0.9947)]
)
def test_published_fit_of_base_models(base_curves, max_params, k_max, n0, r2):
    got = axis_fit(base_curves, params="nominal", max_params=max_params)
    joint = got.joint
    assert len(joint.curves) == (7 if max_params is None else 6)
    assert joint.parameters["K_max"].value == pytest.approx(k_max, rel=0.05)
    assert joint.parameters["N0"].value == pytest.approx(n0, rel=0.07)
    assert joint.r2 == pytest.approx(r2, abs=0.0005)
    assert got.verdict.ok
    assert any("spread between runs" in c for c in got.verdict.cautions)  # the curves are averages already
    if max_params is None:
        assert joint.objective_value == pytest.approx(1.408e-4, rel=0.05)
        e10 = [laws.e_log10(c.E.value) for c in joint.curves]
        authors = [0.00405, 0.03086, 0.04766, 0.07130, 0.11463, 0.15352, 0.18486]
        assert e10 == pytest.approx(authors, abs=0.004)


def test_pooled_r2_hides_what_the_sizes_show(base_curves):
    joint = axis_fit(base_curves, params="nominal").joint
    assert joint.r2 > 0.995
    want = [0.58, 0.70, 0.59, 0.89, 0.96, 0.92, 0.95]
    assert [c.r2 for c in joint.curves] == pytest.approx(want, abs=0.011)


def test_first_steps_give_the_published_fit_of_first_steps(base_curves):
    """Table 6 of the paper, "intra": steps 1 to 25."""
    joint = axis_fit(base_curves, params="nominal", max_step=25).joint
    assert joint.parameters["K_max"].value == pytest.approx(0.1348, rel=0.05)
    assert joint.parameters["N0"].value == pytest.approx(11.52e9, rel=0.07)
    assert joint.r2 == pytest.approx(0.9953, abs=0.0005)


@pytest.mark.parametrize(
    ("options", "k_max", "n0"),
    [({}, 0.13996, 13.0e9), ({"max_params": 33e9}, 0.1631, 16.95e9), ({"max_step": 25}, 0.1348, 11.52e9)],
)
def test_intervals_hold_the_published_values(base_curves, options, k_max, n0):
    curves, _, _ = select_curves(base_curves, axis="data", params="nominal", **options)
    p = fit.fit_joint(curves, axis="data", n_boot=200, leave_out=False).parameters
    assert p["K_max"].low < k_max < p["K_max"].high
    assert p["N0"].low < n0 < p["N0"].high


def test_the_law_hangs_on_the_largest_size(base_curves):
    joint = axis_fit(base_curves, params="nominal").joint
    assert {w.size: round(w.parameters["K_max"], 3) for w in joint.without_one}["72B"] == 0.163


# ------------------------------------------------------------------------------------ planted laws


@pytest.mark.parametrize("objective", ("linear", "log"))
@pytest.mark.parametrize("axis", ["data", "compute", "tokens"])
def test_recovers_an_exact_law(axis, objective):
    joint = axis_fit(law_table(), axis, objective=objective).joint
    assert joint.parameters["K_max"].value == pytest.approx(K_MAX, rel=1e-6)
    assert joint.parameters["N0"].value == pytest.approx(N0, rel=1e-6)
    per_prompt = {"data": 1, "tokens": TOKENS}
    for i, c in enumerate(joint.curves):
        first = BATCH * (per_prompt[axis] if axis in per_prompt else 6 * c.params * TOKENS)
        assert c.E.value == pytest.approx(np.log(0.9 - 0.1 * i) + k_saturating(c.params) * np.log(first), rel=1e-5)
        assert c.x_min == pytest.approx(first)
        assert c.r2 == pytest.approx(1.0)
    assert joint.verdict.ok


@pytest.mark.parametrize("objective", ("linear", "log"))
def test_projection_finds_the_optimum_of_the_full_problem(objective):
    """Against a plain least-squares fit of all parameters at once, E included, that shares no code with ours."""
    curves, _, _ = select_curves(law_table(noise=0.02, seed=3), axis="data")
    joint = fit.fit_joint(curves, axis="data", n_boot=20, objective=objective)

    def residual(v):
        out = []
        for c, e in zip(curves, v[2:], strict=True):
            y = e - v[0] * c.params / (c.params + np.exp(v[1])) * np.log(c.x)
            r = y - np.log(c.loss) if objective == "log" else np.exp(y) - c.loss
            out.append(r / np.sqrt(len(r) * len(curves)))
        return np.concatenate(out)

    plain = least_squares(residual, [0.1, np.log(3e6), *[0.0] * len(curves)], ftol=1e-14, xtol=1e-14, gtol=1e-14)
    assert joint.objective_value == pytest.approx(2 * plain.cost, rel=1e-8)
    assert joint.parameters["K_max"].value == pytest.approx(plain.x[0], rel=1e-4)
    assert joint.parameters["N0"].value == pytest.approx(np.exp(plain.x[1]), rel=1e-4)
    assert [c.E.value for c in joint.curves] == pytest.approx(plain.x[2:], abs=1e-4)


@pytest.mark.parametrize("objective", ("linear", "log"))
def test_single_size_is_least_squares(objective):
    curves, _, _ = select_curves(law_table(noise=0.02, seed=4), axis="data")
    for c, s in zip(curves, fit.fit_sizes(curves, objective=objective, n_boot=20), strict=True):

        def residual(v, c=c):
            y = v[1] - v[0] * np.log(c.x)
            return y - np.log(c.loss) if objective == "log" else np.exp(y) - c.loss

        plain = least_squares(residual, [0.0, 0.0], ftol=1e-15, xtol=1e-15, gtol=1e-15)
        assert s.k.value == pytest.approx(plain.x[0], abs=1e-6)
        assert s.E.value == pytest.approx(plain.x[1], abs=1e-5)


def test_each_size_weighs_the_same_whatever_its_points():
    """A size measured at every step must not outvote one measured at sixteen."""
    sparse = law_table(noise=0.01, seed=1)
    rows = sparse.to_pylist()
    doubled = [r | {"step": 10_000 + r["step"]} for r in rows if r["size"] == "xl" and r["step"] > 0]
    twice = pa.Table.from_pylist(rows + doubled, schema=sparse.schema)
    a, b = axis_fit(sparse).joint, axis_fit(twice).joint
    assert b.num_points == a.num_points + len(STEPS)
    assert b.parameters["K_max"].value == pytest.approx(a.parameters["K_max"].value, rel=1e-9)
    assert b.objective_value == pytest.approx(a.objective_value, rel=1e-9)


def test_intervals_grow_with_the_noise_and_cover_runs():
    quiet, loud = (axis_fit(law_table(noise=s, seed=2), n_boot=60).joint.parameters["K_max"] for s in (0.003, 0.03))
    assert loud.high - loud.low > 4 * (quiet.high - quiet.low)
    one = axis_fit(law_table(runs=1, noise=0.003, drift=0.03, seed=5), n_boot=60).joint
    three = axis_fit(law_table(runs=3, noise=0.003, drift=0.03, seed=5), n_boot=60).joint
    assert one.bootstrap.runs_resampled == ()
    assert "not covered" in one.bootstrap.method
    assert three.bootstrap.runs_resampled == tuple(SIZES)
    assert "runs at every curve" in three.bootstrap.method
    # a drift that moves a whole run is invisible within it: only several runs show it
    width = [j.parameters["K_max"].high - j.parameters["K_max"].low for j in (one, three)]
    assert width[1] > 1.5 * width[0]


def test_same_seed_same_bits():
    table = law_table(runs=2, noise=0.01)
    a, b = (fit.fit_table(table, axes=["data"], n_boot=20, shapes=False, seed=7) for _ in range(2))
    assert a == b
    c = fit.fit_table(table, axes=["data"], n_boot=20, shapes=False, seed=8)
    assert c.fits[0].joint.parameters["K_max"].value == a.fits[0].joint.parameters["K_max"].value
    assert c.fits[0].joint.draws != a.fits[0].joint.draws


def test_other_forms_of_the_slope():
    table = law_table(noise=0.001, k=lambda n: 0.05 * (n / 2e6) ** 0.35)
    curves, _, _ = select_curves(table, axis="data")
    other = fit.fit_joint(curves, axis="data", form="power", n_boot=40)
    assert other.parameters["gamma"].low < 0.35 < other.parameters["gamma"].high
    assert other.profile is None
    assert other.loss("m", 64.0) == pytest.approx(0.7, abs=0.005)


@pytest.mark.parametrize("objective", ["huber", "binomial"])
def test_other_objectives_find_the_law_too(objective):
    table = law_table(noise=0.005, runs=2, num_problems=500, num_samples=4)
    joint = axis_fit(table, objective=objective).joint
    assert joint.objective == objective and joint.verdict.ok
    assert joint.parameters["K_max"].value == pytest.approx(K_MAX, rel=0.1)
    assert joint.profile.low < N0 < joint.profile.high


def test_residuals_are_what_the_law_leaves():
    curves, _, _ = select_curves(law_table(noise=0.01), axis="data")
    joint = fit.fit_joint(curves, axis="data", n_boot=20)
    left = residuals(curves, joint)
    assert list(left) == [c.label for c in curves]
    for c in curves:
        x, fitted, residual = left[c.label]
        assert np.array_equal(x, c.x)
        assert fitted + residual == pytest.approx(c.loss, rel=1e-15)
        assert np.sqrt(np.mean(residual**2)) == pytest.approx(joint.curves[joint.index(c.label)].rmse)


def test_band_holds_the_curve():
    joint = axis_fit(law_table(noise=0.01), n_boot=60).joint
    x = np.geomspace(64, 6400, 7)
    low, high = joint.band("m", x)
    assert np.all(low < joint.loss("m", x)) and np.all(joint.loss("m", x) < high)
    assert np.all(high - low < 0.05)
    assert joint.loss_draws("m", x).shape == (60, 7)
    with pytest.raises(ValueError, match="label must be one of .*'xs'.* got 'q'"):
        joint.loss("q", x)


# --------------------------------------------------------------------- data that do not identify a fit


@pytest.mark.parametrize("num", [1, 2])
def test_too_few_sizes(num):
    got = axis_fit(law_table(sizes=dict(list(SIZES.items())[:num]), noise=0.005))
    assert not got.verdict.ok
    assert f"{num} size" in got.verdict.why and "at least 3" in got.verdict.why
    assert (got.joint is None) == (num == 1)
    assert got.intercepts == () and got.held_out == ()
    assert len(got.sizes) == num


def test_two_kinds_of_two_sizes_are_still_two_sizes():
    got = axis_fit(law_table(sizes={"s": 6e5, "m": 2e6}, kinds=("base", "instruct"), noise=0.005))
    assert len(got.joint.curves) == 4
    assert "2 sizes" in got.verdict.why


def test_flat_losses():
    got = axis_fit(law_table(k=lambda n: 0.0, noise=0.01, runs=2))
    assert not got.verdict.ok
    assert "falls beyond its scatter" in got.verdict.why
    assert sum(not s.verdict.ok for s in got.sizes) >= 4  # one in twenty is told from 0 by chance


def test_equal_losses_without_any_noise():
    got = axis_fit(law_table(k=lambda n: 0.0))
    assert not got.verdict.ok
    assert "K_max ended at the lowest value allowed" in got.verdict.why
    assert all(s.r2 is None and "does not fall" in s.verdict.why for s in got.sizes)


def test_rising_losses():
    got = axis_fit(law_table(k=lambda n: -0.03, noise=0.002, start=0.6))
    assert not got.verdict.ok
    assert "K_max ended at the lowest value allowed" in got.verdict.why
    assert all(s.k.value < 0 and "does not fall" in s.verdict.why for s in got.sizes)


def test_slopes_that_do_not_depend_on_size_do_not_tell_n0():
    got = axis_fit(law_table(k=lambda n: 0.06, noise=0.003), n_boot=60)
    assert not got.verdict.ok
    assert "N0" in got.verdict.why
    assert got.joint.profile.low is None


def test_slopes_proportional_to_size_do_not_limit_n0_from_above():
    got = axis_fit(law_table(k=lambda n: 5e-9 * n, noise=0.003), n_boot=60)
    assert not got.verdict.ok
    assert got.joint.profile.high is None
    assert "N0" in got.verdict.why and ("above" in got.verdict.why or "highest" in got.verdict.why)


def test_noise_that_drowns_the_law():
    got = axis_fit(law_table(sizes=THREE, noise=0.15, k=lambda n: 0.3 * k_saturating(n)), n_boot=60)
    assert not got.verdict.ok


def test_a_law_that_hangs_on_one_size_says_so():
    def k(n):
        return 0.4 if n == 2e7 else k_saturating(n)

    got = axis_fit(law_table(k=k, noise=0.002))
    assert any("hangs on that size" in c for c in got.verdict.cautions)


def test_too_few_points_are_named():
    got = axis_fit(law_table(steps=[1, 10, 100]))
    assert not got.verdict.ok
    assert got.sizes == () and got.joint is None
    assert "xs: 3 points, fewer than 4" in got.verdict.why


def test_three_sizes_are_enough_when_they_are_clean():
    got = axis_fit(law_table(sizes=THREE, noise=0.003, runs=3), n_boot=60)
    assert got.verdict.ok, got.verdict.why
    assert got.held_out == ()


# ------------------------------------------------------------------------------------------ selection


def test_runs_are_averaged_per_size_and_step():
    curves, selection, left_out = select_curves(law_table(runs=3, noise=0.02), axis="compute")
    rows = [r for r in law_table(runs=3, noise=0.02).to_pylist() if r["size"] == "m" and r["step"] == STEPS[4]]
    c = next(c for c in curves if c.label == "m")
    assert c.loss[4] == pytest.approx(np.mean([r["loss"] for r in rows]))
    assert c.by_run.shape == (3, len(STEPS))
    assert c.compute_per_prompt == pytest.approx(6 * 2e6 * TOKENS)
    assert c.prompts_per_step == BATCH
    assert left_out == []
    before = [r["loss"] for r in law_table(runs=3, noise=0.02).to_pylist() if r["size"] == "m" and r["step"] == 0]
    assert c.loss_before == pytest.approx(np.mean(before))
    assert selection.eval_set == "chain" and selection.temperature == 0.7 and selection.group_size == 8


def test_a_run_that_stopped_early_is_averaged_as_far_as_it_got():
    table = law_table(runs=2, noise=0.01)
    rows = [r for r in table.to_pylist() if not (r["run_id"] == "m-base-1" and r["step"] > 30)]
    got = axis_fit(pa.Table.from_pylist(rows, schema=table.schema))
    c = next(c for c in got.joint.curves if c.label == "m")
    assert c.num_points == len(STEPS) and c.num_runs == 2
    assert all(np.isfinite([e.low, e.high]).all() for e in got.joint.parameters.values())


def test_ablations_and_other_sets_stay_out():
    main = law_table(noise=0.005)
    other = [
        law_table(sizes={"m": 2e6}, k=lambda n: 0.5, group_size=16, run_id="g16"),
        law_table(sizes={"m": 2e6}, k=lambda n: 0.5, tau=25.0, run_id="tau25"),
        law_table(sizes={"m": 2e6}, k=lambda n: 0.5, method="pretrain", run_id="control"),
        law_table(sizes={"m": 2e6}, k=lambda n: 0.5, mode="greedy", temperature=0.0),
        law_table(sizes={"m": 2e6}, k=lambda n: 0.5, eval_set="code", in_domain=False),
        law_table(sizes={"m": 2e6}, k=lambda n: 0.5, eval_set="word"),
    ]
    mixed = pa.concat_tables([main, *other])
    assert axis_fit(mixed) == axis_fit(main)
    greedy = select_curves(mixed, axis="data", mode="greedy")[0]
    assert [c.label for c in greedy] == ["m"]
    assert select_curves(mixed, axis="data", group_size=16)[1].group_size == 16


def test_kinds_apart_and_together():
    table = law_table(kinds=("base", "instruct"), noise=0.004, runs=2)
    fits = fit.fit_table(table, axes=("data",), n_boot=20, shapes=True)
    assert [(f.axis, f.kind) for f in fits.fits] == [("data", k) for k in ("base", "instruct", "all")]
    both = fits.get("data", "all").joint
    assert [c.label for c in both.curves][:2] == ["xs base", "xs instruct"]
    assert both.parameters["K_max"].value == pytest.approx(K_MAX, rel=0.1)
    assert fits.get("data", "all").laws == ()
    assert fits.get("data", "all").held_out == ()
    largest = [h for h in fits.get("data", "base").held_out if h.test == "largest size"]
    assert {h.target for h in largest} == {"l", "xl"}
    assert {f.law for f in fits.get("data", "base").laws} == set(laws.CURVES) - {"loglinear"}
    assert [c.test for c in fits.get("data", "base").choices] == ["largest size", "late steps"]
    with pytest.raises(ValueError, match="no fit of"):
        fits.get("data", "chat")


def test_rows_that_cannot_be_used_are_counted():
    table = law_table(noise=0.005)
    broken = edit(table, lambda r: r | {"loss": None} if r["size"] == "m" and r["step"] in STEPS[:2] else r)
    got = axis_fit(broken)
    assert got.left_out == ("m: 2 rows whose loss or prompts_seen is null, not finite or not above 0",)
    assert next(c for c in got.joint.curves if c.label == "m").num_points == len(STEPS) - 2


def test_wrong_arguments_are_named():
    table = law_table()
    for options, message in (
        ({"axis": "time"}, "axis must be one of"),
        ({"axis": "data", "kind": "chat"}, "no in-domain rows"),
        ({"axis": "data", "eval_set": "chess"}, "no rows with method 'grpo'.*'chess'"),
        ({"axis": "data", "params": "billions"}, "params must be one of"),
        ({"axis": "data", "params": "nominal"}, "params_nominal: run 'xs-base-0' of size 'xs' has None"),
        ({"axis": "data", "min_step": 0}, "min_step must be at least 1"),
        ({"axis": "data", "objective": "cubic"}, "objective must be one of"),
        ({"axis": "data", "n_boot": 3}, "n_boot must be at least 20"),
    ):
        with pytest.raises(ValueError, match=message):
            fit.fit_axis(table, **options)
    with pytest.raises(ValueError, match="table: no column tau"):
        fit.fit_axis(table.drop_columns(["tau"]), axis="data")
    with pytest.raises(ValueError, match=r"temperature: the rows have \[0.7, 1.0\]; name one"):
        axis_fit(pa.concat_tables([table, law_table(temperature=1.0)]))
    with pytest.raises(ValueError, match="two rows at step"):
        axis_fit(pa.concat_tables([table, table]))
    with pytest.raises(ValueError, match="form must be one of"):
        fit.fit_joint(select_curves(table, axis="data")[0], axis="data", form="cubic")
    zero = edit(table, lambda r: r | {"loss": 0.0} if r["step"] == STEPS[-1] else r)
    with pytest.raises(ValueError, match="objective 'log': size 'xs' has a mean loss of 0"):
        axis_fit(zero, objective="log")


# ------------------------------------------------------------------------------------------ fits.json


def test_fits_json_round_trip(tmp_path):
    table = law_table(kinds=("base", "instruct"), runs=2, noise=0.01)
    fits = fit.fit_table(table, axes=["data"], n_boot=20)
    path = tmp_path / "fits.json"
    fit.write_fits(path, fits)
    assert fit.read_fits(path) == fits
    obj = json.loads(path.read_text())
    assert obj["schema"] == jsonl.SCHEMA
    assert obj["fits"][0]["joint"]["verdict"]["ok"] in (True, False)
    assert obj["fits"][0]["verdict"].keys() == {"ok", "why", "cautions"}


def test_fits_json_of_data_that_identify_nothing(tmp_path):
    fits = fit.fit_table(law_table(sizes={"m": 2e6}), axes=["data"], n_boot=20)
    fit.write_fits(tmp_path / "fits.json", fits)
    again = fit.read_fits(tmp_path / "fits.json")
    assert again == fits and not again.fits[0].verdict.ok


@pytest.mark.parametrize("schema", [1, 2])
def test_fits_json_of_a_former_schema(tmp_path, schema):
    fits = fit.fit_table(law_table(sizes=THREE), axes=["data"], n_boot=20, shapes=False)
    path = tmp_path / "fits.json"
    fit.write_fits(path, fits)
    obj = json.loads(path.read_text())
    former = {"schema": schema, "objective": obj["objective"], "fits": obj["fits"]}
    for f in former["fits"]:
        del f["curves"], f["at_one_x"]
    path.write_text(json.dumps(former).replace('"confidence":', '"level":').replace('"intercepts":', '"levels":'))
    read = fit.read_fits(path)
    assert read.fits[0] == dataclasses.replace(fits.fits[0], curves=(), at_one_x=None)
    assert (read.records, read.claims, read.surfaces, read.reuse, read.other_sets) == ("", (), (), (), ())


def test_fits_json_of_earlier_versions(tmp_path):
    """They say level for a confidence and for an intercept."""
    table = law_table(noise=0.01)
    fits = fit.fit_table(table, axes=["data"], n_boot=20)
    path = tmp_path / "fits.json"
    fit.write_fits(path, fits)
    assert fits.fits[0].intercepts and any(h.tests_only_slope for h in fits.fits[0].held_out)
    text = path.read_text()
    text = text.replace(f'"schema": {jsonl.SCHEMA}', '"schema": 2')
    old = text.replace('"confidence":', '"level":').replace('"intercepts":', '"levels":').replace("intercept", "level")
    assert old.count("level") == text.count("intercept") + text.count('"confidence":') > 10
    path.write_text(old)
    again = fit.read_fits(path)
    assert again.fits[0].intercepts == fits.fits[0].intercepts and again.fits[0].joint == fits.fits[0].joint
    tested = [[h.tests_only_slope for h in f.fits[0].held_out] for f in (again, fits)]
    assert tested[0] == tested[1]


def test_fits_json_that_is_not_ours(tmp_path):
    path = tmp_path / "fits.json"
    fit.write_fits(path, fit.fit_table(law_table(sizes=THREE), axes=["data"], n_boot=20, shapes=False))
    obj = json.loads(path.read_text())
    for change, error, message in (
        (lambda o: o | {"schema": 4}, ValueError, "fits.json: schema must be one of .*, got 4"),
        (lambda o: o | {"extra": 1}, ValueError, "fits.json: Fits has no field extra"),
        (lambda o: o | {"fits": [o["fits"][0] | {"a": 1, "b": 2}]}, ValueError, r"Fits.fits\[0\] has no field a, b"),
        (
            lambda o: o | {"fits": [{"axis": "data"}]},
            ValueError,
            r"Fits.fits\[0\] lacks choices, held_out, intercepts, joint",
        ),
        (lambda o: o | {"objective": 3}, TypeError, "fits.json: Fits.objective must be str, got 3"),
        (lambda o: o | {"fits": [o["fits"][0] | {"kind": None}]}, TypeError, r"Fits.fits\[0\].kind must be str, got None"),
        (lambda o: o | {"fits": [3]}, TypeError, r"Fits.fits\[0\] must be an object, got 3"),
    ):
        path.write_text(json.dumps(change(json.loads(json.dumps(obj)))))
        with pytest.raises(error, match=message):
            fit.read_fits(path)


def test_results_are_frozen():
    e = fit.Estimate(value=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.value = 2.0
