"""group_advantages beside TRL's formula."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.table import Case, main, same_bits  # noqa: E402
from grpo_engine import ops  # noqa: E402


def case(P, G, *, compiled):
    rewards = torch.rand(P, G)
    return Case(
        name=f"[{P}, {G}] float32",
        ours=lambda: ops.group_advantages(rewards),
        peers=peers.plain(peers.group_advantages, rewards, compiled=compiled),
        expected=lambda: peers.group_advantages(rewards.double()),
        tolerance=1e-5,
        alone=lambda whole: same_bits(ops.group_advantages(rewards[1:2]), whole[1:2]),
        nbytes=8.0 * P * G,
    )


def cases(quick):
    yield case(32, 8, compiled=True)
    if not quick:
        yield case(1024, 8, compiled=True)
    yield case(4096, 16, compiled=not quick)


def cuda(quick):
    yield partial(case, 4096, 16, compiled=True)
    yield partial(case, 64, 16, compiled=False)


if __name__ == "__main__":
    main("group_advantages", cases, cuda=cuda)
