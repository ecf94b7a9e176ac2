"""Cost by phase: sums, the rest of the wall-clock, and the table."""

import pytest

from grpo_engine.records.cost import COST_HEAD, cost_rows, mean_cost, total_cost
from grpo_engine.records.records import PhaseCost, TimingRecord


def step(number, wall, **phases):
    return TimingRecord(step=number, seconds=wall, phase={n: PhaseCost(**c) for n, c in phases.items()})


STEPS = [
    step(1, 2.0, forward={"seconds": 0.5, "tokens": 10, "flops": 1e9}, reward={"seconds": 0.25}),
    step(2, 1.0, forward={"seconds": 0.5, "tokens": 30, "flops": 3e9}, checkpoint={"seconds": 0.25}),
]


def test_what_is_not_booked_is_shown_as_other():
    cost = total_cost(STEPS)
    assert list(cost) == ["forward", "reward", "checkpoint", "other"]
    assert cost["forward"] == PhaseCost(seconds=1.0, tokens=40, flops=4e9)
    assert cost["other"].seconds == pytest.approx(3.0 - 1.5)
    assert sum(c.seconds for c in cost.values()) == pytest.approx(3.0)


def test_records_without_wall_clock_have_no_other():
    assert "other" not in total_cost([*STEPS, step(3, None, forward={"seconds": 1.0})])
    assert total_cost([]) == {}


def test_the_mean_counts_a_phase_that_a_run_lacks_as_nothing():
    mean = mean_cost([total_cost(STEPS), total_cost(STEPS[:1])])
    assert mean["forward"] == PhaseCost(seconds=0.75, tokens=25, flops=2.5e9)
    assert mean["checkpoint"].seconds == 0.125


def test_rows_hold_shares_and_rates():
    rows = cost_rows(total_cost(STEPS))
    assert all(len(row) == len(COST_HEAD) for row in rows)
    assert rows[0] == ("forward", "1.00", "33.3%", "40", "4e+09", "4.0")
    assert rows[1] == ("reward", "0.25", "8.3%", "", "", "")
    assert rows[-1] == ("all", "3.00", "100.0%", "40", "4e+09", "1.3")
