"""The last word counts."""

import pytest
from scoring import problem

from grpo_engine.rewards.exact import score


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("12", 1),
        ("15 13 12", 1),
        ("15 12\n", 1),
        ("12 15", 0),
        ("112", 0),
        ("", 0),
        ("   ", 0),
        ("12 ?", 0),
        ("=12", 0),
    ],
)
def test_the_last_word_counts(response, value):
    assert score(response, problem("12")) == value


def test_words_are_answers_too():
    assert score("b > a so c", problem("c")) == 1
    assert score("b > a so C", problem("c")) == 0
