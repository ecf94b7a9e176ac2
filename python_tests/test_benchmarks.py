"""The benchmarks' own arithmetic, and that a wrong answer is refused."""

import functools
import importlib
import inspect
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import models
import pytest
import torch
from torch.utils._device import _device_constructors

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "scripts")]  # neither is part of the wheel

import gpu_check  # noqa: E402

from benchmarks import limits, run, shapes, table  # noqa: E402
from benchmarks.bench_scaling import exponent  # noqa: E402
from benchmarks.lengths import answer_lengths  # noqa: E402
from benchmarks.peers import optional  # noqa: E402
from grpo_engine import ops  # noqa: E402
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
    assert row["case"] in out.stdout and row["bits_by_threads"]["equal"] and row["batch_invariant"]
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
    assert table.verdict(row["bits_by_threads"]) == "NO" and row["batch_invariant"] is False
    row = measured(case(alone=lambda whole: bool((whole == 1).all())))
    assert row["bits_by_threads"]["equal"] and row["batch_invariant"] is True


class SerialKernels:
    """A counter that finds one thread, however many are asked for: an extension without OpenMP."""

    start_counting_threads = staticmethod(lambda: None)
    stop_counting_threads = staticmethod(lambda: 1)


def test_the_check_of_bits_counts_the_threads_that_took_part(monkeypatch):
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    check = table.bits_by_threads(lambda: ops.linear(a, b))
    assert check["equal"] and check["asked"][:2] == [1, 2] and check["asked"][-1] == max(2, table.all_cores())
    assert check["took_part"] == check["asked"]
    assert table.verdict(check) == f"yes, {check['asked'][-1]} threads"
    small = table.bits_by_threads(lambda: ops.linear(a[:1, :8].contiguous(), b[:1, :8].contiguous()))
    assert small["equal"] and table.verdict(small) == "1 thread"  # too little work for a second one
    assert table.verdict(table.bits_by_threads(lambda: a + b)) == "not counted"  # torch's kernels, not ours
    monkeypatch.setattr(table, "_C", SerialKernels)
    serial = table.bits_by_threads(lambda: ops.linear(a, b))
    assert serial["equal"] and table.verdict(serial) == "1 thread"


def test_more_threads_than_asked_for_are_no_comparison_with_one(monkeypatch):
    monkeypatch.setattr(SerialKernels, "stop_counting_threads", staticmethod(lambda: 2))
    monkeypatch.setattr(table, "_C", SerialKernels)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="2 threads took part where 1 were asked for"):
        table.bits_by_threads(lambda: ONES)
    assert torch.get_num_threads() == before


def test_parts_of_a_call_are_timed_with_it():
    ticks = iter(range(1000))

    def call():
        with limits.part("forward"):
            pass
        for _ in range(2):
            with limits.part("backward"):
                next(ticks)

    call()  # outside a sample no time is taken
    timer = limits.HostTimer(lambda: float(next(ticks)), "ticks")
    taken = limits.interleave({"a": call}, timer=timer, repeats=2, budget_s=60.0, warm=True)["a"]
    assert taken.parts == {"forward": [1.0] * 2, "backward": [4.0] * 2} and taken == [9.0] * 2


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
    gpu = limits.Limits(sgemm_torch=100.0, bf16=1000.0, copy=10.0)
    assert gpu.roof(flops=400.0, nbytes=10.0) == (4.0, "compute")
    assert gpu.roof(flops=400.0, nbytes=10.0, bf16=True) == (1.0, "memory")
    fast = limits.Limits(sgemm_torch=100.0, sgemm_ours=200.0, read=10.0)
    assert fast.roof(flops=400.0, nbytes=10.0) == (2.0, "compute")
    assert fast.roof(flops=100.0, nbytes=10.0) == (1.0, "memory")
    row = table.place({"ours": {"median_s": 4.0}, "flops": 400.0, "nbytes": 10.0}, fast)
    assert row["share"] == 0.5 and row["bound"] == "compute" and row["gflops"] == pytest.approx(1e-7)


def test_functions_are_timed_in_turns():
    calls, ticks = [], iter(range(1000))
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timer = limits.HostTimer(lambda: float(next(ticks)), "ticks")
    samples = limits.interleave(runs, timer=timer, repeats=3, budget_s=60.0)
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


# ---------------------------------------------------------------- on CUDA, as far as a CPU can tell


@pytest.mark.parametrize("name", run.names(device="cuda"))
def test_the_cases_for_a_gpu_fit_what_makes_them(name):
    module = importlib.import_module(f"benchmarks.bench_{name}")
    for quick in (True, False):
        made = list(module.cuda(quick))
        assert made
        for one in made:
            assert isinstance(one, functools.partial)  # so that one which fails costs only itself
            inspect.signature(one.func).bind(*one.args, **one.keywords)


