"""Recommendations from fits of planted laws: the right pick, and silence where there is none."""

import numpy as np
import pyarrow as pa
import pytest
from law_tables import BATCH, SIZES, TOKENS, k_saturating, law_table

from grpo_engine.study.design import load_study, plan, save_study
from grpo_engine.study.fits import planned_runs
from grpo_engine.study.forecast import num_params, pace
from grpo_engine.study.laws import fit
from grpo_engine.study.recommend import assumed_run, frontier, recommend

LAST = 6400.0  # prompts at the last step


def fitted(axis="data", *, n_boot=60, **options):
    return fit.fit_axis(law_table(**({"noise": 0.004, "runs": 2} | options)), axis=axis, n_boot=n_boot, shapes=False)


def planted(i, x):
    """Loss of size number i at x prompts."""
    return (0.9 - 0.1 * i) * (x / BATCH) ** -k_saturating(list(SIZES.values())[i])


@pytest.fixture(scope="module")
def data_fit():
    return fitted()


def test_picks_the_smallest_loss_for_a_number_of_prompts(data_fit):
    r = recommend(data_fit, prompts=5000)
    assert (r.pick, r.decided, r.tied) == ("xl", True, ())
    assert [c.label for c in r.candidates] == ["xl", "l", "m", "s", "xs"]
    for c in r.candidates:
        i = list(SIZES).index(c.label)
        assert c.loss.value == pytest.approx(planted(i, 5000), abs=0.005)
        assert c.loss.low < planted(i, 5000) < c.loss.high
        assert c.steps == pytest.approx(5000 / BATCH)
        assert c.compute == pytest.approx(6 * c.params * TOKENS * 5000)
        assert c.measured and c.notes == ()
    assert r.candidates[0].behind is None and r.candidates[0].best_share == 1.0
    gap = r.candidates[1].behind
    assert gap.low < planted(3, 5000) - planted(4, 5000) < gap.high
    text = r.render_text()
    assert text.startswith("Train xl: 5e+03 prompts, 78 steps, predicted test loss 0.2")
    assert "runs at every curve" in text
    assert len(text.splitlines()) == 4 + len(SIZES)


def test_compute_budget_buys_different_data_for_each_size():
    """With intercepts that hardly differ, a small model that sees a hundred times the data wins."""
    table = law_table(noise=0.002, runs=2, k=lambda n: 0.1)
    rows = [r | {"loss": 0.9 * max(r["step"], 1) ** -0.1} for r in table.to_pylist()]
    got = fit.fit_axis(pa.Table.from_pylist(rows, schema=table.schema), axis="compute", n_boot=20, shapes=False)
    budget = 6 * 2e5 * TOKENS * LAST
    r = recommend(got, compute=budget)
    assert r.pick == "xs"
    small, big = r.candidates[0], next(c for c in r.candidates if c.label == "xl")
    assert small.prompts == pytest.approx(LAST) and small.steps == pytest.approx(LAST / BATCH)
    assert big.prompts == pytest.approx(LAST / 100)
    assert not r.decided and "do not identify the law" in r.why  # one slope for all sizes does not tell N0


def test_budget_in_the_unit_of_the_other_axis():
    data, compute = fitted(), fitted("compute")
    a = recommend(data, compute=6 * 2e7 * TOKENS * 3000)
    b = recommend(compute, prompts=3000)
    xl = [next(c for c in r.candidates if c.label == "xl") for r in (a, b)]
    for c in xl:
        assert c.prompts == pytest.approx(3000)
        assert c.loss.value == pytest.approx(planted(4, 3000), abs=0.006)


