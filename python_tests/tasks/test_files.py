"""Files of problems: every format, both forms of a row, and the task that is made of them."""

import json
import logging
import math
import re
import types

import pyarrow
import pyarrow.parquet
import pytest

from grpo_engine.config import TaskConfig
from grpo_engine.load import load_task
from grpo_engine.rewards import SCORERS
from grpo_engine.tasks.files import DATA_SOURCES, data_source_of, files_task, read_problems

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


def save_to_disk(rows, path, shards=2):
    """What `datasets` leaves behind."""
    path.mkdir()
    table, files = pyarrow.Table.from_pylist(rows), []
    for shard in range(shards):
        first, last = (len(rows) * i // shards for i in (shard, shard + 1))
        files.append({"filename": f"data-{shard:05d}-of-{shards:05d}.arrow"})
        with pyarrow.ipc.new_stream(str(path / files[-1]["filename"]), table.schema) as stream:
            stream.write_table(table.slice(first, last - first))
    (path / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "0", "_split": None}))


WRITERS = {
    ".parquet": lambda rows, path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    ".jsonl": lambda rows, path: path.write_text("".join(json.dumps(r) + "\n" for r in rows)),
    "": save_to_disk,
}


@pytest.fixture
def write(tmp_path):
    def write(rows, name="problems.parquet"):
        path = tmp_path / name
        WRITERS[path.suffix](rows, path)
        return path

    return write


