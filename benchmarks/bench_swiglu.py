"""swiglu beside silu(gate) * up."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import LADDER, QWEN  # noqa: E402
from benchmarks.table import Case, main, same_bits  # noqa: E402
from grpo_engine import ops  # noqa: E402

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}  # of the largest element; bfloat16 rounds twice


def forward(name, T, F, dtype, *, compiled):
    x = torch.randn(T, 2 * F).to(dtype)
    return Case(
        name=f"{name} [{T}, 2 * {F}] {str(dtype)[6:]}",
        ours=lambda: ops.swiglu(x),
        peers={**peers.plain(peers.swiglu, x, compiled=compiled), **(libraries(x) if x.is_cuda else {})},
        expected=lambda: peers.swiglu(x.double()),
        tolerance=TOLERANCE[dtype],
        alone=lambda whole: same_bits(ops.swiglu(x[3:4]), whole[3:4]),
        nbytes=3.0 * T * F * x.element_size(),
    )


def libraries(x):
    def liger():
        gate, up = (half.contiguous() for half in x.chunk(2, dim=-1))
        multiply = peers.liger_swiglu()
        return lambda: multiply(gate, up)

    return {
        "Liger, in two tensors": peers.optional("liger_kernel", liger),
        "FlashInfer": peers.optional("flashinfer", lambda: peers.flashinfer_swiglu(x)),
    }


def training(name, T, F, dtype=torch.float32, *, compiled):
    leaves, upstream = [torch.randn(T, 2 * F).to(dtype).requires_grad_()], [torch.randn(T, F).to(dtype)]
    return Case(
        name=f"{name} [{T}, 2 * {F}] {str(dtype)[6:]}, with gradients",
        ours=lambda: peers.with_gradients(ops.swiglu, leaves, upstream),
        peers=peers.plain_with_gradients(peers.swiglu, leaves, upstream, compiled=compiled),
        expected=lambda: peers.with_gradients(peers.swiglu, peers.doubled(leaves), [upstream[0].double()]),
        tolerance=TOLERANCE[dtype],
        alone=lambda whole: same_bits(ops.swiglu(leaves[0][3:4]), whole[0][3:4]),
        nbytes=8.0 * upstream[0].nbytes,
    )


def cases(quick):
    for size in ("0.2M",) if quick else LADDER:
        F = LADDER[size][4]
        yield training(size, 6144, F, compiled=size == "0.2M")
        if not quick:
            yield forward(f"{size}, decode", 256, F, torch.float32, compiled=size == "0.2M")
    yield forward("0.5B", 2048, 4864, torch.bfloat16, compiled=not quick)


def cuda(quick):
    bf16 = torch.bfloat16
    for size in ("0.5B", "7B") if quick else QWEN:
        F = QWEN[size][1]
        yield partial(forward, size, 8192, F, bf16, compiled=not quick)
        yield partial(training, size, 8192, F, bf16, compiled=size == "7B")
        yield partial(forward, f"{size}, decode", 256, F, bf16, compiled=False)


if __name__ == "__main__":
    main("swiglu", cases, cuda=cuda)
