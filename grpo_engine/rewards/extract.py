"""Finding the answer in a response."""

from __future__ import annotations

import re

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def after_thinking(response: str) -> str:
    """What follows the last "</think>", or all of a response that has none.

    Args:
        response: decoded answer.

    Returns:
        The rest of the text.
    """
    return response.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...} whose braces close.

    One pass over the text with a stack, so that a megabyte of unclosed boxes costs no more than a megabyte of prose.
    Of nested boxes the innermost counts; escaped braces (\{ and \}) are ordinary characters.

    Args:
        text: any.

    Returns:
        The content, or None when there is no closed box.
    """
    open_braces: list[tuple[int, bool]] = []  # where the content starts, and whether a box opened it
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if open_braces:
                start, is_box = open_braces.pop()
                if is_box and (best is None or start > best[0]):
                    best = start, match.start()
        elif token == "{":
            open_braces.append((match.end(), False))
        elif token.endswith("{") and len(token) > 2:
            open_braces.append((match.end(), True))
    return None if best is None else text[best[0] : best[1]]
