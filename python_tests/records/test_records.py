import dataclasses
import json
import math
import re
import subprocess

import pytest
import torch
from conftest import ROOT

from grpo_engine.records import jsonl, records
from grpo_engine.records.jsonl import JsonlWriter
from grpo_engine.records.records import EvalRecord, PhaseCost, StepRecord, TimingRecord
from grpo_engine.records.table import TABLE_COLUMNS, runs_table, table_schema
from grpo_engine.system import machine

STEP = StepRecord(step=1, prompts_seen=64, unique_prompts=60, trained_tokens=6000, compute_6nt=1e9, compute_ledger=2e9)
EVAL = EvalRecord(
    step=0, prompts_seen=0, unique_prompts=0, trained_tokens=0, compute_6nt=0.0, compute_ledger=0.0, eval_set="chain",
    in_domain=True, mode="sample", temperature=0.7, num_problems=500, num_samples=4, pass1=0.25, loss=0.75,
    stderr=0.01, by_grade={"0": {"pass1": 0.5, "n": 250}}, right=[4, 0],
)  # fmt: skip
HEADER = {
    "run_id": "abc", "method": "grpo", "config": {"seed": 3, "batch": {"group_size": 8}},
    "model": {"name": "s", "kind": "base", "size": "s", "params_non_embedding": 100, "params_nominal": None,
              "params_total": 200},
}  # fmt: skip


def make_run(folder, *, steps=2, done=True):
    folder.mkdir(parents=True)
    jsonl.write_json_atomic(folder / "run.json", HEADER)
    with JsonlWriter(folder / "steps.jsonl") as out:
        for step in range(1, steps + 1):
            out.write(
                StepRecord(
                    step=step, prompts_seen=64 * step, unique_prompts=32, trained_tokens=step, compute_6nt=1.0,
                    compute_ledger=2.0,
                )
            )  # fmt: skip
    with JsonlWriter(folder / "evals.jsonl") as out:
        out.write(EVAL)
    with JsonlWriter(folder / "timings.jsonl") as out:
        out.write(TimingRecord(step=1, phase={"decode": PhaseCost(seconds=0.5, tokens=10, flops=1e6)}))
    if done:
        jsonl.write_json_atomic(folder / "summary.json", {"run_id": "abc", "steps": steps})
    return folder


@pytest.mark.parametrize(
    "record",
    [STEP, EVAL, TimingRecord(step=1, phase={"reward": PhaseCost(seconds=0.1)})],
    ids=lambda r: type(r).__name__,
)
def test_a_record_survives_the_round_trip(record):
    line = json.dumps(jsonl.to_json(record))
    assert list(json.loads(line))[0] == "schema"
    assert jsonl.from_json(type(record), json.loads(line)) == record


def test_a_record_of_the_first_schema_is_read():
    line = jsonl.to_json(EVAL)
    old = {k: v for k, v in line.items() if k != "right"} | {"schema": 1}
    assert jsonl.from_json(EvalRecord, old) == EvalRecord(**(vars_of(EVAL) | {"right": None}))
    assert jsonl.from_json(EvalRecord, line | {"right": [4, 0, 1]}).right == [4, 0, 1]


@pytest.mark.parametrize("schema", [1, 2])
def test_a_field_of_an_older_schema_gets_its_name_of_today(schema):
    step = dataclasses.replace(STEP, zero_variance_groups=9)
    line = jsonl.to_json(step)
    old = {"equal_groups" if k == "zero_variance_groups" else k: v for k, v in line.items()} | {"schema": schema}
    assert "equal_groups" in old and jsonl.from_json(StepRecord, old) == step
    with pytest.raises(ValueError, match="StepRecord has no field equal_groups"):
        jsonl.from_json(StepRecord, old | {"schema": jsonl.SCHEMA})


def test_a_non_finite_number_is_null_and_named(tmp_path):
    with JsonlWriter(tmp_path / "x.jsonl") as out:
        out.write({"step": 1, "loss": math.nan, "deep": {"kl": -math.inf}, "list": [1.0, math.inf]})
    (obj,) = jsonl.read_jsonl(tmp_path / "x.jsonl").records
    assert obj == {
        "schema": 3, "step": 1, "loss": None, "deep": {"kl": None}, "list": [1.0, None],
        "non_finite": {"loss": "nan", "deep.kl": "-inf", "list[1]": "inf"},
    }  # fmt: skip


def test_a_non_finite_number_comes_back_as_itself():
    obj = jsonl.to_json(StepRecord(**{**vars_of(STEP), "loss": math.inf, "kl": None}))
    back = jsonl.from_json(StepRecord, obj)
    assert back.loss == math.inf and back.kl is None


def test_a_non_finite_number_comes_back_at_any_depth():
    record = TimingRecord(step=1, phase={"decode": PhaseCost(seconds=math.inf, flops=-math.inf)})
    assert jsonl.from_json(TimingRecord, json.loads(json.dumps(jsonl.to_json(record)))) == record


