"""paged_attention beside SDPA on a dense cache: decoding."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import LADDER, equal_lengths, log_normal_lengths  # noqa: E402
from benchmarks.table import Case, main, same_bits  # noqa: E402
from grpo_engine import ops  # noqa: E402

PAGE = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}  # of the largest element


def case(name, B, mean, H, K, E, dtype, kind, *, compiled):
    lengths = (equal_lengths if kind == "equal" else log_normal_lengths)(B, mean)
    longest = max(lengths)
    query = torch.randn(B, H, E).to(dtype)
    key, value = torch.randn(2, B, K, longest, E).to(dtype)
    each = -(-longest // PAGE)
    table = torch.randperm(B * each).view(B, each).int()
    key_pages = torch.zeros(B * each, K, E, PAGE, dtype=dtype)
    value_pages = torch.zeros(B * each, K, PAGE, E, dtype=dtype)
    place = torch.arange(longest)
    for b in range(B):
        slot = table[b].long()[place // PAGE] * PAGE + place % PAGE
        k, v = (x[b].transpose(0, 1).contiguous() for x in (key, value))
        ops.kv_write(k, v, key_pages, value_pages, slot)
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
    return Case(
        name=f"{name} B={B} L={mean} {kind} (longest {longest}), heads {H}/{K}, E={E} {str(dtype)[6:]}",
        ours=ours,
        peers=rivals,
        expected=lambda: peers.decode_sdpa(wide.double(), key.double(), value.double(), mask)[:, :, 0],
        tolerance=TOLERANCE[dtype],
        alone=alone,
        flops=4.0 * H * E * sum(lengths),
        nbytes=2.0 * K * E * sum(lengths) * query.element_size(),
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


if __name__ == "__main__":
    main("paged_attention", cases, note="SDPA reads a dense cache and masks what a shorter row does not have.")
