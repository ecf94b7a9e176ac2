"""Mathematical answers."""

import itertools

import pytest
from scoring import problem

from grpo_engine.rewards.extract import after_thinking, last_boxed
from grpo_engine.rewards.math import gold_text, score
from grpo_engine.rewards.pool import RewardPool
from grpo_engine.tasks.files import read_problems

FILES = (
    ("guru_verl/online_eval/gsm8k.parquet", None),
    ("guru_verl/online_eval/math__math_500.parquet", None),
    ("guru_verl/online_eval/aime2024.parquet", None),
    ("guru_verl/online_eval/amc2023.parquet", None),
    ("math_curriculum/math__full_difficulty_ordered_test_500.parquet", None),
    ("math_curriculum_sampled/math__sampled_1_4_12800.parquet", 3000),
)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{4}", "4"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"}}} \boxed{5} }", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{", None),
        (r"\boxed", None),
        ("{4}", None),
        ("", None),
        ("\\", None),
    ],
)
def test_the_last_closed_box(text, content):
    assert last_boxed(text) == content


def test_only_what_follows_the_thinking_counts():
    assert after_thinking("a</think>b</think>c") == "c"
    assert after_thinking("abc") == "abc"
    assert score(r"<think>\boxed{7}</think> so \boxed{8}", problem("7")) == 0
    assert score(r"<think>\boxed{8}</think> so \boxed{7}", problem("7")) == 1


@pytest.mark.parametrize(
    ("gold", "found"),
    [
        ("7", "7"),
        ("7", "007"),
        ("7", "7.0"),
        ("033", "33"),
        ("-3", "-3"),
        ("14,000", "14000"),
        ("14000", "14{,}000"),
        (r"\$42409", "42409"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"\frac{1}{2}", r"\frac{4}{8}"),
        (r"-\frac{1}{2}", "-1/2"),
        ("2", r"\frac{4}{2}"),
        (r"\frac{1}{2}", r"\dfrac12"),
        (r"\\frac{1}{2}", r"\frac{1}{2}"),  # escaped twice in the data
        (r"\frac{1}{3}", "0.333333"),
        (r"\sqrt{\dfrac{425}{2}}", r"\frac{5\sqrt{34}}{2}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("6+9i", "9i + 6"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
        ("-2,1", "1, -2"),
        (r"(2,12) \cup (12,102)", r"(2, 12)\cup(12, 102)"),
        ("n = 13", "13"),
        ("13", "n = 13"),
        ("5", r"5 \text{ cm}"),
        (r"76^\circ", "76"),
        (r"\text{Evelyn}", "Evelyn"),
        ("C", r"\text{C}"),
        ("1:2", r"\frac{1}{2}"),
        (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\begin{pmatrix}-1&0\\0&-1\end{pmatrix}"),
        ("Janet makes 9 * 2 = 18. #### 18", "18"),
        (r"so \boxed{18}", "18"),
    ],
)
def test_equal_answers(gold, found):
    assert score(f"so \\boxed{{{found}}}.", problem(gold)) == 1


@pytest.mark.parametrize(
    ("gold", "found"),
    [
        ("7", "8"),
        ("7", "-7"),
        ("7", "77"),
        ("7", ""),
        ("9007199254740993", "9007199254740992"),  # the same float64
        (r"\frac{1}{2}", r"\frac{2}{1}"),
        (r"\frac{1}{2}", r"-\frac{1}{2}"),
        (r"\frac{1}{2}", r"\frac{1}{0}"),
        ("0", r"\frac{0}{0}"),
        (r"\frac{1}{3}", "0.33"),
        ("2", "1, 2, 3"),
        ("(1, 2)", "(2, 1)"),
        ("x^2+2x+1", "(x-1)^2"),
        (r"\text{no}", r"\text{on}"),
        (r"\text{Evelyn}", "Navin"),
        ("C", "B"),
        (r"\sqrt{2}", r"\sqrt{3}"),
        (r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}", r"\begin{pmatrix} 1 & 0 \\ 0 & 2 \end{pmatrix}"),
    ],
)
def test_different_answers(gold, found):
    assert score(f"so \\boxed{{{found}}}.", problem(gold)) == 0


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("9 * 2 = 18\n#### 18", 1),
        ("#### 3\n#### 18 dollars", 1),
        ("#### 17\nwhich is not 18", 0),
        ("Therefore, the answer is $18$.", 1),
        ("she makes $18 a day", 1),
        ("she makes 17", 0),
        ("", 0),
        ("no number", 0),
    ],
)
def test_without_a_box(response, value):
    assert score(response, problem("18")) == value


