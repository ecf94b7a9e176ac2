"""Verdicts on synthetic studies whose truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic_study import make_study, true_loss

from grpo_engine.study.claims import _decide, _Pair, _runs_needed, study_claims
from grpo_engine.study.design import AxesConfig
from grpo_engine.study.report import load_data

MAIN = AxesConfig(kinds=("base", "instruct"), seeds=(0, 1, 2))
ABLATED = (
    AxesConfig(sizes=("s",), kinds=("base",), seeds=(0, 1, 2), name="reuse", tau=(2.0, 200.0)),
    AxesConfig(sizes=("s",), kinds=("base",), seeds=(0, 1, 2), name="group", group_size=(4, 16)),
)


def claims_of(folder, **options):
    make_study(folder, **({"axes": (MAIN,), "steps": 40, "counted": True, "spread": 0.004} | options))
    return {c.name: c for c in study_claims(load_data(folder), draws=1000)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return claims_of(tmp_path_factory.mktemp("whole"), axes=(MAIN, *ABLATED), sizes=("xxs", "s", "l"))


def test_what_there_is_to_compare(whole):
    assert list(whole) == [
        "larger at fixed compute", "larger at fixed data", "larger along the ladder at fixed data", "reuse is free",
        "base and instruct alike", "transfer", "larger groups at equal prompts", "larger groups at equal compute",
    ]  # fmt: skip
    for c in whole.values():
        assert c.verdict in ("supported", "not supported", "undecided")
        for one in c.comparisons:
            assert one.effect.low <= one.effect.value <= one.effect.high
            assert one.confidence == pytest.approx(1 - 0.05 / len(c.comparisons) * (1 if c.test == "superiority" else 2))


def test_larger_models_are_better_at_fixed_data(whole):
    claim = whole["larger at fixed data"]
    assert claim.verdict == "supported" and len(claim.comparisons) == 4
    first = next(c for c in claim.comparisons if c.label == "l against s, base")
    truth = true_loss(74_300, 64 * 40) - true_loss(985_000, 64 * 40)
    assert first.effect.low < truth < first.effect.high
    assert first.runs == (3, 3) and first.runs_needed is None


def test_loss_falls_along_the_ladder_at_fixed_data(whole):
    claim = whole["larger along the ladder at fixed data"]
    assert claim.verdict == "supported" and [c.label for c in claim.comparisons] == [
        f"ten times the parameters, xxs to l, {kind}" for kind in ("base", "instruct")
    ]
    sizes = np.log10([6288, 74_304, 985_376])
    truth = -np.polyfit(sizes, [true_loss(round(10**n), 64 * 40) for n in sizes], 1)[0]
    for c in claim.comparisons:
        assert c.effect.low < truth < c.effect.high


def test_little_reuse_costs_little_and_much_costs_much(whole):
    """The synthetic study loses the tenth root of tau in prompts."""
    claim = whole["reuse is free"]
    assert [c.label for c in claim.comparisons] == ["tau 2 against 1, s base", "tau 200 against 1, s base"]
    much = claim.comparisons[1]
    truth = true_loss(74_300, 64 * 40) - true_loss(74_300, 64 * 40 / 200**0.1)
    assert much.effect.low < truth < much.effect.high
    assert claim.why.startswith(("free up to tau", "no reuse is shown to be free"))


def test_sets_that_gain_and_one_that_loses(whole):
    claim = whole["transfer"]
    verdicts = {c.label.split(" ")[0]: c.verdict for c in claim.comparisons if "base" in c.label}
    assert verdicts["chain"] == "supported"
    assert verdicts["logic"] == "not supported"  # RL makes it worse there
    assert claim.verdict == "not supported"


def test_equal_groups_are_not_shown_to_be_better(whole):
    """In the synthetic study the group size changes nothing."""
    claim = whole["larger groups at equal prompts"]
    assert claim.verdict != "supported"
    assert all(abs(c.effect.value) < 0.02 for c in claim.comparisons)


def test_a_difference_that_is_not_significant_supports_nothing(tmp_path):
    """Runs that scatter widely: alike is not shown by failing to see a difference."""
    noisy = claims_of(tmp_path, sizes=("xs",), spread=0.1)["base and instruct alike"]
    assert noisy.verdict == "undecided"
    (one,) = noisy.comparisons
    assert one.effect.high - one.effect.low > 0.2
    assert one.note and (one.runs_needed is None or one.runs_needed > 3)


def test_one_run_decides_nothing(tmp_path):
    single = AxesConfig(kinds=("base",), seeds=(0,))
    claim = claims_of(tmp_path, axes=(single,), sizes=("xs", "m"))["larger at fixed data"]
    assert claim.verdict == "undecided"
    assert "spread between seeds is unknown" in claim.comparisons[0].note


def test_claims_at_prompts_that_a_log_does_not_tell_are_left_out(tmp_path):
    make_study(tmp_path / "s", sizes=("xs", "m"), axes=(AxesConfig(seeds=(0, 1)),), steps=10)
    data = load_data(tmp_path / "s")
    runs = {n: replace(r, evals=[replace(e, prompts_seen=math.nan) for e in r.evals]) for n, r in data.runs.items()}
    assert [c.name for c in study_claims(replace(data, runs=runs), draws=100)] == ["larger at fixed compute"]


def test_pairing_over_problems_narrows_the_interval(tmp_path):
    """Both sides answered the same problems; without their counts the difference is treated as of two sets."""
    options = {"sizes": ("xs", "s"), "spread": 0.001, "axes": (AxesConfig(seeds=(0, 1, 2)),)}
    widths = []
    for counted in (True, False):
        claim = claims_of(tmp_path / str(counted), counted=counted, **options)["larger at fixed data"]
        e = claim.comparisons[0].effect
        widths.append(e.high - e.low)
    assert widths[0] < 0.8 * widths[1]


@pytest.mark.parametrize(
    ("low", "high", "test", "want"),
    [
        (0.001, 0.2, "superiority", "supported"),
        (-0.01, 0.2, "superiority", "undecided"),
        (-0.01, 0.015, "superiority", "not supported"),
        (-0.015, 0.01, "non-inferiority", "supported"),
        (-0.03, 0.01, "non-inferiority", "undecided"),
        (-0.05, -0.03, "non-inferiority", "not supported"),
        (-0.01, 0.01, "equivalence", "supported"),
        (0.001, 0.01, "equivalence", "supported"),  # a difference, and too small to matter
        (-0.03, 0.01, "equivalence", "undecided"),
        (0.03, 0.05, "equivalence", "not supported"),
    ],
)
def test_verdicts(low, high, test, want):
    assert _decide(low, high, test, 0.02) == want


def test_how_many_runs_would_decide():
    """An effect of 0.01 against 0 with a variance a run of 0.01^2 and nothing else: half-width 1.96 * 0.01 / sqrt(r)."""
    nothing = np.zeros(1000)
    pair = _Pair(label="", effect=0.01, lasting=nothing, draws=nothing, runs=(2, 2), per_run=1e-4)
    needed, note = _runs_needed(pair, "superiority", 0.02, 0.95)
    assert needed == 4 and note.startswith("4 runs a side")  # (1.96 * 0.01 / 0.01)^2 = 3.84
    few_problems = replace(pair, lasting=np.random.default_rng(0).normal(0, 0.05, 1000))
    assert _runs_needed(few_problems, "superiority", 0.02, 0.95)[1].startswith("more runs would not decide")
    loud = replace(pair, per_run=1.0)
    assert _runs_needed(loud, "superiority", 0.02, 0.95) == (None, "over 100 runs a side would be needed")
