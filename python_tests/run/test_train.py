"""A whole run on a small random model: records, resuming after SIGKILL, refusals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import models
import pytest
import torch
from conftest import DEVICES, ROOT, SAME_EXTENSION
from safetensors.torch import load_file

from grpo_engine.config import RunConfig
from grpo_engine.evaluate.evaluate import eval_steps
from grpo_engine.micro import ladder
from grpo_engine.micro.tokenizer import MicroTokenizer
from grpo_engine.model import weights
from grpo_engine.records import jsonl, records
from grpo_engine.records.cost import total_cost
from grpo_engine.rollout.engine import Rollout
from grpo_engine.run.folder import RunFolder
from grpo_engine.run.grpo import GrpoStepper
from grpo_engine.run.run import train
from grpo_engine.system import device
from grpo_engine.system.threads import count_threads, num_threads
from grpo_engine.tasks.order import problems_from

DETERMINISTIC = (records.STEPS_FILE, records.EVALS_FILE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    vocab = MicroTokenizer().vocab_size
    weights.save_checkpoint(models.random_model(models.small_config(vocab=vocab), scale=3.0), path)
    return path


def run_config(folder: Path, **changes) -> RunConfig:
    settings = {
        "steps": 12,
        "checkpoint_every": 3,
        "model": {"path": str(folder)},
        "task": {"eval_problems": 20},
        "rollout": {"max_new_tokens": 8},
        "batch": {"prompts": 8, "group_size": 4, "minibatches": 2, "tokens_per_micro_batch": 200},
        "evaluation": {"count": 5, "samples": 2},
        "optimizer": {"lr": 1e-3},
    }
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) and key in settings else value
    return RunConfig(**settings)


def deterministic_bytes(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in DETERMINISTIC}


def same_weights(a: Path, b: Path) -> bool:
    x, y = (load_file(p / "checkpoint" / "model.safetensors") for p in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> Path:
    return train(run_config(folder), tmp_path_factory.mktemp("run") / "undisturbed")


def test_records_are_complete(undisturbed):
    steps = jsonl.read_jsonl(undisturbed / records.STEPS_FILE).records
    assert [s["step"] for s in steps] == list(range(1, 13))
    assert [s["prompts_seen"] for s in steps] == [8 * n for n in range(1, 13)]
    for s in steps:
        assert s["groups"] == 8 and 0 <= s["zero_variance_groups"] <= 8
        assert s["logprob_mismatch_max"] == 0.0  # rollout and trainer: the same bits
        assert s["grad_norm"] >= 0 and s["kl"] >= 0 and s["entropy"] > 0 and s["reward_failures"] == 0
        assert "non_finite" not in s
    assert all(a["trained_tokens"] < b["trained_tokens"] for a, b in zip(steps, steps[1:], strict=False))
    evals = jsonl.read_jsonl(undisturbed / records.EVALS_FILE).records
    assert sorted({e["step"] for e in evals}) == eval_steps(run_config(Path("x")))
    assert {e["mode"] for e in evals} == {"sample", "greedy"}
    assert {e["eval_set"] for e in evals if e["step"] == 12} == {e["eval_set"] for e in evals if e["step"] == 0}
    for e in evals:
        assert e["loss"] == pytest.approx(1 - e["pass1"]) and e["num_problems"] == 20
    timings = jsonl.read_jsonl(undisturbed / records.TIMINGS_FILE).records
    assert set(timings[1]["phase"]) >= {"prefill", "decode", "reference", "forward", "backward", "optimizer", "reward"}
    run = records.read_run(undisturbed)
    cost = total_cost(run.timings)
    assert run.timings[-1].step == 12 and list(run.timings[-1].phase) == ["checkpoint"]  # the last one's
    assert cost["other"].seconds > 0 and sum(c.seconds for c in cost.values()) == pytest.approx(
        sum(t.seconds for t in run.timings)
    )
    header = json.loads((undisturbed / records.RUN_FILE).read_text())
    assert header["method"] == "grpo" and header["model"]["params_non_embedding"] > 0
    assert records.is_complete(undisturbed)


def test_the_ledger_counts_forward_backward_and_reference(undisturbed):
    phase = jsonl.read_jsonl(undisturbed / records.TIMINGS_FILE).records[2]["phase"]
    assert phase["backward"]["flops"] == 2 * phase["forward"]["flops"]
    assert phase["reference"]["flops"] == phase["forward"]["flops"]
    assert phase["reference"]["tokens"] == phase["forward"]["tokens"]


def test_one_two_and_three_threads_give_the_same_records_and_weights(tmp_path):
    weights.save_checkpoint(models.random_model(ladder.architecture("m"), scale=3.0), tmp_path / "model")
    config = run_config(tmp_path / "model", steps=2, evaluation={"count": 2}, batch={"prompts": 32})
    for number in (1, 2, 3):
        with num_threads(number), count_threads() as count:
            train(config, tmp_path / str(number), quiet=True)
        assert count.number == number
    for other in ("2", "3"):
        for name in (*DETERMINISTIC, "checkpoint/model.safetensors", "checkpoint/optimizer.safetensors"):
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / other / name).read_bytes(), name
    steps = jsonl.read_jsonl(tmp_path / "1" / records.STEPS_FILE).records
    assert [s["logprob_mismatch_max"] for s in steps] == [0.0, 0.0]
    assert all(s["grad_norm"] > 0 for s in steps)


def test_the_commands_use_all_threads_of_torch_unless_told_otherwise(tmp_path):
    weights.save_checkpoint(models.random_model(ladder.architecture("m"), scale=3.0), tmp_path / "model")
    settings = [f"model.path={tmp_path / 'model'}", "task.eval_problems=20", "rollout.max_new_tokens=8"]
    run = ["train", "--out", str(tmp_path / "run"), *settings, "steps=1", "batch.prompts=16", "batch.group_size=4"]
    code = (
        f"{SAME_EXTENSION}import torch\nfrom grpo_engine.cli import main\n"
        "from grpo_engine.system.threads import count_threads\n"
        f"default = torch.get_num_threads()\n"
        f"for arguments in ({run!r}, {['evaluate', *settings]!r}):\n"
        "    sys.argv = ['grpo-engine', *arguments]\n"
        "    with count_threads() as count:\n"
        "        try:\n            main()\n        except SystemExit as end:\n            assert not end.code, end.code\n"
        "    print(arguments[0], count.number, default, sep=',')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    said = dict(line.split(",", 1) for line in done.stdout.splitlines() if line.startswith(("train,", "evaluate,")))
    # of many cores a small model's kernels may not wake all; of a few they do
    assert set(said) == {"train", "evaluate"}
    for numbers in said.values():
        counted, default = map(int, numbers.split(","))
        assert counted == default or min(counted, default) >= 4, done.stdout


def test_scarce_pages_change_no_record(folder, undisturbed, tmp_path):
    scarce = train(run_config(folder, rollout={"num_pages": 7, "max_running": 6, "max_step_tokens": 12}), tmp_path / "r")
    assert deterministic_bytes(scarce) == deterministic_bytes(undisturbed)
    assert same_weights(scarce, undisturbed)


def script(out: Path, folder: Path, *, pause: float = 0.0) -> str:
    """A program that runs the configuration; it waits `pause` seconds before each record that it writes."""
    return (
        "import sys, time; from pathlib import Path; sys.path.append('..'); import test_train as t; "
        "from grpo_engine.records.jsonl import JsonlWriter; "
        "from grpo_engine.run.run import train; write = JsonlWriter.write; "
        f"JsonlWriter.write = lambda self, record: (time.sleep({pause}), write(self, record)); "
        f"train(t.run_config(Path({str(folder)!r})), {str(out)!r}, quiet=True)"
    )


def test_killed_three_times_and_resumed_gives_identical_records_and_weights(folder, undisturbed, tmp_path):
    out = tmp_path / "killed"
    path = out / records.STEPS_FILE
    rng = random.Random(0)
    for _ in range(3):
        written = path.stat().st_size if path.exists() else 0
        # a run of this size is over in a blink: the pause leaves time to hit it between any two records
        process = subprocess.Popen([sys.executable, "-c", script(out, folder, pause=0.05)], cwd=Path(__file__).parent)
        deadline = time.monotonic() + 120
        while not path.exists() or path.stat().st_size == written:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", script(out, folder)], check=True, cwd=Path(__file__).parent, timeout=120)
    assert deterministic_bytes(out) == deterministic_bytes(undisturbed)
    assert same_weights(out, undisturbed)


DAPO = {
    "batch": {"sampling_rounds": 3},
    "loss": {"mask_truncated": True, "kl_coef": 0.0, "clip_high": 0.28},
    "reward": {"overlong_buffer": 4},
}


def test_killed_between_two_rounds_of_a_step_and_resumed_gives_identical_records_and_weights(folder, tmp_path):
    whole = train(run_config(folder, **DAPO), tmp_path / "whole", quiet=True)
    steps = records.read_run(whole).steps
    assert all(s.groups >= 8 for s in steps) and any(s.groups > 8 for s in steps)
    assert (
        steps[-1].prompts_seen == sum(s.groups for s in steps) == len((whole / records.ORDER_FILE).read_text().splitlines())
    )
    assert any(s.masked_responses for s in steps) and any(s.overlong_penalty_mean for s in steps)
    out = tmp_path / "killed"
    program = (
        "import os, signal, sys; from pathlib import Path; sys.path.append('..'); import test_train as t; "
        "from grpo_engine.types import RolloutBatch; from grpo_engine.run.run import train\n"
        "join, rounds = RolloutBatch.join, []\n"
        "def dying(batches):\n"
        "    rounds.append(1)\n"
        "    if len(rounds) == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return join(batches)\n"
        "RolloutBatch.join = dying\n"
        f"train(t.run_config(Path({str(folder)!r}), **t.DAPO), {str(out)!r}, quiet=True)"
    )
    for at in (3, 6, 9):  # a checkpoint every third step: the first kill comes before any, the others after one
        killed = subprocess.run([sys.executable, "-c", program, str(at)], cwd=Path(__file__).parent, timeout=120)
        assert killed.returncode == -signal.SIGKILL
    train(run_config(folder, **DAPO), out, quiet=True)
    assert deterministic_bytes(out) == deterministic_bytes(whole) and same_weights(out, whole)
    assert (out / records.ORDER_FILE).read_bytes() == (whole / records.ORDER_FILE).read_bytes()


def test_steps_whose_responses_are_all_masked_are_recorded_and_change_nothing(folder, tmp_path):
    # one token cannot be an answer and its end: no response ends by itself
    changes = {"rollout": {"max_new_tokens": 1}, "loss": {"mask_truncated": True}, "optimizer": {"warmup_steps": 9}}
    out = train(run_config(folder, **changes), tmp_path / "masked", quiet=True)
    steps = records.read_run(out).steps
    masked = [s for s in steps if s.masked_responses == 32]
    assert len(steps) == 12 and masked
    assert all(s.loss is s.kl is s.grad_norm is s.ratio_max is s.logprob_mismatch_max is None for s in masked)
    assert [s.lr for s in steps] == [pytest.approx(1e-3 * min(1, s.step / 9)) for s in steps]


def test_a_finished_run_is_left_alone(folder, undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    assert train(run_config(folder), undisturbed) == undisturbed
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")} == before


def test_another_runs_folder_is_refused_and_the_difference_named(folder, undisturbed):
    with pytest.raises(ValueError, match=r"holds another run .*optimizer.lr \(0.001 there, 0.002 here\)"):
        train(run_config(folder, optimizer={"lr": 2e-3}), undisturbed)


@pytest.mark.parametrize("place", DEVICES)
def test_a_bfloat16_run_repeats_itself_resumed_and_with_checkpointed_activations(folder, place, tmp_path):
    def config(steps, **batch):
        return run_config(folder, steps=steps, checkpoint_every=2, device=place, model={"dtype": "bfloat16"},
                          evaluation={"count": 2}, optimizer={"lr": 1e-4}, batch=batch)  # fmt: skip

    one = train(config(4), tmp_path / "one")
    assert json.loads((one / records.RUN_FILE).read_text())["config"]["device"] == place
    assert all(s["logprob_mismatch_max"] == 0.0 for s in jsonl.read_jsonl(one / records.STEPS_FILE).records)
    checkpointed = train(config(4, activation_checkpointing=True), tmp_path / "checkpointed")
    assert deterministic_bytes(one) == deterministic_bytes(checkpointed) and same_weights(one, checkpointed)
    phases = jsonl.read_jsonl(one / records.TIMINGS_FILE).records[1]["phase"]
    assert all(phases[name]["seconds"] > 0 for name in ("reference", "forward", "backward", "optimizer"))

    # a run that was cut short after its first checkpoint: everything later is thrown away
    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(GrpoStepper, "step", lambda s, step, real=GrpoStepper.step: real(s, step) if step < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config(4), cut)
    assert deterministic_bytes(train(config(4), cut)) == deterministic_bytes(one) and same_weights(one, cut)


def test_a_run_stays_on_the_device_where_it_was_begun(folder, tmp_path, monkeypatch):
    def changed(out, **values):
        """A run directory as if its configuration had been another."""
        path = tmp_path / out.name / records.RUN_FILE
        run = json.loads(path.read_text())
        run["config"] |= values
        run["run_id"] = records.run_id(run["config"])
        path.write_text(json.dumps(run))

    def machine(*, gpus):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(device, "has_cuda_kernels", lambda: gpus > 0)

    machine(gpus=0)
    config = run_config(folder, steps=1, evaluation={"count": 0})
    out = train(config, tmp_path / "r")
    assert config.device == "auto"
    machine(gpus=1)
    assert train(config, out) == out  # a finished run is found all the same
    with pytest.raises(ValueError, match=r"holds another run .*device \('cpu' there, 'cuda' here\)"):
        train(config.model_copy(update={"device": "cuda"}), out)
    (out / records.SUMMARY_FILE).unlink()
    assert RunFolder.of(config, out).config.device == "cpu"

    machine(gpus=0)
    changed(out, device="cuda")  # and the other way round: begun on a GPU that this machine lacks
    with pytest.raises(ValueError, match="was begun on cuda, and another device would change its bits: .*no CUDA kernels"):
        train(config, out)
    with pytest.raises(ValueError, match="no CUDA kernels"):
        train(config.model_copy(update={"device": "cuda"}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_sampler_and_a_trainer_that_disagree_end_the_run_and_name_the_token(folder, tmp_path, monkeypatch):
    batches = Rollout.batches

    def another_model_sampled(self):
        (rollout,) = batches.fget(self)
        rollout.logprob[rollout.cu_seqlens[3] - 1] += 2.0**-20  # the last token of the third sequence
        return [rollout]

    monkeypatch.setattr(Rollout, "batches", property(another_model_sampled))
    with pytest.raises(RuntimeError, match="rollout and trainer disagree: sequence 2 of a micro-batch, response token"):
        train(run_config(folder, steps=1, evaluation={"count": 0}, batch={"tokens_per_micro_batch": 10**6}), tmp_path / "r")


def test_without_a_kl_term_no_reference_is_kept(folder, tmp_path):
    out = train(run_config(folder, steps=2, loss={"kl_coef": 0.0}, evaluation={"count": 0}), tmp_path / "r")
    assert all("reference" not in t["phase"] for t in jsonl.read_jsonl(out / records.TIMINGS_FILE).records)
    assert all(s["kl"] is None for s in jsonl.read_jsonl(out / records.STEPS_FILE).records)


def test_each_pass_over_the_problems_has_its_own_order():
    problems = list(range(10))

    def taken(start, count, shuffle=True):
        return list(islice(problems_from(problems, start=start, seed=1, shuffle=shuffle), count))

    whole = taken(0, 25)
    assert sorted(whole[:10]) == problems and sorted(whole[10:20]) == problems and whole[:10] != whole[10:20]
    assert all(taken(start, 25 - start) == whole[start:] for start in range(25))
    assert taken(3, 20, shuffle=False) == (problems * 3)[3:23]


def test_the_order_of_the_training_prompts_is_recorded(undisturbed):
    lines = (undisturbed / records.ORDER_FILE).read_text().splitlines()
    steps = records.read_run(undisturbed).steps
    assert len(lines) == steps[-1].prompts_seen == 12 * 8 and len(set(lines)) == steps[-1].unique_prompts
    assert all(uid.startswith("chain/") for uid in lines)


def test_an_evaluation_records_the_right_answers_to_every_problem(undisturbed):
    for e in records.read_run(undisturbed).evals:
        assert len(e.right) == e.num_problems and all(0 <= s <= e.num_samples for s in e.right)
        assert sum(e.right) / (e.num_problems * e.num_samples) == pytest.approx(e.pass1)


def test_evaluations_are_log_spaced_and_hold_both_ends():
    def steps(count, last):
        return eval_steps(RunConfig(steps=last, evaluation={"count": count}))

    assert steps(0, 100) == [] and steps(1, 100) == [100] and steps(2, 100) == [0, 100]
    assert steps(5, 100) == [0, 1, 5, 22, 100]
    assert steps(12, 3) == [0, 1, 2, 3]