def vars_of(record):
    return {name: getattr(record, name) for name in type(record).__dataclass_fields__}


def test_a_tensor_of_one_element_is_a_number_and_a_larger_one_an_error():
    assert jsonl.to_json({"x": torch.tensor(2.5)})["x"] == 2.5
    with pytest.raises(TypeError, match=r"to_json: a\.b is a set"):
        jsonl.to_json({"a": {"b": {1}}})


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"schema": 4}, ValueError, r"f:3: schema must be one of \(1, 2, 3\), got 4"),
        ({"step": "1"}, TypeError, "StepRecord.step must be int, got '1'"),
        ({"step": True}, TypeError, "StepRecord.step must be int, got True"),
        ({"speed": 1}, ValueError, "StepRecord has no field speed"),
        ({"step": None}, TypeError, "StepRecord.step must be int, got None"),
        ({"step": 1.0}, TypeError, r"StepRecord.step must be int, got 1\.0"),
        ({"loss": True}, TypeError, r"f:3: StepRecord.loss must be float \| None, got True"),
    ],
)
def test_from_json_names_the_field(change, error, message):
    with pytest.raises(error, match=message):
        jsonl.from_json(StepRecord, jsonl.to_json(STEP) | change, where="f:3")


def test_from_json_names_a_place_within_a_record():
    for cost, error, message in (
        ({"seconds": 1, "tokens": "3"}, TypeError, "TimingRecord.phase.decode.tokens must be int, got '3'"),
        ({"seconds": 1, "second": 1}, ValueError, "TimingRecord.phase.decode has no field second"),
        ({"tokens": 3}, ValueError, "TimingRecord.phase.decode lacks seconds"),
    ):
        with pytest.raises(error, match=message):
            jsonl.from_json(TimingRecord, {"schema": 2, "step": 1, "phase": {"decode": cost}})


def test_from_json_names_a_missing_field():
    obj = jsonl.to_json(STEP)
    del obj["compute_6nt"]
    with pytest.raises(ValueError, match="StepRecord lacks compute_6nt"):
        jsonl.from_json(StepRecord, obj)


def test_truncating_puts_the_file_back_byte_for_byte(tmp_path):
    path = tmp_path / "steps.jsonl"
    with JsonlWriter(path) as out:
        out.write({"step": 1})
        out.sync()
        kept = out.num_bytes
        out.write({"step": 2})
    before = path.read_bytes()
    path.write_bytes(before + b'{"step": 3, "torn')
    with JsonlWriter(path, truncate_to=kept) as out:
        out.write({"step": 2})
    assert path.read_bytes() == before


@pytest.mark.parametrize("length, message", [(1000, "must be in 0..SIZE"), (5, "byte 5 does not end a record")])
def test_truncating_where_no_record_ends_is_an_error(tmp_path, length, message):
    path = tmp_path / "steps.jsonl"
    with JsonlWriter(path) as out:
        out.write({"step": 1})
        size = out.num_bytes
    assert size == path.stat().st_size
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message.replace("SIZE", str(size))):
        JsonlWriter(path, truncate_to=length)
    assert path.read_bytes() == before


def test_every_write_is_visible_at_once(tmp_path):
    with JsonlWriter(tmp_path / "x.jsonl") as out:
        out.write({"step": 1})
        assert len(jsonl.read_jsonl(tmp_path / "x.jsonl").records) == 1


def test_a_record_that_cannot_be_written_leaves_the_file_unchanged(tmp_path):
    with JsonlWriter(tmp_path / "x.jsonl") as out:
        with pytest.raises(TypeError):
            out.write({"a": 1, "b": object()})
        assert out.num_bytes == 0


@pytest.mark.parametrize(
    "text, line",
    [(b'{"a":1}\n{"a":\n{"a":2}\n', 2), (b'[1]\n{"a":2}\n', 1), (b'{"a":1}\n\xff\xfe\n', 2), (b'{"a":1}\nnull\n', 2)],
)
def test_a_malformed_line_is_named_even_where_a_torn_one_is_allowed(tmp_path, text, line):
    (tmp_path / "x.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=rf"x\.jsonl:{line}: the record is not"):
        jsonl.read_jsonl(tmp_path / "x.jsonl", allow_torn=True)


def test_a_torn_last_line_is_reported_or_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"a":1}\n{"a":2}')  # whole, but the line end is what makes it whole
    read = jsonl.read_jsonl(tmp_path / "x.jsonl", allow_torn=True)
    assert read.records == [{"a": 1}]
    assert "x.jsonl:2: the record is cut short" in read.torn
    with pytest.raises(ValueError, match=r"x\.jsonl:2: the record is cut short"):
        jsonl.read_jsonl(tmp_path / "x.jsonl")


