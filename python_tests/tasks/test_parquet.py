"""Problem files in verl's format."""

import json
import logging
import math

import pyarrow
import pyarrow.parquet
import pytest

from grpo_engine.rewards import SCORERS
from grpo_engine.tasks.parquet import FAMILIES, family_of, parquet_task, read_problems

EVALS = {  # file below guru_verl/online_eval: rows, domain, scorer
    "aime2024": (30, "math", "math"),
    "amc2023": (40, "math", "math"),
    "codegen__humaneval_164": (164, "code", "code"),
    "gsm8k": (1319, "math", "math"),
    "logic__zebra_puzzle_dataset_200": (200, "logic", "logic"),
    "math__math_500": (500, "math", "math"),
    "stem__supergpqa_200": (200, "stem", "choice"),
}
REUSE = {4: 12800, 10: 5120, 20: 2560, 25: 2048, 100: 512}


def row(number=0, **changes):
    return {
        "data_source": "math__test",
        "prompt": [{"role": "user", "content": f"what is {number} + 1?"}],
        "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
        "extra_info": {"index": number, "some_pass_rate": 0.5},
        **changes,
    }


@pytest.fixture
def write(tmp_path):
    def write(rows, name="problems.parquet"):
        path = tmp_path / name
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    return write


# ------------------------------------------------------------------ real files


@pytest.mark.parametrize("name", EVALS)
def test_benchmarks(real_data, name):
    rows, domain, reward = EVALS[name]
    problems = read_problems(real_data / "guru_verl/online_eval" / f"{name}.parquet")
    assert len(problems) == len({p.uid for p in problems}) == rows
    assert {(p.domain, p.reward) for p in problems} == {(domain, reward)}
    assert all(p.prompt.strip() and p.answer.strip() and p.info["data_source"] for p in problems)


def test_the_humaneval_prompts_are_read_as_the_messages_they_hold(real_data):
    problems = read_problems(real_data / "guru_verl/online_eval/codegen__humaneval_164.parquet")
    assert all(p.prompt.startswith("Write a complete, self-contained Python solution") for p in problems)
    assert problems[0].prompt.endswith("```") and "\n\ndef has_close_elements(" in problems[0].prompt


def test_zebra_answers_are_json_grids(real_data):
    for p in read_problems(real_data / "guru_verl/online_eval/logic__zebra_puzzle_dataset_200.parquet"):
        grid = json.loads(p.answer)
        assert grid["header"][0] == "Position" and {len(r) for r in grid["rows"]} == {len(grid["header"])}


def test_the_held_out_file_is_half_easy(real_data):
    rates = [p.info["pass_rate"] for p in
             read_problems(real_data / "math_curriculum/math__full_difficulty_ordered_test_500.parquet")]  # fmt: skip
    assert len(rates) == 500 and sum(r >= 0.3 for r in rates) == 250
    assert math.isclose(sum(rates) / 500, 0.2416, abs_tol=5e-5)


@pytest.mark.parametrize("reuse", REUSE)
def test_training_files_run_from_easy_to_hard(real_data, reuse):
    folder = real_data / "math_curriculum_sampled"
    problems = read_problems(folder / f"math__sampled_1_{reuse}_{REUSE[reuse]}.parquet")
    rates = [p.info["pass_rate"] for p in problems]
    assert len(problems) == REUSE[reuse] and rates == sorted(rates, reverse=True)


def test_the_same_problem_has_the_same_uid_in_every_file(real_data):
    folder = real_data / "math_curriculum_sampled"
    big = {p.uid: p.prompt for p in read_problems(folder / "math__sampled_1_4_12800.parquet")}
    small = read_problems(folder / "math__sampled_1_100_512.parquet")
    assert all(big[p.uid] == p.prompt for p in small)


