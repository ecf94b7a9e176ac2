"""Finding the answer in a response."""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_GAP_CHARS = 80  # between two boxes of one list

_TAKEN_BACK = re.compile(
    r"\b(?:no|not|wait|actually|instead|rather|but|sorry|wrong|mistake|correct\w*|hmm)\b", re.IGNORECASE
)
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def after_thinking(response: str) -> str:
    """What follows the last "</think>", or all of a response that has none.

    Args:
        response: decoded answer.

    Returns:
        The rest of the text.
    """
    return response.rpartition("</think>")[2]


class Box(NamedTuple):
    """A box that closes: where it begins, where its content lies, and where it ends."""

    start: int
    inner: int
    end: int


def boxes(text: str) -> list[Box]:
    r"""Every \boxed{...} or \fbox{...} whose braces close and that holds no other one, in the order of the text.

    One pass over the text with a stack, so that a megabyte of unclosed boxes costs no more than a megabyte of prose.
    Escaped braces (\{ and \}) are ordinary characters.

    Args:
        text: any.

    Returns:
        The boxes; none of them contains another.
    """
    open_braces: list[tuple[int, int | None]] = []  # where the content starts, and where the box that opened it does
    found: list[Box] = []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if open_braces:
                inner, start = open_braces.pop()
                if start is not None and not (found and found[-1].start > start):
                    found.append(Box(start, inner, match.end()))
        elif token == "{":
            open_braces.append((match.end(), None))
        elif token.endswith("{") and len(token) > 2:
            open_braces.append((match.end(), match.start()))
    return found


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...} whose braces close.

    Args:
        text: any.

    Returns:
        The content; of nested boxes the innermost counts. None when there is no closed box.
    """
    found = boxes(text)
    return text[found[-1].inner : found[-1].end - 1] if found else None


def last_boxes(text: str) -> list[str]:
    r"""The contents of the last boxes that belong together: "x = \boxed{1} or x = \boxed{2}".

    Args:
        text: any.

    Returns:
        The last box and those before it, as long as fewer than `MAX_GAP_CHARS` characters part two of them, and no word
        that takes the earlier one back ("no", "wait").
    """
    found = boxes(text)
    first = len(found) - 1
    while first > 0:
        gap = text[found[first - 1].end : found[first].start]
        if len(gap) > MAX_GAP_CHARS or _TAKEN_BACK.search(gap):
            break
        first -= 1
    return [text[box.inner : box.end - 1] for box in found[max(first, 0) :]]


def tagged(text: str) -> tuple[int, str] | None:
    """What stands in the last "<answer>...</answer>", which a stop string may have cut at its end.

    Args:
        text: any.

    Returns:
        Where the tag begins, and the content; None without one, or when there is nothing in it.
    """
    start = text.rfind("<answer>")
    content = text[start + len("<answer>") :].partition("</answer>")[0].strip() if start >= 0 else ""
    return (start, content) if content else None
