"""Scorer of multiple-choice questions with options A to J (SuperGPQA)."""

from __future__ import annotations

import re

from grpo_engine.rewards import Question
from grpo_engine.rewards.extract import after_thinking, last_boxed

LETTERS = "ABCDEFGHIJ"
_MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf|rm|bf)\b|[\s{}$*\\]")
_LABEL = re.compile(r"\(?\s*([A-J])\s*(?:$|[).:])")
_LETTER = re.compile(r"(?<![A-Za-z])[A-J](?![A-Za-z])")


def chosen_letter(response: str) -> str | None:
    r"""The option that a response puts into its last box.

    Args:
        response: decoded answer; what precedes "</think>" is ignored.

    Returns:
        "A" to "J" for \boxed{B}, \boxed{\text{(B)}} or \boxed{B: 0.58g}; None without a box, or when the box
        names no option or several.
    """
    content = last_boxed(after_thinking(response))
    if content is None:
        return None
    bare = _MARKUP.sub(" ", content).strip()
    label = _LABEL.match(bare)
    if label:
        return label.group(1)
    letters = set(_LETTER.findall(bare))
    return letters.pop() if len(letters) == 1 else None


def score(response: str, problem: Question) -> float:
    """1.0 when the last box holds the right letter.

    A response without a readable letter is worth 0. The paper's code draws a random letter there, which lifts the
    score of any model by up to 0.1 and makes it differ from run to run.

    Args:
        response: decoded answer.
        problem: its answer is one letter, A to J.

    Returns:
        0.0 or 1.0.

    Raises:
        ValueError: the problem's answer is no letter A to J.
    """
    gold = problem.answer.strip()
    if len(gold) != 1 or gold not in LETTERS:
        raise ValueError(f"choice.score: the problem's answer must be a letter A to J, got {problem.answer!r}")
    return float(chosen_letter(response) == gold)
