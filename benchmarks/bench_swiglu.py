"""swiglu beside silu(gate) * up."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import LADDER  # noqa: E402
from benchmarks.table import Case, main, same_bits  # noqa: E402
from grpo_engine import ops  # noqa: E402

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}  # of the largest element; bfloat16 rounds twice


def forward(name, T, F, dtype, *, compiled):
    x = torch.randn(T, 2 * F).to(dtype)
    return Case(
        name=f"{name} [{T}, 2 * {F}] {str(dtype)[6:]}",
        ours=lambda: ops.swiglu(x),
        peers=peers.plain(peers.swiglu, x, compiled=compiled),
        expected=lambda: peers.swiglu(x.double()),
        tolerance=TOLERANCE[dtype],
        alone=lambda whole: same_bits(ops.swiglu(x[3:4]), whole[3:4]),
        nbytes=3.0 * T * F * x.element_size(),
    )


def training(name, T, F, *, compiled):
    leaves, upstream = [torch.randn(T, 2 * F).requires_grad_()], [torch.randn(T, F)]
    return Case(
        name=f"{name} [{T}, 2 * {F}] float32, with gradients",
        ours=lambda: peers.with_gradients(ops.swiglu, leaves, upstream),
        peers=peers.plain_with_gradients(peers.swiglu, leaves, upstream, compiled=compiled),
        expected=lambda: peers.with_gradients(peers.swiglu, peers.doubled(leaves), [upstream[0].double()]),
        tolerance=TOLERANCE[torch.float32],
        alone=lambda whole: same_bits(ops.swiglu(leaves[0][3:4]), whole[0][3:4]),
        nbytes=8.0 * T * F * 4,
    )


def cases(quick):
    for size in ("0.2M",) if quick else LADDER:
        F = LADDER[size][4]
        yield training(size, 6144, F, compiled=size == "0.2M")
        if not quick:
            yield forward(f"{size}, decode", 256, F, torch.float32, compiled=size == "0.2M")
    yield forward("0.5B", 2048, 4864, torch.bfloat16, compiled=not quick)


if __name__ == "__main__":
    main("swiglu", cases)
