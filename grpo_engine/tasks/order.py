"""Which problems a step trains on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_engine.types import Problem


def problems_of_step(problems: Sequence[Problem], *, step: int, count: int, seed: int, shuffle: bool) -> list[Problem]:
    """The prompts of one step: the set in order, again and again, each pass in an order of its own.

    Args:
        problems: U of them.
        step: 1 is the first.
        count: P.
        seed: of the run.
        shuffle: False keeps the given order in every pass.

    Returns:
        P problems; a pass that ends within the step is followed by the start of the next.
    """
    U = len(problems)
    chosen = []
    orders: dict[int, Tensor] = {}
    for place in range((step - 1) * count, step * count):
        epoch, i = divmod(place, U)
        if shuffle:
            if epoch not in orders:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                orders[epoch] = torch.randperm(U, generator=generator, device="cpu")
            i = int(orders[epoch][i])
        chosen.append(problems[i])
    return chosen
