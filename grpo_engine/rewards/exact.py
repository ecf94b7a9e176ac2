"""Scorer of the micro tasks: the last word counts."""

from __future__ import annotations

from grpo_engine.rewards import Question


def score(response: str, problem: Question) -> float:
    """1.0 when the last word of a response is the answer; what comes before is the model's own affair.

    Args:
        response: decoded answer; words are separated by white space.
        problem: its answer is one word.

    Returns:
        0.0 or 1.0; an empty response is wrong.
    """
    words = response.split()
    return float(bool(words) and words[-1] == problem.answer)
