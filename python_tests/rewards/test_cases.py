"""Answers to truths of the real files, each with what it is worth to us and to the paper's code (cases.jsonl)."""

import json
from pathlib import Path

import pytest
from scoring import problem

from grpo_engine.rewards import SCORERS, import_scorer
from grpo_engine.tasks.files import DATA_SOURCES, read_problems

# one a line: the paper's scorer, the truth, the response, our value, the paper's (null where it has no such scorer)
CASES = [json.loads(line) for line in Path(__file__).with_name("cases.jsonl").read_text().splitlines()]
OURS = {family.paper.removeprefix("paper_"): family.reward for family in DATA_SOURCES.values()}


@pytest.mark.parametrize("scorer", sorted({case[0] for case in CASES}))
def test_what_an_answer_is_worth(scorer):
    ours = import_scorer(SCORERS[OURS.get(scorer, scorer)])
    papers = import_scorer(SCORERS[f"paper_{scorer}"]) if f"paper_{scorer}" in SCORERS else None
    cases = [case[1:] for case in CASES if case[0] == scorer]
    found = [[t, r, round(ours(r, problem(t)), 6), papers and round(papers(r, problem(t)), 6)] for t, r, *_ in cases]
    assert found == cases


def test_a_file_is_scored_as_the_setting_says(real_data):
    folder = real_data / "guru_verl/online_eval"
    kinds = {"aime2024": "aime", "gsm8k": "gsm8k", "math__math_500": "math", "stem__supergpqa_200": "choice",
             "codegen__humaneval_164": "code", "logic__zebra_puzzle_dataset_200": "logic"}  # fmt: skip
    for name, kind in kinds.items():
        ours, papers = (read_problems(folder / f"{name}.parquet", limit=2, scoring=s) for s in ("default", "paper"))
        assert {p.reward for p in papers} == {f"paper_{kind}"} and {p.reward for p in ours} == {OURS[kind]}
        assert [p.uid for p in ours] == [p.uid for p in papers]


def test_a_letter_that_is_drawn_is_the_same_every_time_and_right_one_time_in_ten():
    score = import_scorer(SCORERS["paper_choice"])
    values = [score(f"no idea {n}", problem("D")) for n in range(2000)]
    assert values == [score(f"no idea {n}", problem("D")) for n in range(2000)]
    assert abs(sum(values) - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize("truth", ["", "  "])
def test_an_empty_truth_is_refused(truth):
    for name in ("math", "aime", "gsm8k"):
        with pytest.raises(ValueError, match="empty"):
            import_scorer(SCORERS[f"paper_{name}"])("1", problem(truth))