def test_the_papers_task(real_data, caplog):
    folder = real_data / "guru_verl/online_eval"
    evals = {name: folder / f"{name}.parquet" for name in EVALS}
    evals["held_out"] = real_data / "math_curriculum/math__full_difficulty_ordered_test_500.parquet"
    with caplog.at_level(logging.WARNING):
        task = parquet_task(
            train=real_data / "math_curriculum_sampled/math__sampled_1_4_12800.parquet", evals=evals, eval_problems=100
        )
    assert len(task.train) == 12798 and "2 of 12800" in caplog.text
    assert {name for name, s in task.evals.items() if s.in_domain} == {
        "aime2024", "amc2023", "gsm8k", "math__math_500", "held_out"
    }  # fmt: skip
    assert {name: len(s.problems) for name, s in task.evals.items()} == {
        name: min(100, rows) for name, (rows, _, _) in EVALS.items()
    } | {"held_out": 100}
    prompts = {p.prompt for p in task.train}
    assert not any(p.prompt in prompts for s in task.evals.values() for p in s.problems)


# ------------------------------------------------------------------ what is read


def test_a_row(write):
    (p,) = read_problems(write([row(7)]))
    assert (p.prompt, p.answer, p.domain, p.reward, p.grade) == ("what is 7 + 1?", "8", "math", "math", None)
    assert p.info == {"data_source": "math__test", "index": 7, "some_pass_rate": 0.5, "pass_rate": 0.5}
    assert p.uid.startswith("math__test/")


def test_extra_info_may_be_absent(write):
    rows = [row(i) for i in range(2)]
    for r in rows:
        del r["extra_info"]
    assert [p.info for p in read_problems(write(rows))] == [{"data_source": "math__test"}] * 2


def test_a_pass_rate_that_is_not_a_number_is_none(write):
    rows = [row(0, extra_info={"a_pass_rate": math.nan}), row(1, extra_info={"a_pass_rate": None})]
    assert [p.info["pass_rate"] for p in read_problems(write([*rows, row(2, extra_info={"a_pass_rate": 1.0})]))] == [
        None, None, 1.0
    ]  # fmt: skip


def test_a_system_message_goes_before_the_prompt(write):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    (p,) = read_problems(write([row(prompt=messages)]))
    assert p.prompt == "Be brief.\n\n1 + 1?"


def test_a_question_that_begins_like_a_list_stays_as_it_is(write):
    text = "[{1, 2}, {3}] is a list of sets; how many?"
    (p,) = read_problems(write([row(prompt=[{"role": "user", "content": text}])]))
    assert p.prompt == text


def test_limit_spaces_evenly_and_keeps_the_order(write):
    path = write([row(i) for i in range(10)])
    assert [p.answer for p in read_problems(path, limit=4)] == ["1", "3", "6", "8"]
    assert [p.answer for p in read_problems(path, limit=1)] == ["1"]
    assert len(read_problems(path, limit=10)) == len(read_problems(path, limit=11)) == len(read_problems(path)) == 10


