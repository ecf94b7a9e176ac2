"""The order in which a run trains on its problems."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from grpo_engine.types import Problem


def problems_from(problems: Sequence[Problem], *, start: int, seed: int, shuffle: bool) -> Iterator[Problem]:
    """The training prompts of a run from one on: the set in order, again and again, each pass in an order of its own.

    Args:
        problems: U of them.
        start: how many prompts were taken before.
        seed: of the run.
        shuffle: False keeps the given order in every pass.

    Yields:
        Problems without end.
    """
    U = len(problems)
    for epoch in itertools.count(start // U):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(U, generator=generator, device="cpu") if shuffle else range(U)
        first = start % U if epoch == start // U else 0
        yield from (problems[int(i)] for i in order[first:])