class NamedDevices(torch.overrides.TorchFunctionMode):
    """Refuses a tensor that is made without a device: beside a GPU it would lie on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _device_constructors():
            assert (kwargs or {}).get("device") is not None, func
        return func(*args, **(kwargs or {}))


def tiny(name, maker, *args, **how):
    return getattr(importlib.import_module(f"benchmarks.bench_{name}"), maker)(*args, **how)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny("gather_logprob", "training", 4, 50, torch.bfloat16, compiled=False),
        lambda: tiny("kv_write", "case", "x", 8, 2, 4, torch.bfloat16, 2),
        lambda: tiny("paged_attention", "case", "x", 8, 16, 4, 2, 16, torch.bfloat16, "log-normal", compiled=False),
        lambda: tiny("paged_attention", "shared", "x", 2, 2, 16, 16, 4, 2, 16, torch.bfloat16),
        lambda: tiny("policy_loss", "case", 4, 8, "equal", compiled=False),
        lambda: tiny("ragged_attention", "case", "x", 2, 8, 4, 2, 8, torch.float32, "equal", gradients=True, compiled=False),
        lambda: tiny("rms_norm", "training", "x", 8, 16, torch.bfloat16, compiled=False),
        lambda: tiny("rope", "case", "x", 8, 4, 8, torch.bfloat16, 8, gradients=True, compiled=False),
        lambda: tiny("sample_token", "case", "x", lambda: torch.randn(4, 100), top_k=5, top_p=0.9),
        lambda: tiny("token_logprob", "grpo", "x", 2, 4, 16, 50, torch.float32, compiled=False),
        lambda: tiny("adamw", "of", "x", models.random_model()),
        lambda: tiny("decode_step", "case", "x", models.random_model(), 3, 5, peer=False),
    ],
)
def test_a_case_keeps_to_the_device_that_it_was_made_on(make):
    one = make()
    with NamedDevices():
        mine = table.verify(one)[3]
        assert table.check_bits(one.bits or one.ours, "cuda")
        assert one.alone is None or one.alone(mine)


def test_cuda_events_time_the_call_alone_after_cold_cache_and_launches():
    """On a GPU whose every spin takes 1e-9 s, and a call that takes the host 1 ms to launch and the GPU 3 ms to do."""
    log, now = [], {"host": 0.0, "gpu": 0.0}

    class FakeEvent:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = now["gpu"]

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    class Cuda:
        Event = FakeEvent
        synchronize = staticmethod(lambda: None)
        current_device = staticmethod(lambda: "cpu")

        @staticmethod
        def get_device_properties(device):
            return type("Properties", (), {"L2_cache_size": 1 << 10})()

        @staticmethod
        def _sleep(spins):
            log.append("spin")
            now["gpu"] += 1e-9 * spins

    def call():
        log.append("call")
        now["host"] += 1e-3
        now["gpu"] += 3e-3

    timer = limits.CudaTimer(Cuda, clock=lambda: now["host"])
    assert timer.cold.nbytes == 4 << 10
    log.clear()
    ready = timer.prepare(call)
    assert ready == pytest.approx(2e-3) and log == ["call", "call"]
    assert timer.seconds(call, ready) == pytest.approx(3e-3) and log[2:] == ["spin", "call"]
    assert timer.prepare(lambda: None) == limits.LEAD_S[0]


def test_a_failed_case_costs_only_itself_when_asked(capsys):
    def broken():
        raise RuntimeError("no kernel")

    wrong, right = case(name="wrong", ours=lambda: ONES * 2), case(name="right", peers={"off": lambda: ONES * 3})
    several = [case(name="broken", ours=broken), lambda: wrong, lambda: right, broken]
    with pytest.raises(SystemExit, match="some: failed: broken; wrong; while a case was made"):
        table.main("some", lambda quick: several, argv=["--quick", "--keep-going"])
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert [row["case"] for row in record["cases"]] == ["right"]
    assert record["cases"][0]["peers"]["off"] == {"missing": "wrong: error 2, allowed 1e-06"}
    assert record["failed"][0] == {"case": "broken", "why": "RuntimeError: no kernel"}
    assert "**Failed**: broken: RuntimeError: no kernel" in out


def test_cuda_without_a_device_is_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(SystemExit, match="some: torch sees no CUDA device"):
        table.main("some", lambda quick: [], cuda=lambda quick: [], argv=["--device", "cuda"])
    with pytest.raises(SystemExit, match="some: has no cases for CUDA"):
        table.main("some", lambda quick: [], argv=["--device", "cuda"])


# ---------------------------------------------------------------- scripts/gpu_check.sh


def check(*args):
    command = ["bash", "scripts/gpu_check.sh", *map(str, args)]
    env = {**os.environ, "GRPO_ENGINE_PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def test_without_a_device_nothing_is_built(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    out = check("--out", tmp_path)
    assert out.returncode == 2 and list(tmp_path.iterdir()) == []
    assert out.stderr.count("\n") == 1 and "sees no CUDA device; nothing was built or run" in out.stderr


def test_a_dry_run_prints_the_commands_of_each_stage(tmp_path):
    out = check("--dry-run", "--out", tmp_path)
    assert out.returncode == 0 and list(tmp_path.iterdir()) == []
    for says in ("build_ext --inplace", "CUDA_ARCHITECTURES=90a", "pytest -k cuda", "--tool memcheck", "--tool racecheck",
                 "--part ops", "--part whole"):  # fmt: skip
        assert says in out.stdout
    assert sum(stage.estimate_s for stage in gpu_check.STAGES.values()) < 20 * 60
    assert all(stage.limit_s < 600 for stage in gpu_check.STAGES.values())


def test_a_failed_stage_does_not_stop_the_next_and_the_summary_says_what_ran(tmp_path, monkeypatch, capsys):
    def stage(name, code, *, limit_s=60, **how):
        def steps(context):
            yield [gpu_check.Command(argv=[sys.executable, "-c", code])]

        return gpu_check.Stage(name=name, says="something", estimate_s=1, limit_s=limit_s, steps=steps, **how)

    def absent(context):
        raise gpu_check.Skipped("no tool")

    stages = {
        "build": stage("build", "raise SystemExit(3)"),
        "tests": stage("tests", "print('hello')", result=lambda context, log: {"by_file": {
            "linear": {"passed": log.splitlines().count("hello"), "failed": 0, "skipped": 0}}}),
        "sanitize": gpu_check.Stage(name="sanitize", says="", estimate_s=1, limit_s=1, steps=absent),
        "bench": stage("bench", "import time; time.sleep(60)", limit_s=1),
    }  # fmt: skip
    about = {"gpu": "NVIDIA H200", "capability": [9, 0], "memory_bytes": 1, "torch": "2", "cuda": "13"}
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_check, "device", lambda: about)
    monkeypatch.setattr(gpu_check, "missing_packages", lambda: ["flashinfer"])
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_check, "TESTS", tmp_path / "work" / "tests.json")
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    summary = json.loads((tmp_path / "h200" / "summary.json").read_text())
    assert summary["schema"] == 1 and summary["gpu"] == "NVIDIA H200" and summary["missing_packages"] == ["flashinfer"]
    states = {name: (outcome["state"], outcome["why"]) for name, outcome in summary["stages"].items()}
    assert states == {
        "build": ("failed", "exit code 3"), "tests": ("passed", None), "sanitize": ("skipped", "no tool"),
        "bench": ("timed out", "more than 1 s"),
    }  # fmt: skip
    assert all({"seconds", "limit_s", "log", "date", "commit"} <= set(o) for o in summary["stages"].values())
    said = capsys.readouterr().out
    assert "missing flashinfer" in said and "failed: build, bench" in said
    rows = (tmp_path / "gpu.md").read_text()
    assert "| linear | [NVIDIA H200](h200/results.md) | 1 passed, 0 failed" in rows
    assert "| rope | not yet run on a GPU" in rows
    assert gpu_check.main(["--out", str(tmp_path), "--within", "5", "build"]) == 0
    assert "build: skipped (no time is left)" in capsys.readouterr().out
    assert gpu_check.main(["--out", str(tmp_path), "tests"]) == 0  # and earlier stages stay in the summary
    assert set(json.loads((tmp_path / "h200" / "summary.json").read_text())["stages"]) == set(stages)


def test_files_that_cannot_be_imported_are_left_out_by_name():
    found = gpu_check.parse_collection(
        "python_tests/ops/test_rope.py::test_a[cuda-1 x]\npython_tests/ops/test_rope.py::test_b[cuda]\n"
        "=========== ERRORS ===========\n"
        "____________ ERROR collecting python_tests/test_rollout.py ____________\nImportError while importing\n"
        "E   ModuleNotFoundError: No module named 'pydantic'\n"
        "____________ ERROR collecting python_tests/test_model.py ____________\nE   SyntaxError: no\n"
        "=========== short test summary info ===========\n"
    )
    rope = "python_tests/ops/test_rope.py"
    assert found["tests"] == [f"{rope}::test_a[cuda-1 x]", f"{rope}::test_b[cuda]"]
    assert found["missing"] == {"python_tests/test_rollout.py": "pydantic"}
    assert found["files"] == [rope, "python_tests/test_model.py"]  # a broken file fails when run
    assert gpu_check.choose(found["tests"], 1) == found["tests"][:1]


@pytest.mark.parametrize(
    "name, folder",
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090")],
)
def test_a_gpus_folder_is_its_model(name, folder):
    assert gpu_check.gpu_folder(name) == folder


def test_the_table_of_gpus_is_made_of_the_kept_summaries():
    results = ROOT / "benchmarks" / "results"
    assert (results / "gpu.md").read_text() == gpu_check.status(results)
