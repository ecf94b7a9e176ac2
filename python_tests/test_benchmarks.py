"""The benchmarks' own arithmetic, and that a wrong answer is refused."""

import argparse
import dataclasses
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

from benchmarks import bench_thread_scaling, limits, peers, run, shapes, table  # noqa: E402
from benchmarks.bench_scaling import exponent  # noqa: E402
from benchmarks.lengths import answer_lengths  # noqa: E402
from grpo_engine import ops  # noqa: E402
from grpo_engine.config import RolloutConfig  # noqa: E402
from grpo_engine.model.decoder import Model, Packed, packed_positions  # noqa: E402
from grpo_engine.rollout.engine import generate  # noqa: E402
from grpo_engine.system.machine import num_cores  # noqa: E402

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
    assert operators <= set(listed) and {"training", "rollout", "step", "scaling", "thread_scaling"} <= set(listed)
    assert listed == run.names()


def planned(**how):
    settings = {"part": "all", "threads": None, "quick": False, "cores": 4}
    return [str(job) for job in run.plan(["linear", "rope", "step", "thread_scaling"], **(settings | how))]


def test_a_run_takes_ops_on_one_thread_and_large_ops_and_steps_on_all_cores_too():
    real = ["step, published sizes, 4 threads", "thread_scaling, published sizes, 4 threads"]
    assert planned() == [
        "linear, 1 thread", "linear, 4 threads", "rope, 1 thread", "step, 1 thread", "step, 4 threads", real[0],
        "thread_scaling, 4 threads", real[1],
    ]  # fmt: skip
    assert planned(part="real") == real
    assert planned(quick=True) == [
        "linear, 1 thread", "rope, 1 thread", "step, 4 threads", real[0], "thread_scaling, 4 threads", real[1],
    ]  # fmt: skip
    assert planned(cores=1) == ["linear, 1 thread", "rope, 1 thread", "step, 1 thread", "step, published sizes, 1 thread"]
    assert planned(threads=2, part="ops") == [
        "linear, 2 threads", "rope, 2 threads", "step, 2 threads", "thread_scaling, 2 threads",
    ]  # fmt: skip
    both = run.plan(["rollout"], part="real", threads=None, quick=False, cores=4)
    assert [job.options() for job in both] == [["--threads", "1", "--real"], ["--threads", "4", "--real"]]


@pytest.mark.parametrize("text, count", [("1", 1), ("3", 3), ("all", num_cores())])
def test_threads_are_a_number_or_all(text, count):
    assert table.thread_count(text) == count


@pytest.mark.parametrize("text", ["0", "-1", "many", ""])
def test_other_threads_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"an integer >= 1 or \"all\", got '{text}'"):
        table.thread_count(text)


def record_of(name, threads, **changes):
    fast = limits.Limits(sgemm_torch=1e9, sgemm_ours=2e9, read=1e9)
    row = {"case": f"{name} of {threads}", "ours": {"median_s": 1.0}, "peers": {}, "flops": 1.0, "nbytes": 1.0}
    row |= changes.pop("row", {})
    return {
        "benchmark": name, "threads": threads, "unit": "us", "note": "", "hardware": {"cpu": "a CPU"}, "clock": "a clock",
        "load": [0.0], "load_after": [0.0], "commit": None, "limits": fast.as_dict(), "cases": [table.place(row, fast)],
        "geometric_mean": {}, **changes,
    }  # fmt: skip


def test_records_of_several_threads_and_sizes_are_kept_beside_each_other(tmp_path):
    for record in (
        record_of("training", 4, cores=4, sizes="real"), record_of("training", 1, cores=4), record_of("rope", 1, cores=4),
        record_of("training", 4, cores=4), record_of("training", 2, cores=4),
        record_of("training", 1, cores=4, sizes="real"),
    ):  # fmt: skip
        run.write(tmp_path, record)
    (tmp_path / "summary.json").write_text("{}")  # of a GPU's folder: no record
    assert sorted(p.name for p in tmp_path.glob("*.json")) == [
        "rope.json", "summary.json", "training.2_threads.json", "training.all_cores.json", "training.json",
        "training.real.all_cores.json", "training.real.json",
    ]  # fmt: skip
    headings = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("## ")]
    real = "training, sizes of published checkpoints"
    assert headings == [
        "## rope, 1 thread of 4 cores", "## training, 1 thread of 4 cores", "## training, 2 threads of 4 cores",
        "## training, 4 threads of 4 cores", f"## {real}, 1 thread of 4 cores", f"## {real}, 4 threads of 4 cores",
    ]  # fmt: skip


