r"""Scorers that do as the paper's code does, errors included, for studies that must reproduce it.

They follow a description of that code, by data source, and not the code. What they keep, and what the scorers of
`SCORERS` do instead:

    paper_math     without a box the whole response is the answer; math-verify is asked about the whole response, so a
                   right box before a wrong one, or inside the thinking, can count; answers that were escaped twice in
                   the data are compared as they are. Ours: the last box after the thinking, alone.
    paper_aime     the box must be in the last 100 characters, what math-verify finds in the last 300. Ours: anywhere.
    paper_gsm8k    without a box and "####" the last number anywhere. Ours: what math-verify takes for the answer.
    paper_choice   the first letter of A to J that the box contains ("Carbon" is C); without any, a drawn letter. It is
                   drawn by the response's hash, not by chance: a tenth is still right, and a run repeats. Ours: 0.
    paper_logic    a grid over several lines is worth 0. Ours: read.
    paper_code     all fenced blocks of any language are one program, 0 without. It runs in our sandbox, under our
                   limits; the paper's code runs it with the trainer's rights. Ours: the Python blocks.
"""

from __future__ import annotations

import hashlib
import re

from grpo_engine.rewards import Question
from grpo_engine.rewards import choice as our_choice
from grpo_engine.rewards import code as our_code
from grpo_engine.rewards import logic as our_logic
from grpo_engine.rewards import math as our_math
from grpo_engine.rewards.extract import after_thinking, last_boxed

AIME_BOX_CHARS, AIME_CHARS = 100, 300
MAX_CHARS = 20_000  # of a response, its end, that math-verify is asked about: it takes seconds for more

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


def warm_up() -> None:
    """As the mathematical scorer's."""
    our_math.warm_up()


def math(response: str, problem: Question) -> float:
    """1.0 when the last box, or the whole response, is the answer, or math-verify finds it in the response.

    Args:
        response: decoded answer.
        problem: its answer is LaTeX or plain text.

    Returns:
        0.0 or 1.0.

    Raises:
        ValueError: the problem's answer is empty.
    """
    gold = _gold(problem)
    text = after_thinking(response)
    found = last_boxed(text)
    found = text if found is None else found
    if len(found) <= our_math.MAX_ANSWER_CHARS and our_math.equal(gold, found.strip()):
        return 1.0
    return float(our_math.equal_somewhere(gold, response[-MAX_CHARS:]))


def aime(response: str, problem: Question) -> float:
    """1.0 when a box in the last 100 characters, or else what math-verify finds in the last 300, is the answer.

    Args, returns, raises: as `math`.
    """
    gold = _gold(problem)
    tail = response[-AIME_CHARS:]
    found = last_boxed(tail[-AIME_BOX_CHARS:])
    return float((found is not None and found.strip() == gold) or our_math.equal_somewhere(gold, tail))


def gsm8k(response: str, problem: Question) -> float:
    """1.0 when the last box, else what follows "#### ", else the last number, is the answer.

    Args, returns, raises: as `math`.
    """
    gold = _gold(problem)
    found = last_boxed(response)
    if found is None and "#### " in response:
        found = response.rpartition("#### ")[2].partition("\n")[0]
    if found is None:
        found = (_NUMBER.findall(response[-MAX_CHARS:]) or [""])[-1]
    found = found.strip()
    return float(len(found) <= our_math.MAX_ANSWER_CHARS and our_math.equal(gold, found))


def choice(response: str, problem: Question) -> float:
    """1.0 when the first of the letters A to J that the last box contains is right; without any, one is drawn.

    Args:
        response: decoded answer.
        problem: its answer is one letter, A to J.

    Returns:
        0.0 or 1.0.
    """
    content = last_boxed(after_thinking(response)) or ""
    letter = next((letter for letter in our_choice.LETTERS if letter in content), None)
    if letter is None:
        drawn = hashlib.sha256(response.encode(errors="surrogatepass")).digest()
        letter = our_choice.LETTERS[int.from_bytes(drawn[:8], "little") % len(our_choice.LETTERS)]
    return float(letter == problem.answer.strip())


def logic(response: str, problem: Question) -> float:
    """The share of right cells of the last <answer>...</answer> that is on one line.

    Args, returns, raises: as `rewards.logic.share_of_cells`.
    """
    found = re.findall(r"<answer>(.*?)</answer>", after_thinking(response))
    return our_logic.share_of_cells(f"<answer>{found[-1]}</answer>" if found else "", problem)


def code(response: str, problem: Question) -> float:
    """1.0 when all fenced blocks together pass the problem's tests.

    Args, returns, raises: as `rewards.code.score`.
    """
    blocks = _FENCE.findall(after_thinking(response))
    return our_code.score_program("\n".join(blocks) if blocks else None, problem)


def _gold(problem: Question) -> str:
    gold = problem.answer.rpartition("####")[2].strip()
    if not gold:
        raise ValueError("paper: the problem's answer is empty")
    return gold
