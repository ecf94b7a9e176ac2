"""Logs of other frameworks, in the forms that they write them, and the same logs broken."""

import json

import pyarrow as pa
import pytest
from law_tables import SIZES, law_table

from grpo_engine.records.table import table_schema
from grpo_engine.study import importers
from grpo_engine.study.importers import RunInfo
from grpo_engine.study.laws import fit

RUN = RunInfo(size="7B", params_non_embedding=6_530_000_000, prompts_per_step=512, group_size=8, temperature=0.7)


def put(path, text):
    path.write_text(text)
    return path


def steps(table, name):
    return [(r["step"], r[name]) for r in table.to_pylist()]


# ---------------------------------------------------------------------------------------- generic CSV


def test_csv_round_trip_gives_the_same_fit(tmp_path):
    table = law_table(noise=0.01)
    names = ("size", "params_non_embedding", "step", "prompts_seen", "trained_tokens", "loss", "run_id", "seed")
    lines = ["N_label,N,global_step,D,T,err,run,seed"]
    lines += [",".join("" if r[n] is None else repr(r[n]) if n == "loss" else str(r[n]) for n in names)
              for r in table.to_pylist()]  # fmt: skip
    path = put(tmp_path / "runs.csv", "\n".join(lines) + "\n")
    columns = dict(zip(names, ("N_label", "N", "global_step", "D", "T", "err", "run", "seed"), strict=True))
    constants = {"group_size": 8, "temperature": 0.7, "eval_set": "chain"}
    got = importers.read_csv(path, columns=columns, constants=constants)
    assert got.schema.equals(table_schema())
    for axis in ("data", "compute"):
        a, b = (fit.fit_axis(t, axis=axis, n_boot=20, shapes=False) for t in (table, got))
        assert a.joint.parameters["K_max"].value == pytest.approx(b.joint.parameters["K_max"].value, rel=1e-9)
        assert a.joint.parameters["N0"].low == pytest.approx(b.joint.parameters["N0"].low, rel=1e-6)


def test_csv_fills_in_what_follows(tmp_path):
    path = put(tmp_path / "a.csv", "\ufeffstep,acc,ood\n0,0.2,false\n5,,true\n10, 0.5 ,True\n")
    got = importers.read_csv(
        path, columns={"step": "step", "pass1": "acc", "in_domain": "ood"}, constants={"size": "3B", "seed": 4},
        prompts_per_step=64,
    ).to_pylist()  # fmt: skip
    assert [(r["step"], r["prompts_seen"], r["loss"], r["in_domain"]) for r in got] == [
        (0, 0, 0.8, False), (10, 640, 0.5, True),
    ]  # fmt: skip
    assert {r["run_id"] for r in got} == {"a-3B-base-4"}
    assert got[0]["compute_6nt"] is None and got[0]["method"] == "grpo" and got[0]["eval_set"] == "eval"