def test_records_of_old_still_render(tmp_path):
    old = record_of("linear", 1, row={"bits_1_vs_2_threads": True, "batch_invariant": None})
    new = record_of("rope", 1, cores=4, row={"bits_by_threads": {"equal": True, "asked": [1, 2], "took_part": [1, 1]}})
    assert "bits 1 = 2 threads, not counted" in table.text(old) and "| yes " in table.text(old)
    assert "| 1 thread " in table.text(new) and "yes" not in table.text(new)
    assert "| linear, 1 thread |  |  |  |" in run.summary([old, new])  # that check compared nothing
    assert "| 0 of 0 equal, 1 on one thread |" in run.summary([old, new])
    assert len(run.kept_records(ROOT / "benchmarks" / "results")) > 10
    for record in run.kept_records(ROOT / "benchmarks" / "results"):
        assert table.text(record)


def test_forward_and_backward_have_columns_of_their_own():
    parts = {"forward": 0.25, "backward": 0.5}
    peer = {"median_s": 2.0, "ratio": 2.0, "parts_s": {"forward": 1.5, "backward": 0.125}}
    row = {"ours": {"median_s": 1.0, "parts_s": parts}, "peers": {"peer": peer}}
    header, _, line, _ = table.markdown(record_of("training", 1, unit="s", row=row)).splitlines()
    cells = dict(zip(*([cell.strip() for cell in text.split("|")] for text in (header, line)), strict=True))
    assert cells["forward"] == "0.25" and cells["backward"] == "0.5" and cells["backward / forward"] == "2.00"
    assert cells["its forward"] == "1.5" and cells["its backward"] == "0.125"


def test_speed_up_by_threads_counts_who_took_part(capsys):
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    work = bench_thread_scaling.Work(name="a product", make=lambda: lambda: ops.linear(a, b))
    row = bench_thread_scaling.measure(work, [1, 2], quick=True)
    assert {n: taken["took_part"] for n, taken in row["threads"].items()} == {"1": 1, "2": 2}
    assert row["threads"]["1"]["speed_up"] == 1.0
    assert row["threads"]["2"]["speed_up"] == row["threads"]["1"]["median_s"] / row["threads"]["2"]["median_s"]
    shown = table.speed_up_table({"unit": "ms", "speed_up": [row]})
    assert "| 2 threads | speed-up | took part |" in " ".join(shown.splitlines()[0].split())
    assert bench_thread_scaling.numbers_of_threads(2) == [1, 2]
    assert bench_thread_scaling.numbers_of_threads(6) == [1, 2, 4, 6]
    assert bench_thread_scaling.numbers_of_threads(8) == [1, 2, 4, 8]


@pytest.mark.parametrize("config", [shapes.smollm_config, shapes.qwen_config])
def test_real_sizes_are_those_of_the_checkpoints(config):
    with torch.device("meta"):
        model = Model(config())
    published = {shapes.smollm_config: 134_515_008, shapes.qwen_config: 494_032_768}
    assert model.num_parameters == published[config]


