"""paged_attention beside SDPA on a dense cache: decoding."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import LADDER, QWEN, equal_lengths, log_normal_lengths  # noqa: E402
from benchmarks.table import Case, main, same_bits  # noqa: E402
from grpo_engine import ops  # noqa: E402

PAGE = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}  # of the largest element


def pages_of(key, value, table):
    """Pages [num_pages, K, ...] that hold dense keys and values [B, K, L, E] where a table [B, pages] says."""
    (B, K, L, E), n = key.shape, int(table.max()) + 1
    key_pages, value_pages = key.new_zeros(n, K, E, PAGE), key.new_zeros(n, K, PAGE, E)
    place = torch.arange(L)
    for b in range(B):
        slot = table[b].long()[place // PAGE] * PAGE + place % PAGE
        k, v = (x[b].transpose(0, 1).contiguous() for x in (key, value))
        ops.kv_write(k, v, key_pages, value_pages, slot)
    return key_pages, value_pages


def case(name, B, mean, H, K, E, dtype, kind, *, compiled):
    lengths = (equal_lengths if kind == "equal" else log_normal_lengths)(B, mean)
    longest = max(lengths)
    query = torch.randn(B, H, E).to(dtype)
    key, value = torch.randn(2, B, K, longest, E).to(dtype)
    each = -(-longest // PAGE)
    table = torch.randperm(B * each).view(B, each).int()
    key_pages, value_pages = pages_of(key, value, table)
    place = torch.arange(longest)
    cu, kv_len = torch.arange(B + 1, dtype=torch.int32), torch.tensor(lengths).int()
    scale = E**-0.5

    def ours():
        return ops.paged_attention(query, key_pages, value_pages, table, cu, kv_len, scale=scale)

    def alone(whole):
        part = ops.paged_attention(
            query[1:2], key_pages, value_pages, table[1:2], cu[:2], kv_len[1:2], scale=scale
        )  # fmt: skip
        return same_bits(part, whole[1:2])

    mask = None if kind == "equal" else (place < kv_len[:, None])[:, None, None]
    wide = query[:, :, None]

    def theirs(function):
        return lambda: function(wide, key, value, mask)[:, :, 0]

    rivals = {
        "SDPA, heads as rows": theirs(peers.decode_heads_as_rows),
        "SDPA, enable_gqa": theirs(peers.decode_sdpa),
        "repeat_kv + SDPA": theirs(peers.decode_repeat_kv),
    }
    if compiled:
        rivals["repeat_kv + SDPA, compiled"] = theirs(torch.compile(peers.decode_repeat_kv, dynamic=False))
    if query.is_cuda:
        rivals["FlashInfer"] = peers.optional(
            "flashinfer", lambda: peers.flashinfer_decode(query, key, value, lengths, PAGE)
        )  # fmt: skip
    return Case(
        name=f"{name} B={B} L={mean} {kind} (longest {longest}), heads {H}/{K}, E={E} {str(dtype)[6:]}",
        ours=ours,
        peers=rivals,
        expected=lambda: peers.decode_sdpa(wide.double(), key.double(), value.double(), mask)[:, :, 0],
        tolerance=TOLERANCE[dtype],
        alone=alone,
        flops=4.0 * H * E * sum(lengths),
        nbytes=2.0 * K * E * sum(lengths) * query.element_size(),
        products=dtype,
    )


def shared(name, groups, G, P, C, H, K, E, dtype):
    """Groups of G sequences whose pages of the first P tokens are the same, with C tokens of their own each."""
    B, scale = groups * G, E**-0.5
    query = torch.randn(B, H, E).to(dtype)
    prefix, own = torch.randn(2, groups, K, P, E).to(dtype), torch.randn(2, B, K, C, E).to(dtype)
    key, value = torch.cat([prefix.repeat_interleave(G, dim=1), own], dim=3)
    first = torch.arange(groups * P // PAGE).view(groups, -1).repeat_interleave(G, dim=0)
    then = groups * P // PAGE + torch.arange(B * C // PAGE).view(B, -1)
    table, apart = torch.cat([first, then], dim=1).int(), torch.arange(B * (P + C) // PAGE).view(B, -1).int()
    pages, pages_apart = pages_of(key, value, table), pages_of(key, value, apart)
    cu, kv_len = torch.arange(B + 1, dtype=torch.int32), torch.full((B,), P + C).int()
    wide = query[:, :, None]

    def ours(pages=pages, table=table):
        return ops.paged_attention(query, *pages, table, cu, kv_len, scale=scale)

    rivals = {"ours, no page shared": lambda: ours(pages_apart, apart)}
    if query.is_cuda:
        rivals["FlashInfer cascade"] = peers.optional(
            "flashinfer", lambda: peers.flashinfer_cascade(query, prefix, own, PAGE)
        )  # fmt: skip
    return Case(
        name=f"{name} {groups} groups of {G}, {P} shared + {C} own, heads {H}/{K}, E={E} {str(dtype)[6:]}",
        ours=ours,
        peers=rivals,
        expected=lambda: peers.decode_sdpa(wide.double(), key.double(), value.double())[:, :, 0],
        tolerance=TOLERANCE[dtype],
        alone=lambda whole: same_bits(ours(pages_apart, apart), whole),
        flops=4.0 * H * E * B * (P + C),
        nbytes=2.0 * K * E * (groups * P + B * C) * query.element_size(),
        products=dtype,
    )


def cases(quick):
    for size in ("0.2M",) if quick else LADDER:
        width, _, heads, kv_heads, _ = LADDER[size]
        E = width // heads
        yield case(f"{size},", 256, 16, heads, kv_heads, E, torch.float32, "equal", compiled=not quick and size == "0.2M")
        if not quick:
            yield case(f"{size},", 256, 16, heads, kv_heads, E, torch.float32, "log-normal", compiled=False)
    for B in (8,) if quick else (8, 32):
        yield case("0.5B,", B, 512, 14, 2, 64, torch.bfloat16, "equal", compiled=not quick)
        yield case("0.5B,", B, 512, 14, 2, 64, torch.bfloat16, "log-normal", compiled=False)


def cuda(quick):
    bf16 = torch.bfloat16
    for size in ("0.5B", "7B") if quick else QWEN:
        heads = QWEN[size][3:6]
        for B in (32, 256):
            yield partial(case, f"{size},", B, 1024, *heads, bf16, "equal", compiled=False)
        if not quick:
            yield partial(case, f"{size},", 256, 512, *heads, bf16, "log-normal", compiled=False)
        yield partial(shared, f"{size},", 16, 16, 512, 512, *heads, bf16)


NOTE = (
    "SDPA reads a dense cache and masks what a shorter row does not have. Targets on an H200: three quarters of the copy "
    "bandwidth at E=128, 0.9 of FlashInfer's speed; with a shared prefix 1.5 times that without."
)

if __name__ == "__main__":
    main("paged_attention", cases, cuda=cuda, note=NOTE)
