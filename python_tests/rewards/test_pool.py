"""The pool: no verifier hangs a run or ends it."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from grpo_engine import rewards
from grpo_engine.rewards.pool import RewardPool
from grpo_engine.types import Problem, Reward

BAD = ("good", "hang", "hang_in_c", "leave", "segfault", "memory", "unpicklable", "leave_politely", "no_reward",
       "torch_is_imported", "main_is_the_callers", "pid")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def bad_scorers():
    before = dict(rewards.SCORERS)
    for name in BAD:
        rewards.register_scorer(f"bad_{name}", f"bad_scorers:{name}")
    yield
    rewards.SCORERS.clear()
    rewards.SCORERS.update(before)


@pytest.fixture(scope="module")
def pool():
    with RewardPool(workers=2, timeout_s=1.0) as pool:
        yield pool


def problem(reward, answer="7"):
    return Problem(uid=f"t/{reward}", prompt="?", answer=answer, domain="t", reward=reward)


def test_a_hang_costs_one_zero_and_the_order_is_kept(pool):
    responses = ["7", "hang", "8", "7", "hang", "7"]
    problems = [problem("bad_hang" if r == "hang" else "bad_good") for r in responses]
    start = time.monotonic()
    scored = pool.score(responses, problems)
    assert [r.value for r in scored] == [1, 0, 0, 1, 0, 1]
    assert [r.status for r in scored] == ["ok", "timeout", "ok", "ok", "timeout", "ok"]
    assert time.monotonic() - start < 30


def test_a_hang_in_c_code_is_killed_too(pool):
    assert pool.score(["x"], [problem("bad_hang_in_c")]) == [Reward(value=0.0, status="timeout")]
    assert pool.score(["7"], [problem("bad_good")]) == [Reward(value=1.0)]


@pytest.mark.parametrize(
    ("reward", "response"), [("bad_leave", "exit1"), ("bad_leave", "exit139"), ("bad_segfault", "segfault")]
)
def test_a_crash_costs_one_zero(pool, reward, response):
    scored = pool.score(["fine", response, "fine"], [problem(reward)] * 3)
    assert [(r.value, r.status) for r in scored] == [(1, "ok"), (0, "crash"), (1, "ok")]


def test_a_process_that_ends_as_if_all_were_well_costs_one_zero(pool):
    scored = pool.score(["exit0", "fine"], [problem("bad_leave")] * 2)
    assert [r.value for r in scored] == [0, 1]
    assert scored[0].status in ("crash", "timeout")  # pebble takes exit code 0 for an orderly end


@pytest.mark.parametrize(
    ("reward", "response", "said"),
    [
        ("bad_memory", "x", "MemoryError"),
        ("bad_unpicklable", "x", "Unpicklable"),
        ("bad_leave_politely", "x", "SystemExit"),
        ("bad_no_reward", "none", "number in [0, 1]"),
        ("bad_no_reward", "nan", "nan"),
        ("bad_no_reward", "two", "got 2"),
        ("bad_no_reward", "text", "'1'"),
    ],
)
def test_an_error_costs_one_zero_and_is_named(pool, caplog, reward, response, said):
    with caplog.at_level(logging.WARNING, "grpo_engine.rewards.pool"):
        assert pool.score([response], [problem(reward)]) == [Reward(value=0.0, status="error")]
    assert said in caplog.text and reward in caplog.text and "1 of 1" in caplog.text


def test_workers_import_neither_torch_nor_the_callers_main_module(pool):
    assert "torch" in sys.modules
    names = ["bad_torch_is_imported", "bad_main_is_the_callers"]
    assert pool.score(["x", "x"], [problem(n) for n in names]) == [Reward(value=0.0)] * 2


def test_an_unguarded_script_does_not_start_itself_over(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = {[os.path.dirname(__file__), *sys.path]!r}\n"
        "from grpo_engine.rewards import register_scorer\n"
        "from grpo_engine.rewards.pool import RewardPool\n"
        "from grpo_engine.types import Problem\n"
        "register_scorer('g', 'bad_scorers:good')\n"
        "p = Problem(uid='u', prompt='', answer='7', domain='t', reward='g')\n"
        "pool = RewardPool(workers=1, timeout_s=5.0)\n"
        "print('scored', pool.score(['7'], [p])[0].value)\n"  # and no close: the end of the program must suffice
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("scored 1.0\n", 0), done.stderr


def test_a_worker_outlives_its_answers(pool):
    first, second = (pool.score(["x"] * 8, [problem("bad_pid")] * 8) for _ in range(2))
    assert {r.value for r in first} == {r.value for r in second}
    assert 1 <= len({r.value for r in first}) <= 2


def test_a_worker_killed_from_outside_is_replaced():
    with RewardPool(workers=1, timeout_s=5.0) as pool:
        (before,) = pool.score(["x"], [problem("bad_pid")])
        assert before.status == "ok" and before.value > 0
        os.kill(round(before.value * (1 << 23)), signal.SIGKILL)
        time.sleep(0.3)
        (after,) = pool.score(["x"], [problem("bad_pid")])
        assert after.status == "ok" and after.value != before.value


def test_harmless_scorers_start_no_worker(monkeypatch):
    monkeypatch.setattr(RewardPool, "_start_lanes", lambda *_: pytest.fail("a worker was started"))
    with RewardPool(workers=2, timeout_s=1.0) as pool:
        scored = pool.score(["5 12", "\\boxed{B}"], [problem("exact", "12"), problem("choice", "B")])
    assert scored == [Reward(value=1.0)] * 2


def test_a_harmless_scorer_that_raises_costs_one_zero():
    with RewardPool(workers=1, timeout_s=1.0) as pool:
        assert pool.score(["x"], [problem("choice", "no letter")]) == [Reward(value=0.0, status="error")]


def test_mixed_scorers_and_progress(pool):
    seen = []
    responses, names = ["7", "7", "8", "x 7"], ["exact", "bad_good", "bad_good", "exact"]
    scored = pool.score(responses, [problem(n) for n in names], progress=lambda *now: seen.append(now))
    assert [r.value for r in scored] == [1, 1, 0, 1]
    assert seen == [(i, 4) for i in range(1, 5)]
    assert pool.score([], []) == []


def test_workers_score_while_more_answers_are_made(pool):
    seen = []
    problems = [problem(n) for n in ("bad_good", "exact", "bad_good", "bad_good")]
    with pool.begin(problems, progress=lambda done, total: seen.append(done)) as scoring:
        scoring.add([2], ["7"])
        deadline = time.monotonic() + 30
        while not seen and time.monotonic() < deadline:  # what a rollout does between two answers
            time.sleep(0.01)
            scoring.add([], [])
        assert seen == [1]
        scoring.add([3, 1, 0], ["8", "x 7", "7"])
        assert [r.value for r in scoring.finish()] == [1, 1, 1, 0]
    assert seen == [1, 2, 3, 4]


def test_an_answer_that_never_came_is_named(pool):
    with pool.begin([problem("exact")] * 2) as scoring, pytest.raises(ValueError, match="answer 0 was never added"):
        scoring.add([1], ["7"])
        scoring.finish()


def test_leaving_early_leaves_a_usable_pool(pool):
    with pytest.raises(KeyError), pool.begin([problem("bad_hang")] * 3) as scoring:
        scoring.add([0, 1], ["hang", "hang"])
        raise KeyError
    assert pool.score(["7"], [problem("bad_good")]) == [Reward(value=1.0)]


def test_an_interrupt_leaves_a_usable_pool():
    def interrupt(done, total):
        raise KeyboardInterrupt

    with RewardPool(workers=2, timeout_s=5.0) as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.score(["7", "hang", "hang"], [problem("bad_good"), *[problem("bad_hang")] * 2], progress=interrupt)
        assert pool.score(["7", "7"], [problem("bad_good")] * 2) == [Reward(value=1.0)] * 2


def test_close_ends_a_busy_pool_at_once():
    pool = RewardPool(workers=1, timeout_s=500.0)
    raised = []

    def score():
        try:
            pool.score(["hang"], [problem("bad_hang")])
        except RuntimeError as e:
            raised.append(str(e))

    thread = threading.Thread(target=score, daemon=True)
    thread.start()
    time.sleep(2.0)
    start = time.monotonic()
    pool.close()
    pool.close()
    thread.join(timeout=5)
    assert time.monotonic() - start < 10
    assert raised == ["RewardPool: the pool is closed"]
    with pytest.raises(RuntimeError, match="closed"):
        pool.score(["7"], [problem("exact")])


def test_a_scorer_that_cannot_be_imported_ends_the_run_with_a_reason():
    rewards.register_scorer("bad_absent", "no_such_module:score")
    with RewardPool(workers=1, timeout_s=1.0) as pool, pytest.raises(RuntimeError, match="no_such_module"):
        pool.score(["x"], [problem("bad_absent")])


def test_wrong_calls_are_refused(pool):
    with pytest.raises(ValueError, match="2 responses .* 1 problems"):
        pool.score(["a", "b"], [problem("exact")])
    with pytest.raises(ValueError, match="no scorer 'nope'.*math"):
        pool.score(["a"], [problem("nope")])
    with pytest.raises(ValueError, match="workers.*0"):
        RewardPool(workers=0, timeout_s=1.0)
    with pytest.raises(ValueError, match="timeout_s.*nan"):
        RewardPool(workers=1, timeout_s=float("nan"))
    with pytest.raises(ValueError, match="module:function"):
        rewards.register_scorer("x", "nowhere")
    with pytest.raises(ValueError, match="already"):
        rewards.register_scorer("math", "bad_scorers:good")
