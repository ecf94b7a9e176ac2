"""kv_write beside index_copy_ into a flat cache and index_put into our own pages."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import LADDER  # noqa: E402
from benchmarks.table import OURS, Case, WrongAnswer, main, same_bits  # noqa: E402
from grpo_engine import ops  # noqa: E402

PAGE = 16


def case(name, T, K, E, dtype, num_pages):
    key, value = torch.randn(2, T, K, E).to(dtype)
    slot = torch.randperm(num_pages * PAGE)[:T]
    pages = {
        who: (torch.zeros(num_pages, K, E, PAGE, dtype=dtype), torch.zeros(num_pages, K, PAGE, E, dtype=dtype))
        for who in (OURS, "index_put, our pages", "part")
    }
    flat = torch.zeros(2, num_pages * PAGE, K, E, dtype=dtype)

    def ours():
        ops.kv_write(key, value, *pages[OURS], slot)
        return pages[OURS]

    def put():
        peers.kv_index_put(key, value, *pages["index_put, our pages"], slot)
        return pages["index_put, our pages"]

    def copy():
        peers.kv_index_copy(key, value, flat[0], flat[1], slot)
        return list(flat)

    def check(who, result):
        if who == "index_copy, flat cache":
            stored = result[0][slot], result[1][slot]
        else:
            stored = result[0][slot // PAGE, :, :, slot % PAGE], result[1][slot // PAGE, :, slot % PAGE]
        if not same_bits(stored, [key, value]):
            raise WrongAnswer("stored keys or values are not those given")

    def alone(whole):
        for t in range(0, T, 3), range(1, T, 3), range(2, T, 3):  # in parts, in another order
            rows = torch.tensor(list(t), device=slot.device)
            ops.kv_write(key[rows], value[rows], *pages["part"], slot[rows])
        return same_bits(pages["part"], whole)

    return Case(
        name=f"{name} [{T}, {K}, {E}] {str(dtype)[6:]}",
        ours=ours,
        peers={"index_copy, flat cache": copy, "index_put, our pages": put},
        tolerance=0.0,
        check=check,
        alone=alone,
        nbytes=4.0 * key.numel() * key.element_size(),
    )


def cases(quick):
    for size in ("0.2M",) if quick else LADDER:
        width, _, heads, kv_heads, _ = LADDER[size]
        yield case(f"{size}, decode", 256, kv_heads, width // heads, torch.float32, 640)
    for T in (32,) if quick else (32, 2048):
        yield case("0.5B", T, 2, 64, torch.bfloat16, 1088)


def cuda(quick):
    for T in (256, 8192):
        yield partial(case, "0.5B", T, 2, 64, torch.bfloat16, 16384)
        yield partial(case, "7B", T, 4, 128, torch.bfloat16, 16384)


if __name__ == "__main__":
    main("kv_write", cases, cuda=cuda)