def test_candidates_that_cannot_be_told_apart():
    """Two sizes whose planted curves coincide."""
    sizes = {"s": 6e5, "m": 2e6, "l": 6e6, "twin": 6.3e6}
    table = law_table(sizes=sizes, noise=0.01, runs=2)
    same = {r["step"]: r["loss"] for r in law_table(sizes=sizes).to_pylist() if r["size"] == "l"}
    rng = np.random.default_rng(1)
    rows = [
        r | {"loss": same[r["step"]] + rng.normal(0, 0.01)} if r["size"] in ("l", "twin") else r for r in table.to_pylist()
    ]
    got = fit.fit_axis(pa.Table.from_pylist(rows, schema=table.schema), axis="data", n_boot=60, shapes=False)
    r = recommend(got, prompts=1000)
    assert {r.pick, *r.tied} == {"l", "twin"}
    assert not r.decided
    assert "cannot tell" in r.why and "The smallest of them, l," in r.why
    assert r.render_text().startswith("No size is established as the best; the law's guess is")
    assert 0.0 < r.candidates[0].best_share < 1.0
    assert sum(c.best_share for c in r.candidates) == pytest.approx(1.0)


def test_beyond_the_measured_data_is_said(data_fit):
    r = recommend(data_fit, prompts=10 * LAST)
    assert not r.decided
    assert "10 times beyond the last measured point, and the law has no floor" in r.why
    early = recommend(data_fit, prompts=16)
    assert any("before the first measured point by a factor of 4" in n for n in early.candidates[0].notes)
    assert not recommend(fitted(start=0.99), prompts=1e-3, sizes={"xs": 2e5}).decided
    above = recommend(fitted(start=0.99), prompts=1e-60, sizes={"xl": 2e7})
    assert any("a loss above 1 does not exist" in n for n in above.candidates[0].notes)


def test_size_that_was_not_measured(data_fit):
    n = float(np.sqrt(2e6 * 6e6))
    r = recommend(data_fit, prompts=3000, sizes={"between": n, "m": 2e6, "l": 6e6})
    c = next(c for c in r.candidates if c.label == "between")
    truth = (0.9 - 0.25) * (3000 / BATCH) ** -k_saturating(n)  # intercepts are equally far apart in log N here
    assert not c.measured and c.loss.low < truth < c.loss.high
    assert c.loss.value == pytest.approx(truth, abs=0.02)
    assert c.compute == pytest.approx(6 * n * TOKENS * 3000)
    assert c.steps == pytest.approx(3000 / BATCH)
    measured = next(c for c in r.candidates if c.label == "m")
    assert c.loss.high - c.loss.low > measured.loss.high - measured.loss.low
    far = recommend(data_fit, prompts=3000, sizes={"xl": 2e7, "xxl": 6e7})
    assert far.pick == "xxl" and not far.decided
    assert "not measured, beyond the measured N" in far.why


def test_unmeasured_size_of_a_kind():
    got = fitted(kinds=("base", "instruct"))
    n = float(np.sqrt(2e6 * 6e6))
    with pytest.raises(ValueError, match=r"kind: must be one of \['base', 'instruct'\] for a size"):
        recommend(got, prompts=3000, sizes={"between": n})
    with pytest.raises(ValueError, match="kind: must be one of .* got 'chat'"):
        recommend(got, prompts=3000, sizes={"between": n}, kind="chat")
    base, instruct = (recommend(got, prompts=3000, sizes={"q": n}, kind=k).candidates[0] for k in ("base", "instruct"))
    assert instruct.loss.value < base.loss.value - 0.02
    assert recommend(got, prompts=3000).pick == "xl instruct"


def test_law_that_the_data_do_not_identify():
    got = fitted(sizes={"s": 6e5, "m": 2e6})
    r = recommend(got, prompts=3000)
    assert r.pick == "m" and not r.decided
    assert "The data do not identify the law: 2 sizes" in r.why
    with pytest.raises(ValueError, match="no joint law to recommend from: 1 size"):
        recommend(fitted(sizes={"m": 2e6}), prompts=3000)


