"""Letters in boxes."""

import pytest
from scoring import problem

from grpo_engine.rewards.choice import chosen_letter, score
from grpo_engine.tasks.files import read_problems


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"so \boxed{B}", "B"),
        (r"\boxed{A} no, \boxed{J}", "J"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\textbf{(C)}}", "C"),
        (r"\boxed{ (D). }", "D"),
        (r"\boxed{B: 0.58 J}", "B"),
        (r"\boxed{option E}", "E"),
        (r"<think>\boxed{A}</think> \boxed{B}", "B"),
        (r"\fbox{F}", "F"),
        (r"<think>\boxed{A}</think> none", None),
        (r"\boxed{A, B}", None),
        (r"\boxed{A or B}", None),
        (r"\boxed{K}", None),
        (r"\boxed{b}", None),
        (r"\boxed{Carbon}", None),
        (r"\boxed{}", None),
        (r"\boxed{B", None),
        ("the answer is B", None),
        ("", None),
    ],
)
def test_the_letter_of_the_last_box(response, letter):
    assert chosen_letter(response) == letter
    assert score(response, problem("B")) == float(letter == "B")


def test_no_letter_is_worth_nothing_whatever_the_answer():
    assert [score("I do not know", problem(gold)) for gold in "ABCDEFGHIJ"] == [0.0] * 10


@pytest.mark.parametrize("gold", ["", "AB", "K", "a"])
def test_a_true_answer_that_is_no_letter_is_refused(gold):
    with pytest.raises(ValueError, match="letter A to J"):
        score(r"\boxed{A}", problem(gold))


def test_real_questions(real_data):
    questions = read_problems(real_data / "guru_verl/online_eval/stem__supergpqa_200.parquet")
    assert {q.reward for q in questions} == {"choice"}
    assert all(score(f"so \\boxed{{{q.answer}}}", q) == 1 for q in questions)
    other = {a: b for a, b in zip("ABCDEFGHIJ", "BCDEFGHIJA", strict=True)}
    assert all(score(f"so \\boxed{{{other[q.answer]}}}", q) == 0 for q in questions)