@pytest.fixture(params=WRITERS, ids=lambda ending: ending.lstrip(".") or "datasets")
def written(request, write):
    """`write`, to each format in turn."""
    return lambda rows, name="problems": write(rows, name + request.param)


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
        task = files_task(
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


def test_a_row(written):
    (p,) = read_problems(written([row(7)]))
    assert (p.prompt, p.answer, p.domain, p.reward, p.grade) == ("what is 7 + 1?", "8", "math", "math", None)
    assert p.info == {"data_source": "math__test", "index": 7, "some_pass_rate": 0.5, "pass_rate": 0.5}
    assert p.uid.startswith("math__test/")


def test_the_same_rows_are_the_same_problems_in_every_format(write):
    rows = [row(i) for i in range(5)]
    first, *others = (read_problems(write(rows, f"p{ending}")) for ending in WRITERS)
    assert [first] * len(others) == others and len(first) == 5


def test_a_plain_row(written):
    plain = {"question": "7 + 1?", "answer": "8", "pass_rate": 0.25}
    (p,) = read_problems(written([plain]))
    assert (p.prompt, p.answer, p.domain, p.reward) == ("7 + 1?", "8", "math", "math")
    assert p.info == {"data_source": "math__plain", "pass_rate": 0.25} and p.uid.startswith("math__plain/")
    named = {"problem": "Which?", "solution": "B", "data_source": "stem__supergpqa"}
    assert read_problems(written([named], "named"))[0].reward == "choice"


@pytest.mark.parametrize(
    ("plain", "prompt", "answer"),
    [
        ({"prompt": "a", "question": "b", "problem": "c", "answer": "1", "ground_truth": "2", "solution": "3"}, "a", "1"),
        ({"question": "b", "problem": "c", "ground_truth": "2", "solution": "3"}, "b", "2"),
        ({"prompt": None, "problem": "c", "answer": None, "solution": "so \\boxed{3}"}, "c", "so \\boxed{3}"),
        ({"prompt": [{"role": "user", "content": "a"}], "answer": 204}, "a", "204"),
        ({"prompt": "a", "answer": 0.5}, "a", "0.5"),
    ],
)
def test_names_of_plain_fields(write, plain, prompt, answer):
    (p,) = read_problems(write([plain], "p.jsonl"))
    assert (p.prompt, p.answer) == (prompt, answer)


def test_a_plain_solution_is_scored_by_its_end():
    from grpo_engine.rewards.math import score

    for solution in ("so \\boxed{3}", "1 + 2\n#### 3"):
        problem = types.SimpleNamespace(answer=solution, info={})
        assert score(r"\boxed{3}", problem) == 1.0 and score(r"\boxed{1}", problem) == 0.0


def test_empty_lines_are_passed_over_and_rows_may_differ(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "answer": "1"}\n\n{"problem": "b", "solution": "2", "x": [1]}\n')
    assert [p.prompt for p in read_problems(tmp_path / "p.jsonl")] == ["a", "b"]


def test_what_the_datasets_library_saves(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [row(i) for i in range(9)]
    shuffled = datasets.Dataset.from_list(rows).shuffle(seed=1)
    shuffled.save_to_disk(tmp_path / "one", num_shards=2)
    assert [p.prompt for p in read_problems(tmp_path / "one")] == [r["prompt"][0]["content"] for r in shuffled]
    datasets.DatasetDict(train=shuffled, test=shuffled).save_to_disk(tmp_path / "two")
    assert read_problems(tmp_path / "two" / "test") == read_problems(tmp_path / "one")
    assert read_problems(f"{tmp_path / 'two'}:train") == read_problems(tmp_path / "one")
    with pytest.raises(ValueError, match=r"two: holds the splits \['train', 'test'\]; name one of them: .*two:train"):
        read_problems(tmp_path / "two")


def test_extra_info_may_be_absent(written):
    rows = [row(i) for i in range(2)]
    for r in rows:
        del r["extra_info"]
    assert [p.info for p in read_problems(written(rows))] == [{"data_source": "math__test"}] * 2


def test_a_pass_rate_that_is_not_a_number_is_none(written):
    rows = [row(0, extra_info={"a_pass_rate": math.nan}), row(1, extra_info={"a_pass_rate": None})]
    assert [p.info["pass_rate"] for p in read_problems(written([*rows, row(2, extra_info={"a_pass_rate": 1.0})]))] == [
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


def test_rows_without_a_true_answer_are_left_out(written, caplog):
    rows = [row(0), *(row(i, reward_model={"style": "rule", "ground_truth": truth}) for i, truth in ((1, ""), (2, " \n")))]
    with caplog.at_level(logging.WARNING):
        assert [p.answer for p in read_problems(written(rows))] == ["1"]
    assert "2 of 3 rows have no true answer" in caplog.text and "repeat" not in caplog.text
    assert re.search("first .*problems.*: (row 1|line 2): reward_model.ground_truth is empty", caplog.text)
    with pytest.raises(ValueError, match="(row 0|line 1): reward_model.ground_truth is empty"):
        read_problems(written(rows[1:], "none"))


def test_families_name_scorers_that_exist():
    assert {f.reward for f in DATA_SOURCES.values()} <= SCORERS.keys()
    assert data_source_of("aimeamc2023").domain == "math"


# ------------------------------------------------------------------ tasks


def test_training_problems_that_are_tested_on_are_left_out(write, caplog):
    train = write([row(i) for i in range(6)], "train.parquet")
    shouted = row(3, prompt=[{"role": "user", "content": "WHAT is  3 + 1?\n"}])
    test = write([row(9), shouted], "test.parquet")
    with caplog.at_level(logging.WARNING):
        task = files_task(train=train, evals={"t": test})
    assert [p.answer for p in task.train] == ["1", "2", "3", "5", "6"]
    assert "1 of 6 training problems" in caplog.text
    # The training set does not depend on how much of the evaluation set is used.
    cut = files_task(train=train, evals={"t": test}, eval_problems=1)
    assert cut.train == task.train and len(cut.evals["t"].problems) == 1
    with pytest.raises(ValueError, match="every training problem"):
        files_task(train=test, evals={"t": test})


def test_a_curriculum_and_its_subsets_in_every_format(written):
    rates = [0.5, 0.1, 0.9, 0.5, 0.3, 0.7, 1.0, 0.0]
    path = written([row(i, extra_info={"a_pass_rate": rate}) for i, rate in enumerate(rates)])

    def answers(**changes):
        config = TaskConfig(name="files", train=str(path), **changes)
        return [int(p.answer) - 1 for p in load_task(config, seed=0, needed=8).train]

    easy_first = [6, 2, 5, 0, 3, 4, 1, 7]  # of equals the file's first
    assert answers() == list(range(8)) and answers(shuffle=False) == easy_first
    half = answers(shuffle=False, train_problems=4)
    assert half == [i for i in easy_first if i in half]
    quarters = {6, 2}, {5, 0, 3}, {0, 3, 4}, {1, 7}  # of the ranking, in which the equals 0 and 3 may change places
    assert all(i in quarter for i, quarter in zip(half, quarters, strict=True))
    assert set(answers(train_problems=2)) < set(half) == set(answers(train_problems=4))


def test_in_domain_goes_by_what_is_trained_on(write):
    letters = [row(i, data_source="stem__supergpqa", reward_model={"ground_truth": "B"}) for i in (20, 21)]
    stem, maths = write(letters, "stem.parquet"), write([row(1)], "math.parquet")
    both = write([row(30), letters[0] | {"prompt": [{"role": "user", "content": "?"}]}], "both.parquet")
    task = files_task(train=stem, evals={"math": maths, "both": both})
    assert {n: s.in_domain for n, s in task.evals.items()} == {"math": False, "both": False}
    task = files_task(train=both, evals={"math": maths, "stem": stem})
    assert {n: s.in_domain for n, s in task.evals.items()} == {"math": True, "stem": True}


# ------------------------------------------------------------------ faults are named


@pytest.mark.parametrize("ending", WRITERS)
def test_a_missing_file_is_named(tmp_path, ending):
    with pytest.raises(FileNotFoundError, match=f"nowhere{ending}"):
        read_problems(tmp_path / f"nowhere{ending}")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text.parquet", "hello", "text.parquet: not a readable parquet"),
        ("text.jsonl", '{"prompt": "a", "answer": "1"}\nhello\n', "text.jsonl: line 2: not JSON"),
        ("text.jsonl", "[1]\n", "text.jsonl: line 1: must be a JSON object, got list"),
        ("text.jsonl", b"\xff\n", "text.jsonl: not UTF-8"),
        ("text.csv", "prompt,answer\n", r"text.csv: problems are read from .parquet, .jsonl.* got '.csv'"),
        ("set/other.arrow", "", "set: no state.json there"),
        ("set/state.json", "{}", "set/state.json: _data_files must list file names, got None"),
        ("set/state.json", '{"_data_files": [{"filename": "absent.arrow"}]}', "absent.arrow: not a readable Arrow file"),
        ("set/dataset_dict.json", '{"splits": ["train"]}', r"set: holds the splits \['train'\]"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, said):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=said):
        read_problems(path if path.parent == tmp_path else path.parent)


@pytest.mark.parametrize("field", ["data_source", "prompt", "reward_model"])
def test_a_missing_field_is_named(written, field):
    without = row()
    del without[field]
    named = "answer .or ground_truth or solution, or reward_model." if field == "reward_model" else field
    with pytest.raises(ValueError, match=f"problems.*: (row 0|line 1): {named} is missing; there are "):
        read_problems(written([without]))


def test_an_empty_file_is_named(tmp_path):
    path = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row()]).slice(0, 0), path)
    (tmp_path / "empty.jsonl").write_text("\n")
    for file in (path, tmp_path / "empty.jsonl"):
        with pytest.raises(ValueError, match=f"{file.name}: the file holds no rows"):
            read_problems(file)


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"answer": "1"}, "prompt .or question or problem. is missing; there are answer"),
        ({"problem": "?", "answer": None}, "answer .*is missing"),
        ({"problem": " ", "answer": "1"}, "problem is empty"),
        ({"question": ["?"], "answer": "1"}, "question must be text or a list of messages"),
        ({"problem": "?", "answer": True}, "answer must be text or a number for math problems, got bool True"),
        ({"problem": "?", "answer": ["1"]}, "answer must be text or a number for math problems, got list"),
        ({"problem": "?", "answer": "1", "pass_rate": 2}, r"pass_rate must be a share in \[0, 1\], got int 2"),
        ({"problem": "?", "answer": "1", "data_source": "poetry"}, "unknown data_source 'poetry'"),
        ({"problem": "?", "ground_truth": "K", "data_source": "stem__supergpqa"}, "ground_truth must be a letter A to J"),
        ({"problem": "?", "answer": "x", "data_source": "codegen__humaneval"}, "answer: .*functional"),
    ],
)
def test_a_bad_plain_value_is_named(write, plain, said):
    with pytest.raises(ValueError, match=f"p.jsonl: line 2: {said}"):
        read_problems(write([{"problem": "!", "answer": "1"}, plain], "p.jsonl"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_source": "poetry"}, "unknown data_source 'poetry': choose its scorer"),
        ({"data_source": 3}, "data_source must be text, got int 3"),
        ({"data_source": None}, "data_source must be text, got NoneType"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": None}, "prompt must be text or a list of messages with role and content, got NoneType"),
        ({"prompt": []}, r"prompt must hold a user's message .*, got \[\]"),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt must be text or a list of messages"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, r"must hold a user's message .*\['assistant'\]"),
        ({"prompt": [{"role": r, "content": "x"} for r in ("user", "system")]}, "not end with a system message"),
        ({"prompt": [{"role": "user", "content": "  "}]}, "message is empty"),
        ({"reward_model": "7"}, "reward_model must hold a ground_truth"),
        ({"reward_model": {"style": "rule"}}, "reward_model must hold a ground_truth"),
        ({"reward_model": {"ground_truth": True}}, "must be text or a number for math problems, got bool True"),
        ({"reward_model": {"ground_truth": math.nan}}, "must be text or a number for math problems, got float nan"),
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


def test_the_row_is_named(written):
    with pytest.raises(ValueError, match="(row 2|line 3): reward_model must hold a ground_truth"):
        read_problems(written([row(0), row(1), row(2, reward_model={"style": "rule", "ground_truth": None})]))


@pytest.mark.parametrize("arguments", [{"eval_problems": 0}, {"eval_problems": -1}])
def test_a_bad_limit_is_named(write, arguments):
    path = write([row(0), row(1)])
    with pytest.raises(ValueError, match=next(iter(arguments))):
        files_task(train=path, evals={}, **arguments)
    with pytest.raises(ValueError, match="limit"):
        read_problems(path, limit=0)
