"""The benchmarks' own arithmetic, and that a wrong answer is refused."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import models
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # benchmarks is no part of the wheel

from benchmarks import limits, run, shapes, table  # noqa: E402
from benchmarks.bench_scaling import exponent  # noqa: E402
from benchmarks.lengths import answer_lengths  # noqa: E402
from benchmarks.peers import optional  # noqa: E402
from grpo_engine.config import RolloutConfig  # noqa: E402
from grpo_engine.rollout import generate  # noqa: E402

ONES = torch.ones(3)


def case(**changes):
    settings = {
        "name": "three ones",
        "ours": lambda: ONES + 0,
        "peers": {"peer": lambda: ONES * 1},
        "expected": lambda: ONES.double(),
        "tolerance": 1e-6,
        "nbytes": 12.0,
    }
    return table.Case(**{**settings, **changes})


def measured(one):
    return table.run_case(one, timer=limits.HostTimer(time.perf_counter, "perf_counter"), repeats=3, budget_s=1.0)


def test_every_op_has_a_benchmark():
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    listed = out.stdout.split()
    operators = {p.stem for p in (ROOT / "csrc" / "ops").glob("*.cpp") if p.with_suffix(".h").exists()}
    assert operators <= set(listed) and {"training", "rollout", "step", "scaling"} <= set(listed)
    assert listed == run.names()


@pytest.mark.parametrize("who", ["ours", "peer"])
def test_a_wrong_answer_is_refused_and_named(who, tmp_path):
    wrong = "lambda: ONES * 1.001"
    script = tmp_path / "bench_wrong.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch\nfrom benchmarks.table import Case, main\nONES = torch.ones(3)\n"
        f"ours, peer = {wrong if who == 'ours' else 'lambda: ONES'}, {wrong if who == 'peer' else 'lambda: ONES'}\n"
        "case = Case(name='three ones', ours=ours, peers={'peer': peer}, expected=lambda: ONES, tolerance=1e-6)\n"
        "main('wrong', lambda quick: [case], argv=['--quick'])\n"
    )
    out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert out.returncode == 1 and out.stdout == ""
    assert f"wrong: three ones: {who} is wrong: error 0.001, allowed 1e-06" in out.stderr


def test_a_check_of_its_own_refuses_too():
    def check(who, result):
        if who == "peer":
            raise table.WrongAnswer("no")

    with pytest.raises(table.WrongAnswer, match="three ones: peer is wrong: no"):
        measured(case(check=check))


def test_a_file_prints_a_table_and_ends_with_its_record(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_group_advantages.py"), "--quick", "--case", "4096"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    record = json.loads(out.stdout.splitlines()[-1])
    (row,) = record["cases"]
    assert row["case"] in out.stdout and row["bits_1_vs_2_threads"] and row["batch_invariant"]
    assert row["ours"]["min_s"] <= row["ours"]["q1_s"] <= row["ours"]["median_s"] <= row["ours"]["max_s"]
    assert {"hardware", "versions", "commit", "load", "limits"} <= set(record)


def test_a_missing_or_failing_peer_is_named_and_skipped():
    def broken():
        raise RuntimeError("out of luck")

    row = measured(case(peers={"absent": optional("no_such_package", lambda: None), "broken": broken}))
    assert row["peers"]["absent"] == {"missing": "not installed"}
    assert row["peers"]["broken"] == {"missing": "failed: RuntimeError: out of luck"}
    fast = limits.Limits(sgemm_torch=1e9, sgemm_ours=2e9, read=1e9)
    record = {"unit": "us", "cases": [table.place(row, fast)], "geometric_mean": {}}
    assert "not installed" in table.markdown(record) and "out of luck" in table.markdown(record)


def test_bits_are_computed():
    state = iter(range(100))
    row = measured(case(bits=lambda: torch.tensor(next(state)), alone=lambda whole: bool((whole == 2).all())))
    assert row["bits_1_vs_2_threads"] is False and row["batch_invariant"] is False
    row = measured(case(alone=lambda whole: bool((whole == 1).all())))
    assert row["bits_1_vs_2_threads"] is True and row["batch_invariant"] is True


@pytest.mark.parametrize(
    "got, want, error",
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([math.nan, 2.0], [1.0, 2.0], math.inf),
        ([math.nan, 2.0], [math.nan, 2.0], 0.0),
        ([math.inf, 2.0], [-math.inf, 2.0], math.inf),
        ([1.0], [1.0, 2.0], math.inf),
    ],
)
def test_relative_error(got, want, error):
    assert table.relative_error(torch.tensor(got), torch.tensor(want)) == error


def test_the_roof_is_the_slower_limit_and_shares_follow():
    fast = limits.Limits(sgemm_torch=100.0, sgemm_ours=200.0, read=10.0)
    assert fast.roof(flops=400.0, nbytes=10.0) == (2.0, "compute")
    assert fast.roof(flops=100.0, nbytes=10.0) == (1.0, "memory")
    row = table.place({"ours": {"median_s": 4.0}, "flops": 400.0, "nbytes": 10.0}, fast)
    assert row["share"] == 0.5 and row["bound"] == "compute" and row["gflops"] == pytest.approx(1e-7)


def test_functions_are_timed_in_turns():
    calls, ticks = [], iter(range(1000))
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    samples = limits.interleave(runs, clock=lambda: float(next(ticks)), repeats=3, budget_s=60.0)
    assert calls == ["a", "b"] + ["a", "b"] * 3
    assert samples == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_geometric_means_leave_missing_peers_out():
    rows = [{"peers": {"x": {"ratio": 2.0}, "y": {"missing": "not installed"}}}, {"peers": {"x": {"ratio": 8.0}}}]
    assert table.geometric_means(rows) == {"x": pytest.approx(4.0)}


@pytest.mark.parametrize("count, mean", [(32, 16), (256, 24), (64, 512)])
def test_log_normal_lengths_are_what_they_say(count, mean):
    lengths = torch.tensor(shapes.log_normal_lengths(count, mean)).double()
    assert lengths.max() / lengths.median() == pytest.approx(8, rel=0.08)  # rounded to whole tokens
    assert lengths.sum() == pytest.approx(count * mean, rel=0.02)


def test_the_exponent_finds_a_quadratic_term():
    size = [1.0, 4.0, 16.0, 64.0]
    assert exponent(size, [3 * x for x in size]) == pytest.approx(1)
    assert exponent(size, [10 + x**2 for x in size]) > 1.5


def test_answers_get_the_lengths_asked_for():
    model = models.random_model()
    lengths = [3, 1, 5]
    with answer_lengths(lengths):
        out = generate(
            model, [[1, 2]] * 3, group_size=2, seeds=torch.arange(6), stop_ids=(), config=RolloutConfig(max_new_tokens=5)
        )
    assert (out.cu_seqlens.diff() - 2).tolist() == [3, 3, 1, 1, 5, 5]
