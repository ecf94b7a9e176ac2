r"""Scorer of mathematical answers: finding the answer, and comparing it (`answers`).

math-verify's own time limits are switched off: they rest on SIGALRM, which works in a main thread only and cannot
interrupt C code. The pool kills the whole worker instead.

`equal` and `equal_somewhere` are another comparison, with errors that studies of the paper must reproduce: `paper` alone
uses them, and they do not change.
"""

from __future__ import annotations

import decimal
import functools
import re
from fractions import Fraction

from grpo_engine.rewards import Question, answers
from grpo_engine.rewards.extract import after_thinking, boxes, last_boxed, last_boxes, tagged
from grpo_engine.rewards.notation import in_ascii, tidy
from grpo_engine.rewards.quantity import number_text

MAX_ANSWER_CHARS = 1_000  # for the paper's scorers a longer box is wrong unread
MAX_TAIL_CHARS = 4_000  # of a response without a box, what is searched for an answer
MAX_HEADINGS = 5  # the last, among which the line with the answer is looked for

_SPACES = re.compile(r"\\[,;:!> ]|~|\s+|\\q?quad\b")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\{?\\circ\}?")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?")
_ASSIGNED = re.compile(r"[A-Za-z]=(?=[^=])")
_WORD = re.compile(r"[A-Za-z]{2,}")
_RATIONAL = re.compile(r"([-+]?)(?:(\d+)(?:\.0*)?|(?:\\frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+)))")
_HASHES = re.compile(r"####[# \t]*([^\n]+)")
_HEADING = re.compile(
    r"(?:(?:step|part|case|section|problem|question|example)\b|\d+[.)]\s+\*{0,2}[A-Za-z]{2})", re.IGNORECASE
)
_HAS_VALUE = re.compile(r"[\d\\]")
_MIXED = re.compile(r"(?<![\d.,/^])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\d/.])")
_POWER = re.compile(r"(?<![\w.])(\d{1,20}(?:\.\d{1,20})?[eE][-+]?\d{1,3})(?![\w.])")


def score(response: str, problem: Question) -> float:
    r"""1.0 when the response's answer equals the problem's.

    The answer is the last closed \boxed{...} after the last "</think>", or the last <answer>...</answer> if no box comes
    behind its beginning. Several boxes beside each other answer a truth that is a list. Without either, the answer is what
    follows the last "####" on its line (GSM8K's form), unless that is a heading. Else it is what math-verify finds in the
    last `MAX_TAIL_CHARS` characters. `answers` says when two answers are equal.

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
    boxed, tag = boxes(text), tagged(text)
    if tag is not None and not (boxed and boxed[-1].end > tag[0]):
        return float(_equals_line(gold, tag[1]))
    if boxed:
        found = _unescaped(text[boxed[-1].inner : boxed[-1].end - 1].strip())
        return float(answers.equal(gold, found) or (len(boxed) > 1 and _equals_boxes(gold, text)))
    hashes = list(_HASHES.finditer(text))
    if hashes:
        return float(_equals_hashes(gold, hashes, text))
    return float(_found_in(gold, text))


def _equals_line(gold: str, line: str) -> bool:
    """Whether a line that should hold the answer alone does: "18 dollars" holds the number 18, "5 or 6" no answer."""
    line = line.strip("* ")
    if answers.equal(gold, _unescaped(line)):
        return True
    return not answers.says_more(line[:MAX_TAIL_CHARS]) and _found_in(gold, line)


def _equals_boxes(gold: str, text: str) -> bool:
    truths = answers.read(tidy(gold)) if len(gold) <= answers.MAX_ANSWER_CHARS else None
    if not isinstance(truths, answers.Many) or len(truths.items) < 2:
        return False
    found = last_boxes(text)
    return len(found) == len(truths.items) and answers.equal(gold, ", ".join(map(_unescaped, found)))


def _equals_hashes(gold: str, hashes: list[re.Match], text: str) -> bool:
    """Whether the last "####" with an answer has the true one: on its line, or below it where the line is a heading."""
    end = len(text)
    for match in reversed(hashes[-MAX_HEADINGS:]):
        line, below = match[1].strip(" \t*"), text[match.end() : end]
        if not _HEADING.match(line):
            if any(c.isdigit() for c in line) or answers.equal(gold, line):
                return _equals_line(gold, line)
            if not _HAS_VALUE.search(below):
                below = line  # "#### \pi", or a word
        if _HAS_VALUE.search(below[-MAX_TAIL_CHARS:]):
            return _found_in(gold, below)
        end = match.start()
    return False


def _found_in(gold: str, text: str) -> bool:
    """Whether math-verify finds an answer in a text's end, and it is the true one; a word is found nowhere."""
    truth = tidy(gold)
    if answers.is_words(truth):
        return False  # a word in running text proves nothing
    text = in_ascii(text[-MAX_TAIL_CHARS:]).replace("**", " ")
    text = _POWER.sub(_in_digits, _MIXED.sub(_improper, text))
    return answers.found_in(truth, text)


def warm_up() -> None:
    """Imports math-verify and has it compare once: the first comparison takes a second."""
    answers.equal(r"\frac{x}{2}", "0.5x")
    answers.found_in("2", "the answer is $x = 2$")


def _improper(match: re.Match) -> str:
    whole, above, below = (int(group) for group in match.groups())
    return f"{whole * below + above}/{below}" if above < below else " "


def _in_digits(match: re.Match) -> str:
    return number_text(decimal.Decimal(match[1]))


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
