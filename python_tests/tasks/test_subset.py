"""Fewer problems of the same difficulty."""

import collections

import pytest

from grpo_engine.tasks.subset import difficulty, subset
from grpo_engine.types import Problem

RATES = [k / 16 for k in range(11, 0, -1) for _ in range(60)] + [0.0] * 440  # sorted as the paper's files are


def problems(rates=RATES, grades=False):
    return [
        Problem(uid=f"p{i}", prompt="?", answer="1", domain="math", reward="math", grade=int(r) if grades else None,
                info={} if grades else {"pass_rate": r})
        for i, r in enumerate(rates)
    ]  # fmt: skip


def uids(chosen):
    return [int(p.uid[1:]) for p in chosen]


@pytest.mark.parametrize("how", ["nested", "independent"])
@pytest.mark.parametrize("count", [1, 7, 64, 100, 512, 1000, 1099])
def test_a_draw_has_the_mix_of_the_whole_and_its_order(how, count):
    everything = problems()
    chosen = subset(everything, count, seed=3, how=how)
    assert uids(chosen) == sorted(set(uids(chosen))) and len(chosen) == count
    all_of, some = (collections.Counter(p.info["pass_rate"] for p in x) for x in (everything, chosen))
    for rate, total in all_of.items():  # two ends of a stretch of the ranking, each between one gap and two
        assert abs(some[rate] - count * total / len(everything)) <= 4, rate


def test_nested_draws_hold_each_other_and_independent_ones_do_not():
    everything = problems()
    nested = [set(uids(subset(everything, n, seed=1))) for n in (10, 64, 65, 300)]
    assert all(a < b for a, b in zip(nested, nested[1:], strict=False))
    apart = [set(uids(subset(everything, n, seed=1, how="independent"))) for n in (64, 300)]
    assert not apart[0] < apart[1]


def test_a_draw_is_its_seeds():
    everything = problems()
    assert subset(everything, 64, seed=1) == subset(everything, 64, seed=1) != subset(everything, 64, seed=2)


def test_every_problem_is_as_likely():
    everything = problems([0.5] * 20 + [0.25] * 20)
    seen = collections.Counter(u for seed in range(2000) for u in uids(subset(everything, 8, seed=seed)))
    assert set(seen) == set(range(40)) and all(abs(n - 400) < 5 * 18 for n in seen.values())  # sd 17.9


def test_grades_and_unknown_difficulties():
    graded = problems([0, 1, 2, 3] * 50, grades=True)
    assert {p.grade: 0 for p in graded}.keys() == {difficulty(p) for p in graded}
    counts = collections.Counter(p.grade for p in subset(graded, 40, seed=0))
    assert all(abs(n - 10) <= 2 for n in counts.values())
    unknown = [Problem(uid=f"p{i}", prompt="?", answer="1", domain="math", reward="math") for i in range(9)]
    assert len(subset(unknown, 4, seed=0)) == 4 and subset(unknown, 9, seed=0) == unknown == subset(unknown, 12, seed=0)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        subset(unknown, 0, seed=0)
