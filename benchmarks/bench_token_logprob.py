"""token_logprob (head fused) beside a product, log_softmax, gather and entropy."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import LADDER, LADDER_VOCABULARY, QWEN, QWEN_VOCABULARY, cumulative  # noqa: E402
from benchmarks.table import Case, main, same_bits  # noqa: E402
from grpo_engine import ops  # noqa: E402

FLOAT32, BFLOAT16 = 2e-5, 2.0**-6  # the peer rounds its logits to bfloat16 before the softmax
KL_COEF = 0.001


def case(name, T, D, V, dtype, *, gradients, compiled):
    hidden, weight = torch.randn(T, D).to(dtype), (torch.randn(V, D) * (2 / D**0.5)).to(dtype)
    target = torch.randint(V, (T,))

    def ours(hidden, weight, **how):
        return ops.token_logprob(hidden, weight, target, **how)

    def theirs(hidden, weight):
        return peers.head_logprob_entropy(hidden, weight, target)

    title = f"{name} [{T}, {D}] x [{V}, {D}] {str(dtype)[6:]}"
    tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16

    def alone(whole):
        return same_bits(ops.token_logprob(hidden[1:2], weight, target[1:2]), [x[1:2] for x in whole[:2]])

    if not gradients:
        rivals = dict(peers.plain(theirs, hidden, weight, compiled=compiled))
        if hidden.is_cuda:
            rivals[peers.LIBRARY] = lambda: ours(hidden, weight, batch_invariant=False)
        return Case(
            name=title, ours=lambda: ours(hidden, weight), peers=rivals,
            expected=lambda: theirs(hidden.double(), weight.double()), tolerance=tolerance, alone=alone,
            flops=2.0 * T * D * V, nbytes=float(weight.nbytes), products=dtype,
        )  # fmt: skip
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    upstream = [torch.randn(T), torch.randn(T) * 0.1]
    rivals = dict(peers.plain_with_gradients(theirs, leaves, upstream, compiled=compiled))
    if hidden.is_cuda:
        rivals[peers.LIBRARY] = lambda: peers.with_gradients(partial(ours, batch_invariant=False), leaves, upstream)
    return Case(
        name=f"{title}, with gradients",
        ours=lambda: peers.with_gradients(ours, leaves, upstream),
        peers=rivals,
        expected=lambda: peers.with_gradients(theirs, peers.doubled(leaves), [u.double() for u in upstream]),
        tolerance=tolerance,
        alone=alone,
        flops=6.0 * T * D * V,
        nbytes=3.0 * weight.nbytes,
        products=dtype,
    )


def grpo(name, N, R, D, V, dtype, *, compiled):
    """Loss and gradients from hidden states: our two ops beside TRL's formula over a head, and Liger's fusion of both."""
    T = N * R
    hidden, weight = torch.randn(T, D).to(dtype), (torch.randn(V, D) * (2 / D**0.5)).to(dtype)
    target, advantage, cu = torch.randint(V, (T,)), torch.randn(N), cumulative([R] * N)
    each = advantage.repeat_interleave(R)
    with torch.no_grad():
        now = ops.token_logprob(hidden, weight, target)[0]
    # no ratio comes near a clip, where rounding would decide whether a token has a gradient
    old, ref = (now + torch.randn(T) * s for s in (0.02, 0.3))
    mask, one = torch.ones(N, R), torch.ones(())
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]

    def ours(hidden, weight, **how):
        logprob, _ = ops.token_logprob(hidden, weight, target, **how)
        return ops.policy_loss(
            logprob, advantage=each, cu_seqlens=cu, old_logprob=old, ref_logprob=ref, kl_coef=KL_COEF
        ).loss  # fmt: skip

    def theirs(hidden, weight):
        logprob, _ = peers.head_logprob_entropy(hidden, weight, target)
        others = (x.to(logprob.dtype) for x in (old.view(N, R), ref.view(N, R), advantage, mask))
        return peers.trl_loss(logprob.view(N, R), *others)

    def liger():
        loss = peers.liger_grpo(KL_COEF)

        def of(hidden, weight):
            wide = hidden.view(N, R, D), weight, target.view(N, R), mask, advantage, old.view(N, R), ref.view(N, R)
            return loss(*wide)

        return lambda: peers.with_gradients(of, leaves, [one])

    rivals = dict(peers.plain_with_gradients(theirs, leaves, [one], compiled=compiled))
    rivals["Liger fused linear GRPO"] = peers.optional("liger_kernel", liger)
    if hidden.is_cuda:
        rivals[peers.LIBRARY] = lambda: peers.with_gradients(partial(ours, batch_invariant=False), leaves, [one])
    return Case(
        name=f"{name} GRPO loss from hidden [{N} x {R}, {D}], V={V} {str(dtype)[6:]}, with gradients",
        ours=lambda: peers.with_gradients(ours, leaves, [one]),
        peers=rivals,
        expected=lambda: peers.with_gradients(theirs, peers.doubled(leaves), [one.double()]),
        tolerance=2 * BFLOAT16 if dtype == torch.bfloat16 else FLOAT32,  # and the ratio's exponential
        flops=6.0 * T * D * V,
        nbytes=3.0 * weight.nbytes,
        products=dtype,
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


def cuda(quick):
    for size, (D, *_) in QWEN.items():
        if quick and size == "7B":
            continue
        rows = 4096, D, QWEN_VOCABULARY, torch.bfloat16
        yield partial(case, f"{size} head,", *rows, gradients=False, compiled=False)
        if not quick:
            yield partial(case, f"{size} head,", *rows, gradients=True, compiled=size == "0.5B")
        yield partial(grpo, f"{size} head,", 8, 512, *rows[1:], compiled=size == "0.5B" and not quick)


NOTE = (
    "Ours holds no logits; FLOPs are 2 T D V forward and 6 with gradients. Extra MB: beyond inputs and results. "
    "Targets on an H200: 3 times Liger's speed, at most 400 MB."
)

if __name__ == "__main__":
    main("token_logprob", cases, cuda=cuda, note=NOTE)
