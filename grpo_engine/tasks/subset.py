"""Some of the training problems, with the mix of difficulty of all of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from grpo_engine.types import Problem


def difficulty(problem: Problem) -> float:
    """How hard a problem is known to be: its failure rate, else its grade, else 0."""
    rate = problem.info.get("pass_rate")
    if isinstance(rate, float):
        return 1.0 - rate
    return float(problem.grade or 0)


def subset(
    problems: Sequence[Problem], count: int, *, seed: int, how: Literal["nested", "independent"] = "nested"
) -> list[Problem]:
    """Draws problems evenly over the range of difficulty, and keeps their order.

    All problems are ranked by difficulty, equals in random order; the ranks that are taken follow a van der Corput
    sequence with a random start, so that 2^k of them have one in each of 2^k equal parts of the ranking, and every
    further one halves a gap. A nested sample is the beginning of one such sequence, whatever its length.

    Args:
        problems: U of them, at most 2^32.
        count: how many to take; U or more takes all.
        seed: of the sample.
        how: "nested": what a smaller count takes with this seed is among what a larger one takes. "independent":
            different counts sample for themselves.

    Returns:
        min(count, U) problems in the order of `problems`.

    Raises:
        ValueError: count < 1.
    """
    if count < 1:
        raise ValueError(f"subset: count must be at least 1, got {count}")
    U = len(problems)
    if count >= U:
        return list(problems)
    source = random.Random(f"subset/{seed}" if how == "nested" else f"subset/{seed}/{count}")
    ties = [source.random() for _ in problems]
    ranked = sorted(range(U), key=lambda i: (difficulty(problems[i]), ties[i]))
    mask = source.getrandbits(32)
    taken: dict[int, None] = {}
    index = 0
    while len(taken) < count:
        digits = int(f"{index:032b}"[::-1], 2) ^ mask
        taken[ranked[digits * U >> 32]] = None
        index += 1
    return [problems[i] for i in sorted(taken)]