def test_an_empty_file_has_no_records(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"")
    assert jsonl.read_jsonl(tmp_path / "x.jsonl") == jsonl.JsonlFile(records=[])


def test_an_atomic_write_replaces_or_leaves(tmp_path):
    path = tmp_path / "run.json"
    jsonl.write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError):
        jsonl.write_json_atomic(path, {"a": object()})
    assert jsonl.read_json(path) == {"schema": 3, "a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_read_run_gives_typed_records(tmp_path):
    run = records.read_run(make_run(tmp_path / "r"))
    assert run.complete and run.steps[-1].prompts_seen == 128 and run.evals == [EVAL]
    assert run.timings[0].phase["decode"] == PhaseCost(seconds=0.5, tokens=10, flops=1e6)


def test_read_run_refuses_what_is_not_complete(tmp_path):
    folder = make_run(tmp_path / "r", done=False)
    with pytest.raises(ValueError, match="not complete"):
        records.read_run(folder)
    with open(folder / "steps.jsonl", "ab") as out:
        out.write(b'{"schema":1,"st')
    run = records.read_run(folder, allow_incomplete=True)
    assert not run.complete and len(run.steps) == 2 and "steps.jsonl:3" in run.notes[0]


def test_a_complete_run_with_a_torn_line_is_an_error(tmp_path):
    folder = make_run(tmp_path / "r")
    with open(folder / "steps.jsonl", "ab") as out:
        out.write(b'{"schema":1,"st')
    with pytest.raises(ValueError, match=r"steps\.jsonl:3: the record is cut short"):
        records.read_run(folder)


def test_a_summary_that_the_steps_contradict_is_an_error(tmp_path):
    folder = make_run(tmp_path / "r")
    jsonl.write_json_atomic(folder / "summary.json", {"run_id": "abc", "steps": 5})
    with pytest.raises(ValueError, match=r"the last step must be 5 \(summary.json\), got 2"):
        records.read_run(folder)


def test_steps_must_rise(tmp_path):
    folder = make_run(tmp_path / "r", done=False)
    with JsonlWriter(folder / "steps.jsonl") as out:
        out.write(STEP)
    with pytest.raises(ValueError, match="steps must rise"):
        records.read_run(folder, allow_incomplete=True)


def test_the_table_has_the_declared_columns(tmp_path):
    table = runs_table([make_run(tmp_path / "r")])
    assert tuple(table.column_names) == (*TABLE_COLUMNS, "right")
    row = table.to_pylist()[0]
    assert (row["study"], row["cell"], row["seed"], row["group_size"]) == (None, "r", 3, 8)
    assert row["tau"] == 4.0  # 128 prompts seen, 32 different ones
    assert row["loss"] == 0.75 and row["params_nominal"] is None


def test_the_table_takes_study_cell_and_tau_from_the_cell_file(tmp_path):
    folder = make_run(tmp_path / "r")
    jsonl.write_json_atomic(folder / "cell.json", {"study": "demo", "cell": "c1", "tau": 2.0})
    row = runs_table([folder]).to_pylist()[0]
    assert (row["study"], row["cell"], row["tau"]) == ("demo", "c1", 2.0)


def test_the_table_names_what_a_header_lacks(tmp_path):
    folder = make_run(tmp_path / "r")
    header = {k: v for k, v in HEADER.items() if k != "method"}
    jsonl.write_json_atomic(folder / "run.json", header)
    with pytest.raises(KeyError, match="run.json: no 'method'"):
        runs_table([folder])


def test_an_empty_table_keeps_its_schema():
    assert runs_table([]).schema.equals(table_schema())


def test_the_run_id_is_that_of_the_content():
    assert records.run_id({"a": 1, "b": {"c": 2}}) == records.run_id({"b": {"c": 2}, "a": 1})
    assert records.run_id({"a": 1}) != records.run_id({"a": 2})
    assert len(records.run_id({})) == 12


def test_the_source_is_a_commit_or_a_wheel(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    package = tmp_path / "package"
    package.mkdir()
    wheel = machine.collect_source(package)
    assert wheel["commit"] is None and re.fullmatch("[0-9a-f]{64}", wheel["wheel"])
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert machine.collect_source(package) == {"commit": commit, "wheel": None}
    here = machine.collect_source()  # of this package: a checkout, or what is installed
    assert (here["commit"] is None) == (not (ROOT / ".git").exists()) and (here["wheel"] is None) != (here["commit"] is None)
    (package / "changed.py").write_text("")
    subprocess.run([*git, "add", "."], check=True)
    assert machine.collect_source(package)["commit"] == f"{commit}-dirty"


def test_versions_and_hardware_can_be_written():
    text = json.dumps(jsonl.to_json(machine.collect_versions() | machine.collect_hardware()))
    assert torch.__version__ in text and json.loads(text)["cores"] >= 1
