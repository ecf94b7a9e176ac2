"""Grids of zebra puzzles."""

import json

import pytest
from scoring import problem

from grpo_engine.rewards.logic import MAX_GRID_CHARS, score, score_strict
from grpo_engine.tasks.files import read_problems

GRID = {"header": ["Position", "Job", "Pet"], "rows": [["1", "cook", "cat"], ["2", "writer", "dog"]]}
GOLD = json.dumps(GRID)


def answer(grid, **changes):
    return f"thinking... <answer> {json.dumps({**grid, **changes})} </answer>"


@pytest.mark.parametrize(
    ("response", "right_cells"),
    [
        (answer(GRID), 6),
        (f"<answer>{GRID!r}</answer>", 6),  # a Python literal
        ("<answer>\n" + json.dumps(GRID, indent=2) + "\n</answer>", 6),  # over several lines
        (f"<answer>```json\n{GOLD}\n```</answer>", 6),
        (f"<answer>{{}}</answer> {answer(GRID)}", 6),  # the last one counts
        (f"{answer(GRID)} and <answer> cut off", 6),
        (f"<think>{answer(GRID)}</think> {answer(GRID, rows=[])}", 0),
        (answer(GRID, rows=[[1, "Cook ", "CAT"], [2, "writer", "dog"]]), 6),
        (answer(GRID, rows=[["1", "cook", "dog"], ["2", "writer", "cat"]]), 4),
        (answer(GRID, rows=[["2", "writer", "dog"], ["1", "cook", "cat"]]), 0),  # rows go by place
        (answer(GRID, rows=[["1", "cook", "cat"]]), 3),
        (answer(GRID, rows=[["1", "cook"], ["2"]]), 3),
        (answer(GRID, rows=[*GRID["rows"], ["3", "x", "y"]]), 6),
        (answer(GRID, header=["Position", "Pet", "Job"], rows=[["1", "cat", "cook"], ["2", "dog", "writer"]]), 6),
        (answer(GRID, header=["a", "b", "c"]), 6),  # unknown names: columns go by place
        (answer(GRID, header=None), 6),
        (answer(GRID, rows="cat"), 0),
        (answer(GRID, rows=["1", None, 3]), 0),
        (answer(GRID, rows=[[["1"], {"x": 1}, None]]), 0),
        ("<answer>[1, 2]</answer>", 0),
        ("<answer>no grid</answer>", 0),
        ("<answer></answer>", 0),
        (GOLD, 0),  # no tags
        ("<answer>" + GOLD, 0),
        ("", 0),
    ],
)
def test_the_share_of_right_cells(response, right_cells):
    assert score(response, problem(GOLD)) == pytest.approx(right_cells / 6, abs=1e-12)
    assert score_strict(response, problem(GOLD)) == float(right_cells == 6)


@pytest.mark.parametrize(
    "content",
    ["{" * 20_000, "[" * 20_000, "(" * 20_000, "-" * 20_000 + "1", "9**9**9**9", '{"a":' * 5_000, "\0", "\ud800"],
)
def test_texts_that_break_parsers_are_worth_nothing(content):
    assert score(f"<answer>{content}</answer>", problem(GOLD)) == 0


def test_a_huge_answer_is_not_parsed():
    assert score(answer(GRID, note="x" * MAX_GRID_CHARS), problem(GOLD)) == 0
    assert score("<answer>" * 100_000, problem(GOLD)) == 0


@pytest.mark.parametrize("gold", ["", "{}", '{"header": ["a"], "rows": [["1", "2"]]}', '{"header": [], "rows": []}', "[1]"])
def test_a_true_answer_that_is_no_grid_is_refused(gold):
    with pytest.raises(ValueError, match="header and rows"):
        score("<answer>{}</answer>", problem(gold))


def test_real_puzzles(real_data):
    puzzles = read_problems(real_data / "guru_verl/online_eval/logic__zebra_puzzle_dataset_200.parquet")
    for p in puzzles:
        grid = json.loads(p.answer)
        assert score(answer(grid), p) == 1
        wrong = [["?"] * len(grid["header"]), *grid["rows"][1:]]
        assert score(answer(grid, rows=wrong), p) == pytest.approx(1 - 1 / len(grid["rows"]), abs=1e-12)
