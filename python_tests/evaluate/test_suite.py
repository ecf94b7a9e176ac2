"""Suites: the statistics by hand, a table that does not show a kill, and prompts without room."""

import itertools
import json
import math
from pathlib import Path

import models
import pyarrow
import pyarrow.parquet as pq
import pytest

from grpo_engine.config import RunConfig, validate
from grpo_engine.evaluate import suite


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(k):
    right = [0, 1, 3, 5]
    by_hand = [
        sum(any(i < c for i in chosen) for chosen in itertools.combinations(range(5), k)) / math.comb(5, k) for c in right
    ]
    assert suite.pass_at_k(right, 5, k) == pytest.approx(sum(by_hand) / 4)


@pytest.mark.parametrize(("right", "k"), [([1], 0), ([1], 6), ([6], 1), ([-1], 1)])
def test_a_bad_k_or_count_is_named(right, k):
    with pytest.raises(ValueError, match=r"k must be in \[1, 5\]"):
        suite.pass_at_k(right, 5, k)


@pytest.mark.parametrize(
    ("votes", "right", "value"),
    [
        (["1", "2", "2"], [True, False, False], 0.0),
        (["1", "2", "2"], [False, True, True], 1.0),
        (["1", "2"], [True, False], 0.5),
        ([None, None, "1"], [False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
        ([], [], 0.0),
    ],
)
def test_the_majority_decides(votes, right, value):
    assert suite.majority(votes, right) == value


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    texts = ["what is one and two and three"]
    return models.save_qwen2(tmp_path_factory.mktemp("qwen"), texts, vocab=300, width=32, layers=1, heads=2, positions=64)


@pytest.fixture
def config(model, tmp_path):
    def file(name, source, truths):
        rows = [
            {"data_source": source, "prompt": [{"role": "user", "content": f"what is {i}" + " and" * 90 * (i == 5)}],
             "reward_model": {"ground_truth": truth}}
            for i, truth in enumerate(truths)
        ]  # fmt: skip
        pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        return str(tmp_path / name)

    source = "stem__supergpqa"
    files = {"words": file("a.parquet", source, "ABCDEFGHIJ"), "letters": file("b.parquet", source, "AB")}
    return validate(RunConfig, {
        "model": {"path": str(model)}, "rollout": {"max_new_tokens": 8, "max_running": 8}, "evaluation": {"samples": 4},
        "task": {"name": "files", "train": files["words"], "evals": files, "eval_problems": None},
        "reward": {"scoring": "paper"},  # draws letters, so that random text is right now and then
    })  # fmt: skip


def test_a_suite_that_was_killed_goes_on_and_gives_the_same_table(config, tmp_path):
    results = suite.evaluate_suite(config, tmp_path / "whole")
    assert [(r.eval_set, r.problems, r.samples, r.no_room) for r in results] == [("words", 10, 4, 1), ("letters", 2, 4, 0)]
    assert 0 < results[0].score < 1 and results[0].low <= results[0].score <= results[0].high

    class Killed(Exception):
        pass

    def kill(finished, total):
        if finished >= 20:
            raise Killed

    with pytest.raises(Killed):
        suite.evaluate_suite(config, tmp_path / "killed", progress=kill)
    answers = tmp_path / "killed" / suite.ANSWERS_FILE
    before = answers.read_text()
    assert 0 < before.count("\n") < 48
    answers.write_text(before + '{"eval_set": "wor')  # a line that the kill cut short
    totals = []
    suite.evaluate_suite(config, tmp_path / "killed", progress=lambda finished, total: totals.append(total))
    assert 0 < totals[-1] < 44  # what was answered is not answered again
    for name in ("table.json", "table.md", suite.PROBLEMS_FILE):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    suite.evaluate_suite(config, tmp_path / "killed", progress=lambda *_: pytest.fail("nothing is left to answer"))


def test_a_problem_with_some_of_its_answers_gets_all_of_them(config, tmp_path):
    """A kill between two answers to one problem."""
    suite.evaluate_suite(config, tmp_path)
    answers, table = tmp_path / suite.ANSWERS_FILE, (tmp_path / "table.json").read_bytes()
    lines = answers.read_text().splitlines(keepends=True)
    (last,) = [line for line in lines if all(json.loads(line)[k] == v for k, v in (("eval_set", "words"), ("problem", 3),
                                                                                  ("sample", 3)))]  # fmt: skip
    answers.write_text("".join(line for line in lines if line != last))
    totals = []
    suite.evaluate_suite(config, tmp_path, progress=lambda finished, total: totals.append(total))
    assert totals[-1] == 4 and (tmp_path / "table.json").read_bytes() == table


def test_the_table_is_what_the_problems_say(config, tmp_path):
    results = suite.evaluate_suite(config, tmp_path)
    rows = pq.read_table(tmp_path / suite.PROBLEMS_FILE).to_pylist()
    for r in results:
        scores = [row["score"] for row in rows if row["eval_set"] == r.eval_set]
        assert len(scores) == r.problems and r.score == pytest.approx(sum(scores) / len(scores))
        assert r.pass_at["1"] == pytest.approx(r.score) and r.pass_at["4"] >= r.pass_at["2"] >= r.pass_at["1"]
    assert [row["finish"] for row in rows if row["problem"] == 5] == [["prompt"] * 4]
    assert json.loads((tmp_path / "table.json").read_text())[0]["eval_set"] == "words"
    assert "| words | letters |" in (tmp_path / "table.md").read_text()


def test_a_set_may_be_several_files_or_a_pattern_and_their_bytes_count(config, tmp_path):
    words, letters = config.task.evals.values()
    sets = {"both": [words, letters], "pattern": str(tmp_path / "a*.parquet")}
    config = config.model_copy(update={"task": config.task.model_copy(update={"evals": sets})})
    results = suite.evaluate_suite(config, tmp_path / "out")
    assert [(r.eval_set, r.problems) for r in results] == [("both", 10), ("pattern", 10)]
    pq.write_table(pq.read_table(letters), letters, compression="none")
    with pytest.raises(ValueError, match=r"\(data differ\)"):
        suite.evaluate_suite(config, tmp_path / "out")


def test_another_suite_in_the_folder_is_refused(config, tmp_path):
    suite.evaluate_suite(config, tmp_path)
    with pytest.raises(ValueError, match="another suite"):
        suite.evaluate_suite(config.model_copy(update={"seed": 1}), tmp_path)
    weights = Path(config.model.path) / "model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(ValueError, match="another suite, model"):
            suite.evaluate_suite(config, tmp_path)
    finally:
        weights.write_bytes(kept)


def test_an_unknown_suite_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match="no suite 'papper': there is paper"):
        suite.suite_files("papper", tmp_path)
    with pytest.raises(FileNotFoundError, match="math__full_difficulty.*--data"):
        suite.suite_files("paper", tmp_path)


def test_the_papers_suite_has_its_eight_sets(real_data):
    from grpo_engine.tasks.files import read_problems

    counts = {name: len(read_problems(file)) for name, file in suite.suite_files("paper", real_data).items()}
    assert counts == {"holdout": 500, "aime2024": 30, "amc2023": 40, "humaneval": 164, "gsm8k": 1319, "zebra": 200,
                      "math500": 500, "supergpqa": 200}  # fmt: skip