def test_a_word_in_running_text_proves_nothing():
    assert score("it may well be even, or odd", problem(r"\text{even}")) == 0


def test_text_that_was_escaped_twice():
    assert gold_text(r"\\frac{9\\pi}{16}") == r"\frac{9\pi}{16}"
    assert gold_text(r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}") == r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"
    assert gold_text(r"\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}") == r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"
    assert gold_text(r" n = 13 ") == "n = 13"


def test_an_empty_true_answer_is_refused():
    with pytest.raises(ValueError, match="empty"):
        score(r"\boxed{1}", problem("  "))


@pytest.mark.parametrize(
    "response",
    [
        "{" * 1_000_000,
        "}" * 1_000_000,
        "\\boxed{" * 150_000,
        "\\boxed{" * 150_000 + "}" * 150_000,
        "\\boxed{" + "1" * 1_000_000 + "}",
        "\\boxed{" + "\\frac{1}{" * 100 + "2" + "}" * 101,
        "\\boxed{\u0bf5\u202e\U0001f600\ud800}",
        "\x00\x01\ufffd",
        "<think>" * 100_000,
        "####" * 100_000,
        "$" * 100_000,
    ],
    ids=["open", "close", "boxes", "nested", "long", "fractions", "unicode", "control", "think", "hashes", "dollars"],
)
def test_adversarial_responses_are_worth_nothing(response):
    assert score(response, problem("7")) == 0


@pytest.fixture(scope="module")
def pool():
    with RewardPool(workers=1, timeout_s=2.0) as pool:
        yield pool


@pytest.mark.parametrize("found", ["9^{9^{9^{9}}}", "10^{10^{10}}"])
def test_numbers_without_end_cost_one_zero(pool, found):
    p = problem(r"\frac{1}{2}")
    p = type(p)(uid=p.uid, prompt=p.prompt, answer=p.answer, domain="math", reward="math")
    first, second = pool.score([f"\\boxed{{{found}}}", r"\boxed{0.5}"], [p, p])
    assert (first.value, first.status) == (0, "timeout")
    assert (second.value, second.status) == (1, "ok")


@pytest.mark.parametrize(
    "found", ["(10^9)!", "100000000!", "2^{3^{4^{5^{6}}}}", "{" * 4000 + "1" + "}" * 4000, r"\binom{10^9}{10^8}"]
)
def test_nothing_hangs(pool, found):
    p = problem(r"\frac{1}{2}")
    p = type(p)(uid=p.uid, prompt=p.prompt, answer=p.answer, domain="math", reward="math")
    first, second = pool.score([f"\\boxed{{{found}}}", r"\boxed{0.5}"], [p, p])
    assert first.value == 0 and (second.value, second.status) == (1, "ok")


@pytest.mark.parametrize(("file", "limit"), FILES)
def test_every_true_answer_is_right_in_its_own_box(real_data, file, limit):
    for p in read_problems(real_data / file, limit=limit):
        assert score(f"so the answer is \\boxed{{{p.answer}}}", p) == 1, p.answer
        assert score(f"so the answer is \\boxed{{{gold_text(p.answer)}}}", p) == 1, p.answer


@pytest.mark.parametrize(("file", "limit"), FILES)
def test_the_next_problems_answer_is_wrong(real_data, pool, file, limit):
    problems = read_problems(real_data / file, limit=60)
    pairs = [(a, b) for a, b in itertools.pairwise(problems) if gold_text(a.answer) != gold_text(b.answer)]
    scored = pool.score([f"\\boxed{{{b.answer}}}" for _, b in pairs], [a for a, _ in pairs])
    equal = [(a.answer, b.answer) for (a, b), r in zip(pairs, scored, strict=True) if r.value]
    assert len(pairs) > 25 and equal == []
