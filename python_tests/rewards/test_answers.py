"""Reading answers: what the table of cases does not reach."""

import decimal
import time
from fractions import Fraction

import pytest
from scoring import problem

from grpo_engine.rewards import answers
from grpo_engine.rewards.extract import boxes, last_boxed, last_boxes, tagged
from grpo_engine.rewards.math import score
from grpo_engine.rewards.notation import spelling, tidy
from grpo_engine.rewards.quantity import number_text, read_based, read_number, read_unit


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.00001, "0.00001"),
        (1e16, "10000000000000000"),
        (1.5e-7, "0.00000015"),
        (1e300, "1" + "0" * 300),
        (0.1, "0.1"),
        (3.0, "3.0"),
        (-2.5, "-2.5"),
        (12345678901234567890, "12345678901234567890"),
        (decimal.Decimal("1E+3"), "1000"),
        (decimal.Decimal("0.10"), "0.10"),
    ],
)
def test_a_number_of_a_file_is_written_in_digits_and_answered_by_them(number, text):
    assert number_text(number) == text
    assert Fraction(text) == Fraction(decimal.Decimal(repr(number)) if isinstance(number, float) else number)
    for truth in (text, str(number)):  # with an exponent too
        assert score(f"\\boxed{{{text}}}", problem(truth)) == 1
        assert score(f"so it is {text}", problem(truth)) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 1/4", Fraction(5, 4)),
        ("-1 1/4", Fraction(-5, 4)),
        ("4 10/3", None),  # no mixed number, and no 410/3
        ("1 2", None),
        ("1,234.5", Fraction(2469, 2)),
        ("1,23", None),
        ("1.5e3", Fraction(1500)),
        ("2e", None),
        ("1e99999999", None),
        ("10^{-5}", Fraction(1, 100000)),
        (r"3 \times 10^2", Fraction(300)),
        (r"\frac{-1}{2}", Fraction(-1, 2)),
        ("1/0", None),
        ("1" * 5000, None),
        ("", None),
        ("-", None),
        ("%", None),
    ],
)
def test_numerals(text, value):
    found = read_number(tidy(text))
    assert (found and found.value) == value


def test_bases_and_units():
    assert read_based("1A_{16}") == ("1A", 16) and read_based("21_{\\text{three}}") == ("21", 3)
    assert read_based("5_3") is None and read_based("x_2") is None
    metre, square = read_unit("m"), read_unit("square feet")
    assert metre.dimension == (("length", 1),) and square.dimension == (("length", 2),)
    assert read_unit("feet/s").dimension == read_unit("feet per second").dimension == (("length", 1), ("time", -1))
    assert read_unit("apples") is None and read_unit("cm of rope") is None


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("90°", "90"),
        ("−½", r"-\frac{1}{2}"),
        ("2√3", r"2\sqrt{3}"),
        ("√(x+1)", r"\sqrt{x+1}"),
        ("x₁² + y₁²", "x_1^2+y_1^2"),
        ("10⁻¹⁰", "10^{-10}"),
        ("１２３", "123"),
        ("1\u202f000\u202f000", "1000000"),
        ("\ufeff5\u200b", "5"),
        ("3 ≤ x", r"3\lex"),
        (r"3 \leqslant x", r"3\lex"),
        (r"10 , \!080", "10080"),
        (r"\left( 1, \dfrac 3 8 \right)", r"(1,\frac{3}{8})"),
        ("1 1/4", "1 1/4"),
        ("x = 5", "5"),
        (r"$\$5$", "5"),
    ],
)
def test_one_spelling(written, plain):
    assert spelling(written) == plain


def test_votes_for_one_number_are_one():
    same = ("1 1/4", r"1\frac{1}{4}", "5/4", "1.25", r"\dfrac54", "1.250")
    assert {answers.common_form(text) for text in same} == {"5/4"}
    assert answers.common_form("11/4") == "11/4" and answers.common_form("14,000") == answers.common_form("14000")


def test_boxes_in_their_order():
    assert [text for text in last_boxes(r"\boxed{9}. No, \boxed{1} or $x = \boxed{2}$")] == ["1", "2"]
    assert last_boxes("no box") == [] and last_boxes(r"\boxed{1}" + "x" * 100 + r"\boxed{2}") == ["2"]
    assert len(boxes(r"\boxed{\boxed{1}}")) == 1 and last_boxed(r"\boxed{\boxed{1} + 2}") == "1"
    assert tagged("a <answer> 1 </answer>") == (2, "1") and tagged("<answer>1") == (0, "1")
    assert tagged("<answer> </answer>") is None and tagged("none") is None


LONG = [
    "{" * 5_000 + "1" + "}" * 5_000,
    "{" * 400 + "1" + "}" * 400,
    "(" * 900,
    "[" * 400 + "1" + "]" * 400,
    r"\{" * 200 + "1" + r"\}" * 200,
    r"\frac{1}{" * 90 + "2" + "}" * 90,
    "1," * 450 + "1",
    "1 or " * 190 + "1",
    "x=" * 400 + "1",
    r"\pm" * 300 + "1",
    "a" * 990,
    "a " * 490,
    r"\alpha" * 160 + "=1",
    r"\text{a}" * 120,
    r"\text{ cm}" * 90,
    "5" + " apples" * 130,
    "1 2 " * 240,
    "1" * 990 + "e999999999",
    "10^{999999999}",
    "1e999999999",
    r"\begin{pmatrix}" + "1&" * 450 + r"\end{pmatrix}",
    "=" * 900,
    "<" * 900,
    r"\cup" * 240,
    "√" * 900,
    "\x01" * 900,
    "½" * 140,
]


@pytest.mark.parametrize("answer", LONG, ids=lambda answer: answer[:12])
def test_our_own_reading_does_not_hang(answer):
    start = time.process_time()
    for gold, found in (("7", answer), (answer, "7"), ("1,2", answer)):
        answers.read(tidy(gold))
        answers.read(tidy(found))
        answers.common_form(found)
        answers.says_more(found)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("answer", [LONG[0], LONG[1], LONG[2], LONG[6], LONG[10], LONG[19]], ids=lambda answer: answer[:12])
def test_what_is_long_or_deep_is_worth_nothing(answer):
    assert score(f"\\boxed{{{answer}}}", problem("7")) == 0


def test_a_text_equals_itself_however_long():
    for answer in ("1" * 5_000, "x + " * 3_000 + "1", r"\frac{1}{" * 300 + "2" + "}" * 300):
        assert score(f"\\boxed{{{answer}}}", problem(answer)) == 1
        assert score(f"\\boxed{{{answer}}}", problem(answer[:-1] + "3" if answer[-1] != "}" else answer + "+3")) == 0
    assert score(r"\boxed{x+" + "y+" * 999 + "1}", problem("x + " + "y + " * 999 + "1")) == 1
