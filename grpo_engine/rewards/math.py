r"""Scorer of mathematical answers: text equality first, then math-verify.

math-verify's own time limits are switched off: they rest on SIGALRM, which works in a main thread only and cannot
interrupt C code. The pool kills the whole worker instead.
"""

from __future__ import annotations

import functools
import logging
import re
from fractions import Fraction

from grpo_engine.rewards import Question
from grpo_engine.rewards.extract import after_thinking, last_boxed

MAX_ANSWER_CHARS = 1_000  # the longest true answer of the data has 90; a longer box is wrong unread
MAX_TAIL_CHARS = 4_000  # of a response without a box, what is searched for an answer

# Without this every worker would warn once that its time limits are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_SPACES = re.compile(r"\\[,;:!> ]|~|\s+|\\q?quad\b")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\{?\\circ\}?")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?")
_ASSIGNED = re.compile(r"[A-Za-z]=(?=[^=])")
_WORD = re.compile(r"[A-Za-z]{2,}")
_RATIONAL = re.compile(r"([-+]?)(?:(\d+)(?:\.0*)?|(?:\\frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+)))")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")


def score(response: str, problem: Question) -> float:
    r"""1.0 when the response's answer equals the problem's.

    The answer is the last closed \boxed{...} after the last "</think>"; without a box, what follows the last "####"
    on its line (GSM8K's form); without either, what math-verify finds in the last `MAX_TAIL_CHARS` characters.
    It is right when its text equals the true answer's up to LaTeX spelling, or when math-verify finds the two equal
    (numbers to 6 decimals, expressions by simplification, sets, intervals, matrices). Words are compared as words:
    "no" and "on" are not both n*o.

    Args:
        response: decoded answer.
        problem: its answer is LaTeX or plain text, bare, boxed, or a solution that ends in "#### answer"; text that was
            escaped twice (every backslash doubled, a fifth of the paper's training set) is read as it was meant.

    Returns:
        0.0 or 1.0.

    Raises:
        ValueError: the problem's answer is empty.
    """
    gold = gold_text(problem.answer)
    if not gold:
        raise ValueError("math.score: the problem's answer is empty")
    text = after_thinking(response)
    found = last_boxed(text)
    if found is not None:
        return float(equal(gold, _unescaped(found.strip()))) if len(found) <= MAX_ANSWER_CHARS else 0.0
    hashes = _HASHES.findall(text)
    if hashes:
        line = hashes[-1].strip()[:MAX_ANSWER_CHARS]
        return float(equal(gold, line) or equal_somewhere(gold, line))  # "#### 18 dollars" holds the number 18
    return float(equal_somewhere(gold, text[-MAX_TAIL_CHARS:]))


def warm_up() -> None:
    """Imports math-verify and has it compare once: the first comparison takes a second."""
    _verify(_parse(r"\boxed{\frac{1}{2}}"), _parse(r"\boxed{0.5}"))
    _parse("the answer is $x = 2$")


@functools.lru_cache(maxsize=4096)
def gold_text(answer: str) -> str:
    """The true answer without its wrapping.

    Args:
        answer: as the data have it.

    Returns:
        What follows the last "####", the content of the last box, or all of it; backslashes that were escaped twice
        are single. "" for an empty answer.
    """
    answer = answer.rpartition("####")[2].strip()
    answer = _unescaped(answer)
    boxed = last_boxed(answer)
    return (answer if boxed is None else boxed).strip()


def _unescaped(latex: str) -> str:
    runs = re.findall(r"\\+", latex)
    # A row break ("\\ ") looks the same as a doubled backslash, but then some other run ("\frac") is odd.
    if re.search(r"\\\\[A-Za-z]", latex) and all(len(run) % 2 == 0 for run in runs):
        return latex.replace("\\\\", "\\")
    return latex


# One problem's answers come in groups and are often the same: a cache of verdicts saves most of the parsing.
@functools.lru_cache(maxsize=8192)
def equal(gold: str, found: str) -> bool:
    """Whether two answers are equal; see `score`.

    Args:
        gold: LaTeX or plain text, without a box.
        found: likewise.
    """
    plain_gold, plain_found = spelling(gold), spelling(found)
    if plain_gold == plain_found:
        return True
    if not plain_found:
        return False
    # Most answers are integers or plain fractions: decided here, exactly, a hundred times as fast.
    rational_gold, rational_found = _rational(plain_gold), _rational(plain_found)
    if rational_gold is not None and rational_found is not None:
        return rational_gold == rational_found
    # "20%" is answered by 20; that 0.2 is the same is math-verify's to say.
    if "%" in plain_gold + plain_found and plain_gold.strip("\\%") == plain_found.strip("\\%"):
        return True
    if _WORD.fullmatch(plain_gold):
        return plain_gold.lower() == plain_found.lower()
    if "," not in plain_gold and _is_list(plain_found):
        return False  # math-verify may take the one of several answers that is right
    return _verify(_parse(f"\\boxed{{{gold}}}"), _parse(f"\\boxed{{{found}}}"))


def equal_somewhere(gold: str, text: str) -> bool:
    """Whether math-verify finds an answer in a text, and it is the true one.

    Args:
        gold: as in `equal`; a word is found nowhere.
        text: a response.
    """
    if _WORD.fullmatch(spelling(gold)):
        return False  # a word in running text proves nothing
    return _verify(_parse(f"\\boxed{{{gold}}}"), _parse(text))


def spelling(latex: str) -> str:
    """One spelling of the many that LaTeX allows.

    Args:
        latex: an answer.

    Returns:
        The same without white space, sizes, units' markup and the like; "" for nothing but those.
    """
    text = latex.strip().strip("$").rstrip(".")
    text = _TEXT.sub(r"\1", text)
    text = _DEGREES.sub("", text)
    for old, new in (("\\left", ""), ("\\right", ""), ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\$", "")):
        text = text.replace(old, new)
    text = _SPACES.sub("", text)
    text = _ASSIGNED.sub("", text, count=1) if _ASSIGNED.match(text) else text
    if _THOUSANDS.fullmatch(text):
        text = text.replace("{,}", "").replace(",", "")
    return text


def _is_list(plain: str) -> bool:
    """Whether a comma outside of all brackets parts several answers; one of thousands does not."""
    depth = 0
    for c in _THOUSANDS.sub("0", plain):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth <= 0:
            return True
    return False


def _rational(plain: str) -> Fraction | None:
    match = _RATIONAL.fullmatch(plain)
    if match is None:
        return None
    sign, *groups = match.groups()
    numbers = [int(g) for g in groups if g is not None]
    if len(numbers) == 2 and numbers[1] == 0:
        return None
    return Fraction(*numbers) * (-1 if sign == "-" else 1)


@functools.lru_cache(maxsize=8192)
def _parse(text: str) -> tuple:
    from math_verify import parse

    # No fallback to text: text equality is decided above, by our own spelling.
    return tuple(parse(text, fallback_mode="no_fallback", parsing_timeout=None))


def _verify(gold: tuple, found: tuple) -> bool:
    from math_verify import verify

    return bool(verify(list(gold), list(found), timeout_seconds=None))
