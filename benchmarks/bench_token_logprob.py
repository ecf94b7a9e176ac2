"""token_logprob (head fused) beside a product, log_softmax, gather and entropy."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import LADDER, LADDER_VOCABULARY, QWEN_VOCABULARY  # noqa: E402
from benchmarks.table import Case, main, same_bits  # noqa: E402
from grpo_engine import ops  # noqa: E402

FLOAT32, BFLOAT16 = 2e-5, 2.0**-6  # the peer rounds its logits to bfloat16 before the softmax


def case(name, T, D, V, dtype, *, gradients, compiled):
    hidden, weight = torch.randn(T, D).to(dtype), (torch.randn(V, D) * (2 / D**0.5)).to(dtype)
    target = torch.randint(V, (T,))

    def ours(hidden, weight):
        return ops.token_logprob(hidden, weight, target)

    def theirs(hidden, weight):
        return peers.head_logprob_entropy(hidden, weight, target)

    title = f"{name} [{T}, {D}] x [{V}, {D}] {str(dtype)[6:]}"
    tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16

    def alone(whole):
        return same_bits(ops.token_logprob(hidden[1:2], weight, target[1:2]), [x[1:2] for x in whole[:2]])

    if not gradients:
        return Case(
            name=title, ours=lambda: ours(hidden, weight), peers=peers.plain(theirs, hidden, weight, compiled=compiled),
            expected=lambda: theirs(hidden.double(), weight.double()), tolerance=tolerance, alone=alone,
            flops=2.0 * T * D * V, nbytes=float(weight.numel() * weight.element_size()),
        )  # fmt: skip
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    upstream = [torch.randn(T), torch.randn(T) * 0.1]
    return Case(
        name=f"{title}, with gradients",
        ours=lambda: peers.with_gradients(ours, leaves, upstream),
        peers=peers.plain_with_gradients(theirs, leaves, upstream, compiled=compiled),
        expected=lambda: peers.with_gradients(theirs, peers.doubled(leaves), [u.double() for u in upstream]),
        tolerance=tolerance,
        alone=alone,
        flops=6.0 * T * D * V,
        nbytes=3.0 * weight.numel() * weight.element_size(),
    )


def cases(quick):
    f32, bf16 = torch.float32, torch.bfloat16
    for size in ("0.2M",) if quick else LADDER:
        D = LADDER[size][0]
        yield case(f"{size},", 4096, D, LADDER_VOCABULARY, f32, gradients=True, compiled=size == "0.2M")
        if not quick:
            yield case(f"{size},", 4096, D, LADDER_VOCABULARY, f32, gradients=False, compiled=False)
    T = 8 if quick else 64
    yield case("0.5B head,", T, 896, QWEN_VOCABULARY, bf16, gradients=False, compiled=False)
    if not quick:
        yield case("0.5B head,", T, 896, QWEN_VOCABULARY, bf16, gradients=True, compiled=False)


if __name__ == "__main__":
    main("token_logprob", cases, note="Ours holds no logits; FLOPs are 2 T D V forward and 6 with gradients.")