def test_repeated_rows_are_left_out(write, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(read_problems(write([row(0), row(1), row(0)]))) == 2
    assert "1 of 3 rows" in caplog.text


def test_families_name_scorers_that_exist():
    assert {f.reward for f in FAMILIES.values()} <= SCORERS.keys()
    assert family_of("aimeamc2023").domain == "math"


# ------------------------------------------------------------------ tasks


def test_training_problems_that_are_tested_on_are_left_out(write, caplog):
    train = write([row(i) for i in range(6)], "train.parquet")
    shouted = row(3, prompt=[{"role": "user", "content": "WHAT is  3 + 1?\n"}])
    test = write([row(9), shouted], "test.parquet")
    with caplog.at_level(logging.WARNING):
        task = parquet_task(train=train, evals={"t": test})
    assert [p.answer for p in task.train] == ["1", "2", "3", "5", "6"]
    assert "1 of 6 training problems" in caplog.text
    # The training set does not depend on how much of the evaluation set is used.
    cut = parquet_task(train=train, evals={"t": test}, eval_problems=1)
    assert cut.train == task.train and len(cut.evals["t"].problems) == 1
    with pytest.raises(ValueError, match="every training problem"):
        parquet_task(train=test, evals={"t": test})


def test_in_domain_goes_by_what_is_trained_on(write):
    letters = [row(i, data_source="stem__supergpqa", reward_model={"ground_truth": "B"}) for i in (20, 21)]
    stem, maths = write(letters, "stem.parquet"), write([row(1)], "math.parquet")
    both = write([row(30), letters[0] | {"prompt": [{"role": "user", "content": "?"}]}], "both.parquet")
    task = parquet_task(train=stem, evals={"math": maths, "both": both})
    assert {n: s.in_domain for n, s in task.evals.items()} == {"math": False, "both": False}
    task = parquet_task(train=both, evals={"math": maths, "stem": stem})
    assert {n: s.in_domain for n, s in task.evals.items()} == {"math": True, "stem": True}


# ------------------------------------------------------------------ faults are named


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.parquet"):
        read_problems(tmp_path / "nowhere.parquet")


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match="text.parquet: not a readable parquet"):
        read_problems(tmp_path / "text.parquet")


@pytest.mark.parametrize("column", ["data_source", "prompt", "reward_model"])
def test_a_missing_column_is_named(write, column):
    without = row()
    del without[column]
    with pytest.raises(ValueError, match=f"problems.parquet: column '{column}' is missing"):
        read_problems(write([without]))


def test_an_empty_file_is_named(tmp_path):
    path = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row()]).slice(0, 0), path)
    with pytest.raises(ValueError, match="empty.parquet: the file holds no rows"):
        read_problems(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_source": "poetry"}, "unknown data_source 'poetry': known ones begin with math__"),
        ({"data_source": 3}, "data_source must be text, got int 3"),
        ({"data_source": None}, "data_source must be text, got NoneType"),
        ({"prompt": "what?"}, "prompt must be a list of messages .* got str"),
        ({"prompt": None}, "prompt must be a list of messages"),
        ({"prompt": []}, "one user message"),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt must be a list of messages"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, r"one user message.*\['assistant'\]"),
        ({"prompt": [{"role": "user", "content": "  "}]}, "message is empty"),
        ({"reward_model": "7"}, "reward_model must hold a ground_truth"),
        ({"reward_model": {"style": "rule"}}, "reward_model must hold a ground_truth"),
        ({"reward_model": {"ground_truth": 7}}, "must be text for math problems, got int 7"),
        ({"reward_model": {"ground_truth": " "}}, "ground_truth is empty"),
        ({"data_source": "stem__supergpqa"}, "letter A to J, got str '1'"),
        ({"data_source": "codegen__humaneval"}, "functional"),
        ({"data_source": "logic__zebra_puzzle_dataset"}, "header and rows"),
        ({"extra_info": {"x_pass_rate": 1.5}}, r"extra_info.x_pass_rate must be a share in \[0, 1\], got float 1.5"),
        ({"extra_info": "none"}, "extra_info must hold named values"),
    ],
)
def test_a_bad_value_is_named(write, changes, said):
    with pytest.raises(ValueError, match=f"problems.parquet: row 0: .*{said}"):
        read_problems(write([row(0, **changes)]))


def test_the_row_is_named(write):
    with pytest.raises(ValueError, match="row 2: reward_model.ground_truth is empty"):
        read_problems(write([row(0), row(1), row(2, reward_model={"style": "rule", "ground_truth": ""})]))


@pytest.mark.parametrize("arguments", [{"eval_problems": 0}, {"eval_problems": -1}])
def test_a_bad_limit_is_named(write, arguments):
    path = write([row(0), row(1)])
    with pytest.raises(ValueError, match=next(iter(arguments))):
        parquet_task(train=path, evals={}, **arguments)
    with pytest.raises(ValueError, match="limit"):
        read_problems(path, limit=0)
