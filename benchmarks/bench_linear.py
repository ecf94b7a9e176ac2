"""linear beside torch: Qwen2.5-0.5B in bfloat16 and the embedded ladder in float32."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import LADDER, QWEN, QWEN_VOCABULARY  # noqa: E402
from benchmarks.table import Case, main, same_bits  # noqa: E402
from grpo_engine import ops  # noqa: E402

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8 + 1e-5}  # of the largest element; bfloat16 rounds once, by 2^-8


def forward(name, M, O, I, dtype, *, compiled):
    x, weight = torch.randn(M, I).to(dtype), (torch.randn(O, I) / I**0.5).to(dtype)
    F = torch.nn.functional.linear
    rivals = dict(peers.plain(F, x, weight, compiled=compiled))
    if x.is_cuda:
        rivals[peers.LIBRARY] = lambda: ops.linear(x, weight, batch_invariant=False)
    return Case(
        name=f"{name} [{M}, {I}] x [{O}, {I}] {str(dtype)[6:]}",
        ours=lambda: ops.linear(x, weight),
        peers=rivals,
        expected=lambda: F(x.double(), weight.double()),
        # in float32 a sum is one chain, whose rounding is a random walk
        tolerance=max(TOLERANCE[dtype], 2.0**-24 * I**0.5),
        alone=lambda whole: same_bits(ops.linear(x[-1:], weight), whole[-1:]),
        flops=2.0 * M * O * I,
        nbytes=x.element_size() * (M * I + O * I + M * O),
        products=dtype,
    )


def training(name, M, O, I, dtype=torch.float32, *, compiled):
    leaves = [torch.randn(M, I).to(dtype).requires_grad_(), (torch.randn(O, I) / I**0.5).to(dtype).requires_grad_()]
    upstream = [torch.randn(M, O).to(dtype)]
    F = torch.nn.functional.linear
    rivals = dict(peers.plain_with_gradients(F, leaves, upstream, compiled=compiled))
    if upstream[0].is_cuda:
        rivals[peers.LIBRARY] = lambda: peers.with_gradients(partial(ops.linear, batch_invariant=False), leaves, upstream)
    return Case(
        name=f"{name} [{M}, {I}] x [{O}, {I}] {str(dtype)[6:]}, with gradients",
        ours=lambda: peers.with_gradients(ops.linear, leaves, upstream),
        peers=rivals,
        expected=lambda: peers.with_gradients(F, peers.doubled(leaves), [upstream[0].double()]),
        tolerance=1e-5 if dtype == torch.float32 else TOLERANCE[dtype],  # sums over thousands of rows
        alone=lambda whole: same_bits(ops.linear(leaves[0][-1:], leaves[1]), whole[0][-1:]),
        flops=6.0 * M * O * I,
        nbytes=3.0 * upstream[0].element_size() * (M * I + O * I + M * O),
        products=dtype,
    )


def cases(quick):
    for size in ("0.2M",) if quick else LADDER:
        width, _, heads, kv_heads, ffn = LADDER[size]
        qkv = width + 2 * kv_heads * (width // heads)
        for part, O, I in (("qkv", qkv, width), ("gate_up", 2 * ffn, width), ("down", width, ffn)):
            yield forward(f"{size} {part}, decode", 256, O, I, torch.float32, compiled=not quick and size == "0.2M")
            if part != "qkv":
                yield training(f"{size} {part}", 6144, O, I, compiled=False)
    for M in (8,) if quick else (1, 8, 32, 64):
        yield forward("0.5B up", M, 4864, 896, torch.bfloat16, compiled=not quick)
        yield forward("0.5B head", M, QWEN_VOCABULARY, 896, torch.bfloat16, compiled=False)
    if not quick:
        yield forward("square", 1024, 1024, 1024, torch.float32, compiled=False)


def cuda(quick):
    bf16 = torch.bfloat16
    for size in ("0.5B", "7B"):
        width, ffn, _, heads, kv_heads, head_dim, _ = QWEN[size]
        parts = {"gate_up": (2 * ffn, width), "down": (width, ffn)}
        if not quick:
            parts["qkv"] = ((heads + 2 * kv_heads) * head_dim, width)
        if size == "0.5B":
            parts["head"] = (QWEN_VOCABULARY, width)
        for part, (O, I) in parts.items():
            for M in (1, 32, 256) if quick else (1, 8, 32, 64, 128, 256):
                yield partial(forward, f"{size} {part}, decode", M, O, I, bf16, compiled=False)
        yield partial(training, f"{size} gate_up", 8192, 2 * ffn, width, bf16, compiled=False)
    yield partial(forward, "square", 4096, 4096, 4096, torch.float32, compiled=False)


if __name__ == "__main__":
    note = "Where torch.compile is absent it calls the same library product as eager torch."
    main("linear", cases, cuda=cuda, note=note)
