"""ragged_attention, forward and backward, beside SDPA and transformers' eager attention."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import LADDER, QWEN, cumulative, equal_lengths, log_normal_lengths  # noqa: E402
from benchmarks.table import Case, WrongAnswer, main, relative_error, same_bits, tensors  # noqa: E402
from grpo_engine import ops  # noqa: E402
from grpo_engine.model.flops import causal_pairs  # noqa: E402

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-5}  # of the largest element


def case(name, N, mean, H, K, E, dtype, kind, *, gradients, compiled):
    lengths = (equal_lengths if kind == "equal" else log_normal_lengths)(N, mean)
    cu, scale = cumulative(lengths), E**-0.5
    packed = [torch.randn(sum(lengths), h, E).to(dtype) for h in (H, K, K)]
    upstream = torch.randn(sum(lengths), H, E).to(dtype)
    kept = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def dense(x):  # [N, heads, longest, E], padded on the right: causal attention needs no mask there
        return peers.padded(x.split(lengths), 0).transpose(1, 2).contiguous()

    def ragged(x):
        return x.transpose(1, 2)[kept]

    def ours(q, k, v):
        return ops.ragged_attention(q, k, v, cu, scale=scale)

    mine = [x.clone().requires_grad_(gradients) for x in packed]
    theirs, wide = [dense(x).requires_grad_(gradients) for x in packed], dense(upstream)

    def packed_peer(make):
        return lambda: (lambda attention: lambda: run(attention, mine, upstream))(make(cu, max(lengths)))

    def run(function, leaves, up):
        return peers.with_gradients(function, leaves, [up]) if gradients else [function(*leaves)]

    with torch.enable_grad():
        truth = [
            ragged(x) for x in run(peers.causal_attention, peers.doubled(theirs), wide.double())
        ]  # fmt: skip

    def check(who, result):
        result = tensors(result)
        got = result if result[0].dim() == 3 else [ragged(x) for x in result]
        error = relative_error(got, truth)
        if not error <= TOLERANCE[dtype]:
            raise WrongAnswer(f"error {error:.3g}, allowed {TOLERANCE[dtype]:.3g}")

    def alone(whole):
        n = lengths[0]
        leaves = [x[:n].clone().requires_grad_(gradients) for x in packed]
        part = run(lambda q, k, v: ops.ragged_attention(q, k, v, cu[:2], scale=scale), leaves, upstream[:n])
        return same_bits(part, [x[:n] for x in whole])

    rivals = {
        "SDPA, enable_gqa": lambda: run(peers.causal_sdpa, theirs, wide),
        "transformers' eager": lambda: run(peers.causal_attention, theirs, wide),
    }
    if compiled:
        fast = torch.compile(peers.causal_attention, dynamic=False)
        rivals["the same, torch.compile"] = lambda: run(fast, theirs, wide)
    if upstream.is_cuda and dtype != torch.float32:
        rivals["torch varlen_attn"] = peers.optional("torch.nn.attention.varlen", packed_peer(peers.torch_varlen))
        rivals["flash-attn varlen"] = peers.optional("flash_attn", packed_peer(peers.flash_attn_varlen))
    pairs = sum(causal_pairs(n) for n in lengths)
    times = 3 if gradients else 1
    return Case(
        name=f"{name} {N} x {mean} {kind} (longest {max(lengths)}), heads {H}/{K}, E={E} {str(dtype)[6:]}"
        + (", with gradients" if gradients else ""),
        ours=lambda: run(ours, mine, upstream),
        peers=rivals,
        tolerance=TOLERANCE[dtype],
        check=check,
        alone=alone,
        flops=4.0 * H * E * pairs * times,
        nbytes=times * 2.0 * (H + K) * E * sum(lengths) * upstream.element_size(),
        products=dtype,
    )


def cases(quick):
    f32, bf16 = torch.float32, torch.bfloat16
    for size in ("0.2M",) if quick else LADDER:
        width, _, heads, kv_heads, _ = LADDER[size]
        for kind in ("equal", "log-normal"):
            yield case(
                f"{size},", 256, 24, heads, kv_heads, width // heads, f32, kind, gradients=True,
                compiled=size == "0.2M" and kind == "equal",
            )  # fmt: skip
    for N, L in ((4, 512),) if quick else ((256, 24), (512, 24), (4, 512)):
        yield case("0.5B,", N, L, 14, 2, 64, f32, "equal", gradients=True, compiled=False)
        if not quick:
            yield case("0.5B,", N, L, 14, 2, 64, bf16, "equal", gradients=False, compiled=False)
    if not quick:
        yield case("0.5B,", 256, 24, 14, 2, 64, f32, "log-normal", gradients=True, compiled=False)


def cuda(quick):
    bf16 = torch.bfloat16
    for size in ("0.5B", "7B") if quick else QWEN:
        heads = QWEN[size][3:6]
        yield partial(case, f"{size},", 8, 1024, *heads, bf16, "equal", gradients=False, compiled=False)
        yield partial(case, f"{size},", 8, 1024, *heads, bf16, "equal", gradients=True, compiled=False)
        if not quick:
            yield partial(case, f"{size},", 32, 256, *heads, bf16, "log-normal", gradients=True, compiled=False)


if __name__ == "__main__":
    note = "SDPA and eager attention get inputs that are padded already; what padding costs is left out."
    main("ragged_attention", cases, cuda=cuda, note=note)
