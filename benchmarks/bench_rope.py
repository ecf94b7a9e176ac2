"""rope beside transformers' apply_rotary_pos_emb, whose cos and sin are given."""

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

THETA = 1_000_000.0
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6}  # the peer rounds cos, sin, both products and the sum


def case(name, T, H, E, dtype, positions, *, gradients, compiled):
    x, position = torch.randn(T, H, E).to(dtype), torch.arange(T) % positions
    cos, sin = peers.rope_tables(position, E, THETA)
    short = cos.to(dtype), sin.to(dtype)

    def ours(x):
        return ops.rope(x, position, theta=THETA)

    def theirs(x):
        return peers.rope(x, *short)

    title = f"{name} [{T}, {H}, {E}] {str(dtype)[6:]}"

    def alone(whole):
        first = whole[0] if gradients else whole
        return same_bits(ops.rope(x[3:4], position[3:4], theta=THETA), first[3:4])

    nbytes = 2.0 * x.nbytes
    if not gradients:
        rivals = dict(peers.plain(theirs, x, compiled=compiled))
        if x.is_cuda:
            rivals["Liger, in place"] = peers.optional("liger_kernel", lambda: peers.liger_rope(x, *short))
            rivals["FlashInfer"] = peers.optional("flashinfer", lambda: peers.flashinfer_rope(x, position, THETA))
        return Case(
            name=title, ours=lambda: ours(x), peers=rivals,
            expected=lambda: peers.rope(x.double(), cos, sin), tolerance=TOLERANCE[dtype], alone=alone, nbytes=nbytes,
        )  # fmt: skip
    leaves, upstream = [x.clone().requires_grad_()], [torch.randn(T, H, E).to(dtype)]
    return Case(
        name=f"{title}, with gradients",
        ours=lambda: peers.with_gradients(ours, leaves, upstream),
        peers=peers.plain_with_gradients(theirs, leaves, upstream, compiled=compiled),
        expected=lambda: peers.with_gradients(
            lambda y: peers.rope(y, cos, sin), peers.doubled(leaves), [upstream[0].double()]
        ),
        tolerance=TOLERANCE[dtype],
        alone=alone,
        nbytes=2 * nbytes,
    )


def cases(quick):
    for size in ("0.2M",) if quick else LADDER:
        width, _, heads, kv_heads, _ = LADDER[size]
        H, E = heads + kv_heads, width // heads
        yield case(size, 6144, H, E, torch.float32, 24, gradients=True, compiled=size == "0.2M")
        if not quick:
            yield case(f"{size}, decode", 256, H, E, torch.float32, 24, gradients=False, compiled=size == "0.2M")
    yield case("0.5B", 2048, 16, 64, torch.bfloat16, 512, gradients=False, compiled=not quick)


def cuda(quick):
    bf16 = torch.bfloat16
    for size in ("0.5B", "7B") if quick else QWEN:
        _, _, _, heads, kv_heads, E, _ = QWEN[size]
        H = heads + kv_heads
        yield partial(case, size, 8192, H, E, bf16, 1024, gradients=False, compiled=not quick)
        yield partial(case, size, 8192, H, E, bf16, 1024, gradients=True, compiled=size == "7B")
        yield partial(case, f"{size}, decode", 256, H, E, bf16, 1024, gradients=False, compiled=False)


if __name__ == "__main__":
    note = "transformers computes cos and sin once for all layers: they are left out of its time."
    main("rope", cases, cuda=cuda, note=note)