def test_broken_csv_names_file_column_and_row(tmp_path):
    ok = {"columns": {"step": "step", "pass1": "acc"}, "constants": {"size": "3B"}}
    for text, options, message in (
        ("", ok, r"a.csv: is empty"),
        ("step,acc\n1,0.5\n", {"columns": {"step": "step"}, "constants": {"size": "m"}}, "one of pass1 and loss"),
        ("step,acc\n1,0.5\n", {"columns": {"step": "step", "pass1": "acc"}}, "size must be given"),
        ("step,acc\n1,0.5\n", ok | {"columns": {"step": "step", "pass1": "score"}},
         r"a.csv: no column 'score' \(wanted for pass1\); there are step, acc"),
        ("step,acc\n1,0.5\n", ok | {"columns": {"step": "step", "reward": "acc"}}, "'reward' is no column"),
        ("step,acc\n1,0.5\n", ok | {"constants": {"size": "m", "sise": 1}}, "constants: 'sise' is no column"),
        ("step,acc\n1,0.5\n", ok | {"constants": {"size": "m", "step": 1}}, "'step' is given by columns too"),
        ("step,acc\n1,0.5\n2,high\n", ok, r"a.csv:3: column 'acc': must be a number, got 'high'"),
        ("step,acc\n1,0.5\n2,1.2\n", ok, r"a.csv:3: column 'acc': must be a pass rate between 0 and 1, got 1.2"),
        ("step,acc\n1,nan\n", ok, r"a.csv:2: column 'acc': must be finite, got 'nan'"),
        ("step,acc\n1.5,0.5\n", ok, r"a.csv:2: column 'step': must be a whole number, got '1.5'"),
        ("step,acc\n,0.5\n", ok, r"a.csv:2: column 'step': step must not be empty"),
        ("step,acc\n1,0.5,7\n", ok, r"a.csv:2: has 3 fields, the header 2"),
        ("step,step\n1,0.5\n", ok, "names 'step' twice"),
        ("step,acc\n1,\n", ok, "a.csv: holds no evaluation"),
        ("step,acc,l\n1,0.5,0.6\n", ok | {"columns": {"step": "step", "pass1": "acc", "loss": "l"}},
         "pass1 0.5 and loss 0.6 must add up to 1"),
        ("step,acc,d\n1,0.5,yes\n", ok | {"columns": {"step": "step", "pass1": "acc", "in_domain": "d"}},
         r"column 'd': must be true or false, got 'yes'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            importers.read_csv(put(tmp_path / "a.csv", text), **options)
    with pytest.raises(FileNotFoundError, match="none.csv"):
        importers.read_csv(tmp_path / "none.csv", **ok)


# ------------------------------------------------------------------------------------------------- TRL


def trl_state():
    """As GRPOTrainer writes it: training lines with a running num_tokens, evaluation lines with eval_ keys."""
    log = [{"eval_reward": 0.2, "eval_rewards/accuracy_reward/mean": 0.2, "eval_num_tokens": 0, "epoch": 0, "step": 0}]
    for step in range(1, 5):
        log.append(
            {"loss": 0.01, "num_tokens": 1000.0 * step, "reward": 0.3, "rewards/accuracy_reward/mean": 0.3,
             "completions/mean_length": 90.0, "epoch": 0.1 * step, "step": step}
        )  # fmt: skip
        if step % 2 == 0:
            log.append({"eval_rewards/accuracy_reward/mean": 0.2 + 0.05 * step, "eval_runtime": 3.0, "step": step})
    log.append({"train_runtime": 10.0, "total_flos": 0.0, "step": 4})
    return {"global_step": 4, "log_history": log}


def test_trl(tmp_path):
    path = put(tmp_path / "trainer_state.json", json.dumps(trl_state()))
    got = importers.read_trl(path, run=RUN)
    assert steps(got, "pass1") == [(0, 0.2), (2, pytest.approx(0.3)), (4, pytest.approx(0.4))]
    assert steps(got, "trained_tokens") == [(0, 0), (2, 2000), (4, 4000)]
    assert steps(got, "compute_6nt")[1] == (2, pytest.approx(6 * 6.53e9 * 2000))
    assert steps(got, "prompts_seen") == [(0, 0), (2, 1024), (4, 2048)]
    row = got.to_pylist()[0]
    assert (row["eval_set"], row["run_id"], row["kind"]) == ("accuracy_reward", tmp_path.name, "base")


def test_trl_folder_and_bare_list(tmp_path):
    """The checkpoint that got farthest counts."""
    state = trl_state()
    for name, upto in (("checkpoint-2", 2), ("checkpoint-4", 4)):
        (tmp_path / name).mkdir()
        part = [e for e in state["log_history"] if e["step"] <= upto]
        put(tmp_path / name / "trainer_state.json", json.dumps({"log_history": part}))
    assert importers.read_trl(tmp_path, run=RUN).num_rows == 3
    bare = put(tmp_path / "log.json", json.dumps(state["log_history"]))
    named = importers.read_trl(bare, run=RUN, metrics={"held": "eval_reward"}, out_of_domain=["held"])
    assert [(r["step"], r["in_domain"], r["run_id"]) for r in named.to_pylist()] == [(0, False, "log")]


def test_broken_trl(tmp_path):
    log = trl_state()["log_history"]
    for obj, options, message in (
        ("{", {}, "not JSON"),
        ({"steps": 3}, {}, "must hold an object with a list log_history"),
        ({"log_history": log[1:2]}, {}, r"the log has 0: \[\]"),
        ({"log_history": [log[0] | {"eval_rewards/format/mean": 1.0}]}, {}, "metrics must be named; .* the log has 2"),
        ({"log_history": log}, {"metrics": {"a": "eval_score"}}, r"state.json \(eval_score\): holds no evaluation"),
        ({"log_history": log}, {"metrics": {}}, "metrics must name at least one"),
        ({"log_history": log}, {"out_of_domain": ["code"]}, "out_of_domain: code is not among the sets"),
        ({"log_history": [{"eval_rewards/r/mean": 1.7, "step": 1}]}, {},
         r"log_history\[0\], eval_rewards/r/mean: must be a pass rate between 0 and 1, got 1.7"),
        ({"log_history": [{"eval_rewards/r/mean": 0.5}]}, {}, r"log_history\[0\]: no step"),
        ({"log_history": [{"eval_rewards/r/mean": 0.5, "step": -1}]}, {}, r"log_history\[0\], step: must not be negative"),
    ):  # fmt: skip
        path = put(tmp_path / "trainer_state.json", obj if isinstance(obj, str) else json.dumps(obj))
        with pytest.raises(ValueError, match=message):
            importers.read_trl(path, run=RUN, **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no trainer_state.json"):
        importers.read_trl(tmp_path / "empty", run=RUN)


def test_trl_step_that_was_evaluated_twice(tmp_path, caplog):
    """By the trainer, and by the script when the training has ended."""
    log = [*trl_state()["log_history"], {"eval_rewards/accuracy_reward/mean": 0.41, "step": 4}]
    got = importers.read_trl(put(tmp_path / "log.json", json.dumps(log)), run=RUN)
    assert steps(got, "pass1") == [(0, 0.2), (2, pytest.approx(0.3)), (4, 0.41)]
    assert steps(got, "trained_tokens")[-1] == (4, 4000)
    assert "evaluations of a step that was evaluated before: 1" in caplog.text


def test_trl_steps_that_were_run_again(tmp_path, caplog):
    """Resumed from step 2 in a log that goes on: step 3 is evaluated anew, what step 4 gave before does not count."""
    again = [{"loss": 0.01, "num_tokens": 2900.0, "step": 3}, {"eval_rewards/accuracy_reward/mean": 0.5, "step": 3}]
    log = trl_state()["log_history"] + again
    got = importers.read_trl(put(tmp_path / "log.json", json.dumps(log)), run=RUN)
    assert steps(got, "pass1") == [(0, 0.2), (2, pytest.approx(0.3)), (3, 0.5)]
    assert steps(got, "trained_tokens")[-1] == (3, 2900)
    assert "evaluations of steps that were run again later: 1" in caplog.text


def trl_counts(*counts, evaluated):
    """Entries of (step, num_tokens), each followed by an evaluation where it is wanted."""
    log = []
    for step, tokens in counts:
        log.append({"loss": 0.1, "num_tokens": tokens, "step": step})
        if step in evaluated:
            log.append({"eval_rewards/r/mean": 0.5, "step": step})
    return log


def test_trl_count_that_begins_anew_is_carried_on(tmp_path):
    for name, log, save_steps, want in (
        ("next", trl_counts((1, 1000), (2, 2000), (3, 900), evaluated=(2, 3)), None, [(2, 2000), (3, 2900)]),
        ("twice", trl_counts((1, 1000), (2, 900), (3, 1800), (4, 100), evaluated=(3, 4)), None, [(3, 2800), (4, 2900)]),
        ("checkpoint", trl_counts((10, 1000), (20, 2000), (30, 900), evaluated=(30,)), 20, [(30, 2900)]),
        ("again", trl_counts((1, 1000), (2, 2000), (3, 3000), (3, 900), evaluated=(3,)), None, [(3, 2900)]),
    ):
        state = {"log_history": log} | ({"save_steps": save_steps} if save_steps else {})
        got = importers.read_trl(put(tmp_path / f"{name}.json", json.dumps(state)), run=RUN)
        assert steps(got, "trained_tokens") == want, name


def test_trl_count_that_begins_anew_at_an_unknown_step_is_refused(tmp_path):
    log = trl_counts((10, 1000), (20, 2000), (30, 900), evaluated=(30,))
    path = put(tmp_path / "a.json", json.dumps({"log_history": log, "save_steps": 15}))
    with pytest.raises(
        ValueError, match=r"log_history\[2\], num_tokens: must not fall .* got 900 at step 30 after 2000 at s"
    ):
        importers.read_trl(path, run=RUN)


# ------------------------------------------------------------------------------------------------ verl

VAL = "val-core/math/reward/mean@4"


def verl_steps():
    """(step, metrics): validation before training, then at every second step."""
    out = [(0, {VAL: 0.1, "val-aux/math/reward/std@4": 0.2})]
    for step in range(1, 5):
        data = {"perf/total_num_tokens": 1000 + step, "critic/score/mean": 0.3, "training/global_step": step}
        out.append((step, data | ({VAL: 0.1 + 0.05 * step} if step % 2 == 0 else {})))
    return out


def as_jsonl(entries):
    return "".join(json.dumps({"step": s, "data": d}) + "\n" for s, d in entries)


def as_console(entries):
    lines = ["INFO 11-02 starting", "{'a': 1}", '{"config": {"x": 1}}']
    for step, data in entries:
        body = " - ".join(f"{k}:{v!r}" if "score" not in k else f"{k}:np.float64({v!r})" for k, v in data.items())
        lines.append(f"\x1b[36m(TaskRunner pid=77)\x1b[0m step:{step} - {body}")
        lines.append("Training Progress:  1%|          | 1/105 [00:30<52:00]")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("form", [as_jsonl, as_console])
def test_verl(tmp_path, form):
    got = importers.read_verl(put(tmp_path / "run.log", form(verl_steps())), run=RUN)
    assert steps(got, "pass1") == [(0, 0.1), (2, pytest.approx(0.2)), (4, pytest.approx(0.3))]
    assert steps(got, "trained_tokens") == [(0, 0), (2, 2003), (4, 4010)]
    assert got.to_pylist()[1]["compute_6nt"] == pytest.approx(6 * 6.53e9 * 2003)
    assert {(r["eval_set"], r["run_id"]) for r in got.to_pylist()} == {("math", "run")}


def test_verl_run_that_was_resumed(tmp_path):
    """Killed after step 4 and resumed from a checkpoint of step 2: steps 3 and 4 count once, as run again."""
    first = verl_steps()
    again = [(3, first[3][1] | {"perf/total_num_tokens": 7}), (4, first[4][1] | {VAL: 0.9, "perf/total_num_tokens": 5})]
    got = importers.read_verl(put(tmp_path / "run.jsonl", as_jsonl(first + again)), run=RUN)
    assert steps(got, "pass1")[-1] == (4, 0.9)
    assert steps(got, "trained_tokens")[-1] == (4, 2003 + 7 + 5)
    # a log that ends before it is at step 4 again: what step 4 gave before the kill is of no weights that there are
    got = importers.read_verl(put(tmp_path / "short.jsonl", as_jsonl(first + again[:1])), run=RUN)
    assert steps(got, "pass1") == [(0, 0.1), (2, pytest.approx(0.2))]


def test_verl_validates_before_it_trains_after_a_resumption(tmp_path):
    """The step of the checkpoint comes again, with validation alone: its tokens stay."""
    one = [(s, {"perf/total_num_tokens": 1000 * s, VAL: 0.1 * s}) for s in (1, 2, 3)]
    back, third = (2, {VAL: 0.25}), (3, {"perf/total_num_tokens": 50, VAL: 0.35})
    for name, entries, want in (
        ("resumed", [*one, back, third], [(1, 1000, 0.1), (2, 3000, 0.25), (3, 3050, 0.35)]),
        ("killed again", [*one, back, back, third], [(1, 1000, 0.1), (2, 3000, 0.25), (3, 3050, 0.35)]),
        ("not trained yet", [*one, back], [(1, 1000, 0.1), (2, 3000, 0.25), (3, 6000, 0.3)]),
        ("began anew", [(0, {VAL: 0.0}), *one, (0, {VAL: 0.05}), (1, {"perf/total_num_tokens": 7, VAL: 0.2})],
         [(0, 0, 0.05), (1, 7, 0.2)]),
    ):  # fmt: skip
        got = importers.read_verl(put(tmp_path / "run.jsonl", as_jsonl(entries)), run=RUN).to_pylist()
        rows = [(r["step"], r["trained_tokens"], pytest.approx(r["pass1"])) for r in got]
        assert rows == want, name


NOISE = {  # what other programs print into a console, and how many lines of it look like a step
    "response": ("[response] first step:1 - cost:5 - total:12\n", 1),
    "response with units": ("step:1 - km/h:60 - m/s:12\n", 1),
    "response that quotes": ("[response] step:1 - critic/score/mean:5\n", 1),
    "half a dict": ('{"step": 7, "thought": "let us\n', 1),
    "another's dict": ('{"step": 1, "data": {"cost": 5}}\n', 1),
    "a list": ('{"step": [1]}\n', 1),
    "no step": ("substep:1 - critic/score/mean:5\nstep: 1 of 5\n{'step': 3\n", 0),
    "zeros": ("\x00\x00\x00\n", 0),
}


@pytest.mark.parametrize("name", NOISE)
def test_verl_console_into_which_other_programs_print(tmp_path, caplog, name):
    text, count = NOISE[name]
    lines = as_console(verl_steps()).splitlines(keepends=True)
    middle = next(i for i, line in enumerate(lines) if "step:3 - " in line)
    got = importers.read_verl(put(tmp_path / "run.log", "".join([*lines[:middle], text, *lines[middle:], text])), run=RUN)
    assert steps(got, "pass1") == [(0, 0.1), (2, pytest.approx(0.2)), (4, pytest.approx(0.3))]
    assert steps(got, "trained_tokens") == [(0, 0), (2, 2003), (4, 4010)]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == (count > 0)
    if count:
        assert f"look like a step and have no metric of verl's: {2 * count}, the first at line {middle + 1}: " in said[0]


def test_verl_lines_that_share_a_line(tmp_path, caplog):
    """No line break before or behind them, a bar that writes over itself, and Ray's note that a line came again."""
    one, two, three, four, five = (
        " - ".join([f"step:{s}", *(f"{k}:{v!r}" for k, v in data.items())]) for s, data in verl_steps()
    )
    text = (
        f"Training Progress:  1%|  | 1/105 [00:30<52:00, 3.1it/s]{one}\n"
        f"{two}{three}\n"
        f" 2%|  | 2/105\r 3%|  | 3/105\r{four}Training Progress: 3%|  | 3/105 [00:30<52:00, 30.1s/it]\n"
        f"\x1b[2K\x1b[36m(TaskRunner pid=77, ip=10.0.0.1)\x1b[0m {five} [repeated 2x across cluster]\n"
    )
    got = importers.read_verl(put(tmp_path / "run.log", text), run=RUN)
    assert steps(got, "pass1") == [(0, 0.1), (2, pytest.approx(0.2)), (4, pytest.approx(0.3))]
    assert steps(got, "trained_tokens") == [(0, 0), (2, 2003), (4, 4010)]
    assert caplog.text == ""


def test_verl_line_that_is_damaged_is_said(tmp_path, caplog):
    text = as_console(verl_steps()).replace("num_tokens:1003", "num_to(Worker pid=3) hello")
    got = importers.read_verl(put(tmp_path / "run.log", text), run=RUN)
    assert steps(got, "trained_tokens") == [(0, 0), (2, 2003), (4, None)]
    assert "parts of verl's lines left out that are no KEY:NUMBER: 1, the first at line 10: " in caplog.text


def test_verl_keys_that_are_named_need_not_be_its_own(tmp_path):
    text = "step:0 - held:0.25\nstep:1 - cost:5\nstep:1 - held:0.5 - perf/total_num_tokens:10\n"
    got = importers.read_verl(put(tmp_path / "run.log", text), run=RUN, metrics={"math": "held"})
    assert steps(got, "pass1") == [(0, 0.25), (1, 0.5)]


def test_verl_sum_with_a_hole_is_no_sum(tmp_path):
    entries = [e for e in verl_steps() if e[0] != 3]
    got = importers.read_verl(put(tmp_path / "run.jsonl", as_jsonl(entries)), run=RUN)
    assert steps(got, "trained_tokens") == [(0, 0), (2, 2003), (4, None)]
    assert steps(got, "compute_6nt")[-1] == (4, None)
    assert steps(got, "prompts_seen")[-1] == (4, 2048)


def test_verl_weighted_sets_and_old_keys(tmp_path):
    entries = [(s, {"val/test_score/a": 0.2, "val/test_score/b": 0.6}) for s in (0, 1)]
    path = put(tmp_path / "run.jsonl", as_jsonl(entries))
    both = importers.read_verl(path, run=RUN)
    assert {r["eval_set"] for r in both.to_pylist()} == {"a", "b"}
    weights = {"val/test_score/a": 335, "val/test_score/b": 165}
    one = importers.read_verl(path, run=RUN, metrics={"holdout": weights})
    assert steps(one, "pass1")[0] == (0, pytest.approx((335 * 0.2 + 165 * 0.6) / 500))
    with pytest.raises(ValueError, match="weights must not be negative"):
        importers.read_verl(path, run=RUN, metrics={"holdout": {"val/test_score/a": 0, "val/test_score/b": 0}})
    half = put(tmp_path / "half.jsonl", as_jsonl([(1, {"val/test_score/a": 0.2})]))
    with pytest.raises(ValueError, match=r"half.jsonl:1: has val/test_score/a but not val/test_score/b"):
        importers.read_verl(half, run=RUN, metrics={"holdout": weights})


def test_broken_verl(tmp_path):
    for text, message in (
        ("hello\n", "holds no line of verl's"),
        (as_jsonl([(1, {"critic/score/mean": 0.3})]), "no key is val-core"),
        (as_jsonl([(1, {VAL: 0.1, "val-core/math/acc/mean@4": 0.1})]), "a set has several keys"),
        (as_jsonl(verl_steps())[:-20], r"a.jsonl:5: not JSON"),
        (as_jsonl([(1, {VAL: -1.0})]), r"a.jsonl:1, val-core/math/reward/mean@4: must be a pass rate .* got -1"),
        (as_jsonl([(1.5, {VAL: 0.1})]), r"a.jsonl:1, step: must be a whole number, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            importers.read_verl(put(tmp_path / "a.jsonl", text), run=RUN)


def test_reuse_factor(tmp_path):
    info = RunInfo(size="7B", prompts_per_step=512, dataset_prompts=1024)
    got = importers.read_verl(put(tmp_path / "run.jsonl", as_jsonl(verl_steps())), run=info)
    assert steps(got, "unique_prompts") == [(0, 0), (2, 1024), (4, 1024)]
    assert {r["tau"] for r in got.to_pylist()} == {2.0}  # of the whole run, at its end


# ----------------------------------------------------------------------------------------------- wandb


def test_wandb_history(tmp_path):
    text = "_step,_timestamp,val/acc,train/num_tokens\n0,1.0,0.1,\n1,2.0,,1000\n2,3.0,0.25,2000\n3,4.0,NaN,3000\n"
    got = importers.read_wandb_csv(
        put(tmp_path / "h.csv", text), runs=RUN, metrics={"held": "val/acc"}, tokens="train/num_tokens"
    )
    assert steps(got, "pass1") == [(0, 0.1), (2, 0.25)]
    assert steps(got, "trained_tokens") == [(0, 0), (2, 2000)]


def test_wandb_chart_of_several_runs(tmp_path):
    text = (
        '"Step","r7 - val/acc","r7 - val/acc__MIN","r7 - val/acc__MAX","r14 - val/acc","r14 - val/acc__MIN"\n'
        '"0","0.1","0.1","0.1","0.2","0.2"\n"5","0.3","0.3","0.3","",""\n"10","","","","0.5","0.5"\n'
    )
    got = importers.read_wandb_csv(
        put(tmp_path / "chart.csv", text), runs={"r7": RUN, "r14": RunInfo(size="14B")}, metrics={"held": "val/acc"}
    )
    assert [(r["run_id"], r["size"], r["step"], r["pass1"]) for r in got.to_pylist()] == [
        ("r7", "7B", 0, 0.1), ("r7", "7B", 5, 0.3), ("r14", "14B", 0, 0.2), ("r14", "14B", 10, 0.5),
    ]  # fmt: skip


def test_broken_wandb(tmp_path):
    metrics = {"held": "val/acc"}
    for text, options, message in (
        ("time,val/acc\n1,0.5\n", {}, "no column '_step' or 'Step'; name the step column of time, val/acc"),
        ("_step,acc\n1,0.5\n", {}, "h.csv: no column 'val/acc'; there are _step, acc"),
        ("_step,val/acc\n1,0.5\n", {"step": "global"}, "no column 'global'"),
        ("_step,val/acc\n1,0.5\n", {"runs": {"r7": RUN}}, "no column 'r7 - val/acc'"),
        ("_step,val/acc\n1,57.0\n", {}, r"h.csv:2, val/acc: must be a pass rate between 0 and 1, got 57"),
        ("_step,val/acc\nx,0.5\n", {}, r"h.csv:2: column '_step': must be a number, got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            importers.read_wandb_csv(put(tmp_path / "h.csv", text), **({"runs": RUN, "metrics": metrics} | options))


# ------------------------------------------------------------------------- what every reader holds to

ENCODINGS = {  # how a file begins, and the encoding of what follows
    "utf-8 with a mark": ("utf-8", b"\xef\xbb\xbf"),
    "utf-16-le": ("utf-16-le", b"\xff\xfe"),
    "utf-16-be": ("utf-16-be", b"\xfe\xff"),
    "utf-16-le without a mark": ("utf-16-le", b""),
    "utf-32": ("utf-32-le", b"\xff\xfe\x00\x00"),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_logs_in_other_encodings(tmp_path, name):
    encoding, mark = ENCODINGS[name]
    metrics = {"held": "acc"}
    for text, read, want in (
        (as_jsonl(verl_steps()), importers.read_verl, 3),
        (as_console([e for e in verl_steps() if e[0] != 1]).split("\n", 3)[3], importers.read_verl, 3),
        (json.dumps(trl_state()), importers.read_trl, 3),
        ("step\tacc\r\n0\t0.1\r\n5\t0.5\r\n", lambda p, run: importers.read_wandb_csv(p, runs=run, metrics=metrics), 2),
        ("step,acc\n0,0.1\n5,0.5\n",
         lambda p, run: importers.read_csv(p, columns={"step": "step", "pass1": "acc"}, constants={"size": run.size}), 2),
    ):  # fmt: skip
        path = tmp_path / "log"
        path.write_bytes(mark + text.encode(encoding))
        got = read(path, run=RUN)
        assert got.num_rows == want and steps(got, "step")[0] == (0, 0)


def test_marks_within_a_file_and_other_line_separators(tmp_path):
    """Two files with marks put together by cat; U+2028 in a string of JSON is no end of a line."""
    whole = as_jsonl(verl_steps()).splitlines(keepends=True)
    path = put(tmp_path / "a.jsonl", "\ufeff" + "".join(whole[:2]) + "\ufeff" + "".join(whole[2:]))
    assert importers.read_verl(path, run=RUN).num_rows == 3
    data = {VAL: 0.5, "note": "one\u2028two\x85three"}
    path = put(tmp_path / "b.jsonl", json.dumps({"step": 0, "data": data}, ensure_ascii=False) + "\n")
    assert importers.read_verl(path, run=RUN).num_rows == 1


def test_text_that_is_no_text_is_named_by_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("step,acc\n1,0.5\n2,é\n".encode("latin-1"))
    ok = {"columns": {"step": "step", "pass1": "acc"}, "constants": {"size": "3B"}}
    with pytest.raises(ValueError, match=r"a.csv:3: must be text in UTF-8, or in UTF-16 .* got byte 0xe9"):
        importers.read_csv(path, **ok)
    with pytest.raises(ValueError, match=r"a.csv:2: must be a line of CSV"):
        importers.read_csv(put(path, "step,acc\n1," + "9" * 200_000 + "\n"), **ok)
    with pytest.raises(ValueError, match="must be a file, got a folder"):
        importers.read_csv(tmp_path, **ok)


def test_a_step_twice_is_found_at_import(tmp_path):
    constants = {"size": "3B", "run_id": "r"}
    for text, columns, message in (
        ("step,acc\n1,0.5\n2,0.6\n1,0.5\n", {}, r"a.csv:4: step: run 'r' must have each step once, .*step 1 .*a.csv:2"),
        ("step,acc,size\n1,0.5,3B\n1,0.6,7B\n", {"size": "size"}, r"a.csv:3: step: run 'r' must have each step once"),
        ("step,acc,size\n1,0.5,3B\n2,0.6,7B\n", {"size": "size"}, r"a.csv:3: size: must be the same .*'7B' after '3B' at"),
        ("step,acc,seed\n1,0.5,0\n2,0.6,1\n", {"seed": "seed"}, r"a.csv:3: seed: must be the same in the whole run 'r'"),
    ):
        given = {k: v for k, v in constants.items() if k not in columns}
        with pytest.raises(ValueError, match=message):
            importers.read_csv(
                put(tmp_path / "a.csv", text), columns={"step": "step", "pass1": "acc"} | columns, constants=given
            )
    path = put(tmp_path / "h.csv", "_step,epoch,val/acc\n0,1,0.5\n1,1,0.5\n")
    with pytest.raises(ValueError, match=r"h.csv:3: step: run 'h' must have each step once, got held at step 1 a second"):
        importers.read_wandb_csv(path, runs=RUN, metrics={"held": "val/acc"}, step="epoch")
    # the same step of two sets, of two modes or of two runs is no step twice
    path = put(tmp_path / "b.csv", "step,acc,set,seed\n1,0.5,a,0\n1,0.6,b,0\n1,0.6,b,1\n")
    columns = {"step": "step", "pass1": "acc", "eval_set": "set", "seed": "seed"}
    assert importers.read_csv(path, columns=columns, constants={"size": "3B"}).num_rows == 3


def test_counts_that_fall_are_refused_by_line(tmp_path):
    for column in ("trained_tokens", "prompts_seen", "compute_6nt"):
        path = put(tmp_path / "a.csv", "step,acc,n\n3,0.5,900\n1,0.5,1000\n2,0.6,2000\n")
        with pytest.raises(ValueError, match=rf"a.csv:2: {column}: must not fall .* got 900 at step 3 after 2000 at step 2"):
            importers.read_csv(
                path, columns={"step": "step", "pass1": "acc", column: "n"}, constants={"size": "3B"}
            )  # fmt: skip
    # between evaluations too
    path = put(tmp_path / "h.csv", "_step,acc,n\n1,0.5,1000\n2,,2000\n3,,900\n4,0.6,5000\n")
    with pytest.raises(ValueError, match=r"h.csv:4: column 'n': must not fall .* got 900 after 2000 at line 3"):
        importers.read_wandb_csv(path, runs=RUN, metrics={"held": "acc"}, tokens="n")


def test_standard_errors_of_one_answer_to_each_problem(tmp_path):
    path = put(tmp_path / "a.csv", "step,acc\n1,0.2\n")
    for given, want in (({"num_problems": 101, "num_samples": 1}, 0.04), ({"num_problems": 101}, None),
                        ({"num_problems": 101, "num_samples": 4}, None)):  # fmt: skip
        got = importers.read_csv(
            path, columns={"step": "step", "pass1": "acc"}, constants={"size": "3B"} | given
        ).to_pylist()[0]  # fmt: skip
        assert got["stderr"] == (None if want is None else pytest.approx(want))


# -------------------------------------------------------------------------------------------- digitised


def test_digitized(tmp_path):
    text = "source,N_B,step,D,test_loss,test_loss_blind\nbase,0.5,1,512,0.97,0.98\nbase,72,1,512,0.7,0.71\n"
    path = put(tmp_path / "d.csv", text)
    rows = importers.read_digitized(path).to_pylist()
    assert [(r["size"], r["params_nominal"], r["loss"], r["prompts_seen"]) for r in rows] == [
        ("0.5B", 0.5e9, 0.97, 512), ("72B", 72e9, 0.7, 512),
    ]  # fmt: skip
    assert rows[0]["params_non_embedding"] is None and rows[0]["tau"] == 1.0
    assert importers.read_digitized(path, column="test_loss_blind").to_pylist()[1]["loss"] == 0.71
    with pytest.raises(ValueError, match="d.csv: no column 'loss'; there are"):
        importers.read_digitized(path, column="loss")
    with pytest.raises(ValueError, match=r"d.csv:2: column 'D': must be a number, got 'many'"):
        importers.read_digitized(put(tmp_path / "d.csv", text.replace("1,512,0.97", "1,many,0.97")))


def test_tables_of_several_sources_make_one_fit(tmp_path):
    """Five sizes of a planted law, one as a verl log, the others as they are."""
    whole = law_table(noise=0.003)
    part = [r for r in whole.to_pylist() if r["size"] == "m"]
    entries = [(r["step"], {"val-core/chain/acc/mean@4": r["pass1"]}) for r in part]
    info = RunInfo(size="m", params_non_embedding=int(SIZES["m"]), prompts_per_step=64, group_size=8, temperature=0.7,
                   run_id="m-base-0")  # fmt: skip
    read = importers.read_verl(put(tmp_path / "m.jsonl", as_jsonl(entries)), run=info)
    rest = pa.Table.from_pylist([r for r in whole.to_pylist() if r["size"] != "m"], schema=whole.schema)
    a = fit.fit_axis(whole, axis="data", n_boot=20, shapes=False)
    b = fit.fit_axis(pa.concat_tables([rest, read]), axis="data", n_boot=20, shapes=False)
    # the rows come in another order, so sums of the fit round differently
    for name, want in a.joint.parameters.items():
        got = b.joint.parameters[name]
        assert (got.value, got.low, got.high) == pytest.approx((want.value, want.low, want.high), rel=1e-6)
    assert b.joint.parameters.keys() == a.joint.parameters.keys()