def test_wrong_arguments_are_named(data_fit):
    for options, message in (
        ({}, "exactly one must be given, got none"),
        ({"compute": 1e12, "prompts": 10}, "exactly one"),
        ({"hours": 3}, "gpu: must be one of .* with hours, got None"),
        ({"hours": 3, "gpu": "abacus"}, "gpu must be one of .* got 'abacus'"),
        ({"hours": -3, "gpu": "h100"}, "hours: must be positive and finite, got -3"),
        ({"hours": 3, "gpu": "h100", "num_gpus": 0}, "num_gpus: must be at least 1, got 0"),
        ({"target_loss": 1.0}, "target_loss: must be below 1, got 1.0"),
        ({"prompts": 10, "unique_prompts": 0}, "unique_prompts: must be at least 1, got 0"),
        ({"prompts": 0}, "prompts: must be positive and finite, got 0"),
        ({"compute": float("inf")}, "compute: must be positive and finite, got inf"),
        ({"prompts": 10, "sizes": {}}, "at least one candidate"),
        ({"prompts": 10, "sizes": {"m": 3e6}}, r"m was measured with 2e\+06 parameters, got 3e\+06"),
        ({"prompts": 10, "sizes": {"q": -1}}, "q must have a positive number of parameters, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            recommend(data_fit, **options)
    with pytest.raises(ValueError, match="axis must be 'compute' or 'data', got 'tokens'"):
        recommend(fitted("tokens", n_boot=20), prompts=10)
    blind = fitted(compute_6nt=None, n_boot=20)
    assert recommend(blind, prompts=3000).candidates[0].compute is None
    with pytest.raises(ValueError, match="compute a prompt of xs is unknown"):
        recommend(blind, compute=1e12)


def test_target_loss_takes_the_least_compute(data_fit):
    """The law solved for its data, and each size's own price of a prompt."""
    target = 0.45
    r = recommend(data_fit, target_loss=target, unique_prompts=800)
    price = {}
    for i, n in enumerate(SIZES.values()):
        prompts = BATCH * ((0.9 - 0.1 * i) / target) ** (1 / k_saturating(n))
        price[list(SIZES)[i]] = (prompts, 6 * n * TOKENS * prompts)
    assert r.pick == min(price, key=lambda s: price[s][1])
    for c in r.candidates:
        prompts, compute = price[c.label]
        if prompts < 1e6:  # beyond, a small error of k is a large one of the compute
            assert c.needs.low < compute < c.needs.high
            assert c.needs.value == pytest.approx(compute, rel=0.2)
            assert c.prompts == pytest.approx(c.compute / (6 * c.params * TOKENS))
            assert c.tokens == pytest.approx(TOKENS * c.prompts)
            assert c.reuse == pytest.approx(c.prompts / 800)
            assert c.loss.value == target
    assert r.candidates[1].behind.value == pytest.approx(np.log(r.candidates[1].needs.value / r.candidates[0].needs.value))
    assert "needs" in r.render_text() and r.group_size == 8
    never = recommend(data_fit, target_loss=1e-6)
    assert not never.decided and any("beyond the last measured point" in w for w in never.distrust)


@pytest.fixture(scope="module")
def paper_study(tmp_path_factory):
    """The paper's plan on an H200, its folder, and a law over its sizes."""
    study = load_study("paper", ["estimate.gpu=h200"])
    folder = tmp_path_factory.mktemp("paper")
    save_study(study, folder / "study.yaml")
    the_plan = plan(study)
    cells = [c for c in the_plan.cells if (c.kind, c.tau, c.variant, c.seed) == ("base", 1, "", 0)]
    sizes = {c.size: num_params(c.config.model) for c in cells}
    table = law_table(sizes=sizes, noise=0.004, runs=2, group_size=cells[0].group_size)
    return cells, folder, fit.fit_axis(table, axis="compute", kind="base", n_boot=20, shapes=False)


def test_plan_and_recommendation_give_one_run_the_same_time(paper_study):
    """`study plan --gpu h200` and `recommend --gpu h200` on each cell of the ladder, in both directions."""
    cells, folder, law = paper_study
    runs = planned_runs(folder, law)
    assert len(cells) == len(runs) >= 4
    for cell in cells:
        compute = 6.0 * num_params(cell.config.model) * cell.cost.trained_tokens
        hours = cell.cost.seconds / 3600
        for budget in ({"compute": compute}, {"hours": hours}, {"hours": hours / 8, "num_gpus": 8}):
            answer = recommend(law, gpu="h200", runs=runs, **budget)
            (c,) = [c for c in answer.candidates if c.label == cell.size]
            assert c.hours * budget.get("num_gpus", 1) == pytest.approx(hours, rel=1e-9), cell.name
            assert c.compute == pytest.approx(compute, rel=1e-9), cell.name


def test_the_memory_of_the_pick_is_that_of_the_plan(paper_study):
    cells, folder, law = paper_study
    runs = planned_runs(folder, law)
    for cell in cells:
        small = {cell.size: num_params(cell.config.model)}
        for count, fits in ((cell.cost.devices, True), (cell.cost.devices // 2, False)):
            if count:
                found = recommend(law, compute=1e20, gpu="h200", num_gpus=count, runs=runs, sizes=small)
                assert any("GB to train" in why for why in found.distrust) is not fits, (cell.name, count)


def test_hours_without_a_plan_are_those_of_a_run_that_is_assumed(data_fit):
    r = recommend(data_fit, gpu="h200", hours=1e-6, num_gpus=2)
    run = assumed_run(data_fit, "m", 2e6)
    assert (run.config.batch.prompts, run.config.batch.group_size) == (BATCH, 8)
    assert run.estimate.prompt_tokens + run.estimate.response_tokens - 1 == pytest.approx(TOKENS / 8)
    timing = pace(run.config, run.estimate.model_copy(update={"gpu": "h200"}), params=2_000_000)
    (m,) = [c for c in r.candidates if c.label == "m"]
    assert m.compute == pytest.approx(timing.compute(2 * 3600e-6)) and m.hours == pytest.approx(1e-6)
    assert (r.budget, r.amount) == ("hours", 1e-6) and not any("GB" in w for w in r.distrust)
    text = r.render_text()
    assert "1e-06 hours" in text and " FLOPs, " in text.splitlines()[0] and "hours  loss" in text
    assert recommend(data_fit, prompts=3000).candidates[0].hours is None
    huge = recommend(data_fit, prompts=3000, sizes={"70b": 70e9}, gpu="h200")
    assert any("needs 1260 GB to train, and a run may fill 127 GB of 1 x h200" in w for w in huge.distrust)


def test_hours_that_end_before_a_first_step_are_said(paper_study):
    cells, folder, law = paper_study
    runs = planned_runs(folder, law)
    fixed = [pace(r.config, r.estimate).fixed_seconds / 3600 for r in (runs[c.size] for c in cells)]
    r = recommend(law, gpu="h200", hours=(fixed[0] + fixed[-1]) / 2, runs=runs)
    assert cells[-1].size not in [c.label for c in r.candidates]
    assert any(f"before a first step: {cells[-1].size}'s" in why or f", {cells[-1].size}'s" in why for why in r.distrust)
    with pytest.raises(ValueError, match="hours: too few for a first step, got 1e-06"):
        recommend(law, gpu="h200", hours=1e-6, runs=runs)


def test_frontier_moves_to_larger_models():
    """Models that start alike: the small one, which has seen a hundred times the data, is ahead first."""
    table = law_table(noise=0.002, runs=2)
    rows = [r | {"loss": 0.9 * max(r["step"], 1) ** -k_saturating(r["params_non_embedding"])} for r in table.to_pylist()]
    got = fit.fit_axis(pa.Table.from_pylist(rows, schema=table.schema), axis="compute", n_boot=20, shapes=False)
    points = frontier(got, count=7)
    assert [p.compute for p in points] == sorted(p.compute for p in points)
    assert all(p.params_span[0] <= p.params <= p.params_span[1] for p in points)
    assert points[0].params < points[-1].params
    for p in points:
        assert p.loss == recommend(got, compute=p.compute).candidates[0].loss


def test_reasons_not_to_trust(data_fit):
    assert recommend(data_fit, prompts=5000).distrust == ()
    again = recommend(data_fit, prompts=5000, unique_prompts=1000)
    assert again.distrust == ("Each prompt would be seen 5 times, and the law was fitted to runs with a reuse of 1.",)
    assert "each prompt 5 times" in again.render_text() and "Do not trust this: Each prompt" in again.render_text()


def test_same_answer_twice(data_fit):
    sizes = {"l": 6e6, "q": 1e7}
    assert recommend(data_fit, prompts=3000, sizes=sizes) == recommend(data_fit, prompts=3000, sizes=sizes)