def small_of(config):
    """The same family with a few narrow layers."""
    return dataclasses.replace(
        config, vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip


@pytest.mark.parametrize("config, name", [
    (shapes.smollm_config, "LlamaForCausalLM"), (shapes.qwen_config, "Qwen2ForCausalLM"),
])  # fmt: skip
def test_the_peer_is_of_the_models_family_and_can_share_its_weights(config, name):
    model = shapes.random_model(small_of(config()), torch.float32)
    theirs = peers.as_transformers(model, share=True)
    assert type(theirs).__name__ == name
    assert theirs.model.embed_tokens.weight.data_ptr() == model.embed.weight.data_ptr()
    apart = peers.as_transformers(model)
    assert apart.model.embed_tokens.weight.data_ptr() != model.embed.weight.data_ptr()
    tokens = torch.randint(97, (3, 9))
    mine = model.logprobs(tokens.flatten(), torch.tensor([0, 9, 18, 27], dtype=torch.int32))[0].view(3, 8)
    for peer in (theirs, apart):
        logits = torch.log_softmax(peer(input_ids=tokens).logits[:, :-1], dim=-1)
        torch.testing.assert_close(mine, logits.gather(2, tokens[:, 1:, None])[..., 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["training", "rollout", "step"])
def test_cases_of_published_sizes_run_beside_their_peers(name, monkeypatch):
    """On a small model in place of the checkpoint's."""
    module = importlib.import_module(f"benchmarks.bench_{name}")
    small = dataclasses.replace(small_of(shapes.smollm_config()), hidden_size=192, head_dim=32)
    monkeypatch.setattr(module, "REAL", {"135M": lambda: small})
    rows = []
    for one in table.made(module.real(True), "cpu"):
        assert isinstance(one, table.Case), one
        rows.append(measured(one))
    assert len(rows) == {"training": 2, "rollout": 2, "step": 1}[name]
    for row in rows:
        assert row["bits_by_threads"]["equal"] and row["batch_invariant"] is not False
        assert row["peers"]
        for peer in row["peers"].values():
            assert "ratio" in peer or peer["missing"] in ("not installed", peers.NO_BFLOAT16)


def test_speed_up_is_measured_at_published_sizes(monkeypatch):
    monkeypatch.setattr(bench_thread_scaling, "REAL", {"135M": lambda: small_of(shapes.smollm_config())})
    monkeypatch.setattr(bench_thread_scaling, "interleave", short_interleave)
    record = bench_thread_scaling.benchmark(quick=True, real=True, most=2)
    assert len(record["speed_up"]) == 2 and table.text(record).startswith("## thread_scaling, sizes of published")


def short_interleave(runs, *, timer, repeats, budget_s, warm):
    return limits.interleave(runs, timer=timer, repeats=1, budget_s=1.0, at_least=1, warm=warm)


@pytest.mark.skipif(not (peers.installed("llama_cpp") and peers.installed("gguf")), reason="needs llama-cpp-python and gguf")
@pytest.mark.parametrize("config", [shapes.smollm_config, shapes.qwen_config])
def test_llama_cpp_decodes_many_sequences_as_we_do(config):
    """Widths are multiples of 32, which its products need."""
    small = dataclasses.replace(small_of(config()), hidden_size=192, intermediate_size=64, head_dim=32)
    model = shapes.random_model(small, torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)  # so that answers depend on what is before them
    prompts = torch.randint(97, (5, 7))
    theirs = peers.LlamaCpp(model, prompts, [4] * 5)
    answers = theirs.generate()
    assert answers.shape == (5, 4) and torch.equal(answers, theirs.generate())
    for n in range(4):  # each of its tokens is as probable as our best one
        inputs = torch.cat([prompts, answers[:, :n]], dim=1)
        cu = torch.arange(6, dtype=torch.int32) * inputs.shape[1]
        with torch.inference_mode():
            hidden = model(inputs.flatten(), packed_positions(cu), Packed(cu))
            logits = model.logits(hidden[cu[1:].long() - 1])
        if n == 0:
            torch.testing.assert_close(theirs.last_logits(), logits, rtol=0.02, atol=0.02 * float(logits.abs().max()))
        gap = logits.max(dim=1).values - logits.gather(1, answers[:, n : n + 1])[:, 0]
        assert float(gap.max()) <= 0.02 * float(logits.abs().max())


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

    row = measured(case(peers={"absent": peers.optional("no_such_package", lambda: None), "broken": broken}))
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
    assert check["equal"] and check["asked"][:2] == [1, 2] and check["asked"][-1] == max(2, num_cores())
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


def test_a_benchmark_that_is_stopped_leaves_the_cases_it_finished(tmp_path):
    def stopped():
        raise KeyboardInterrupt

    path = tmp_path / "record.json"
    several = [case(name="first"), case(name="second", ours=stopped), case(name="third")]
    with pytest.raises(KeyboardInterrupt):
        table.main("some", lambda quick: several, argv=["--quick", "--record", str(path)])
    record = json.loads(path.read_text())
    assert [row["case"] for row in record["cases"]] == ["first"] and not record["finished"]
    assert "**Unfinished**" in table.text(record)
    table.main("some", lambda quick: several[:1], argv=["--quick", "--record", str(path)])
    record = json.loads(path.read_text())
    assert record["finished"] and "**Unfinished**" not in table.text(record)


def test_a_killed_benchmark_is_kept_by_the_run(monkeypatch, tmp_path):
    file = tmp_path / "bench_some.py"
    file.write_text(f"""
import os, signal, sys
sys.path.append({str(ROOT)!r})
import torch
from benchmarks.table import Case, main

one = torch.ones(1)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
main("some", lambda quick: [Case(name=name, ours=ours, peers={{}}, tolerance=0.0)
                            for name, ours in (("first", lambda: one), ("second", die))])
""")
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    progress = run.Progress(disable=True)
    printed, record, well = run.run_one("some", ["--quick"], progress, progress.add_task(""), 600.0)
    assert not well and [row["case"] for row in record["cases"]] == ["first"]
    assert "**Unfinished**" in printed


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
        "____________ ERROR collecting python_tests/rollout/test_rollout.py ____________\nImportError while importing\n"
        "E   ModuleNotFoundError: No module named 'pydantic'\n"
        "____________ ERROR collecting python_tests/model/test_model.py ____________\nE   SyntaxError: no\n"
        "=========== short test summary info ===========\n"
    )
    rope = "python_tests/ops/test_rope.py"
    assert found["tests"] == [f"{rope}::test_a[cuda-1 x]", f"{rope}::test_b[cuda]"]
    assert found["missing"] == {"python_tests/rollout/test_rollout.py": "pydantic"}
    assert found["files"] == [rope, "python_tests/model/test_model.py"]  # a broken file fails when run
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
