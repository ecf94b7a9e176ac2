"""rms_norm beside transformers' Qwen2RMSNorm, torch's own and torch.compile."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import inspect  # noqa: E402

import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import LADDER, QWEN  # noqa: E402
from benchmarks.table import Case, main, same_bits, tensors  # noqa: E402
from grpo_engine import ops  # noqa: E402

EPS = 1e-6
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2.0**-6}  # of the largest element; bfloat16 rounds up to three times


def forward(name, T, D, dtype, *, compiled):
    x, weight = torch.randn(T, D).to(dtype), torch.rand(D).to(dtype) + 0.5
    return Case(
        name=f"{name} [{T}, {D}] {str(dtype)[6:]}",
        ours=lambda: ops.rms_norm(x, weight, eps=EPS),
        peers={
            **peers.plain(peers.rms_norm, x, weight, compiled=compiled),
            "F.rms_norm": lambda: torch.nn.functional.rms_norm(x, (D,), weight, EPS),
        }
        | (libraries(x, weight) if x.is_cuda else {}),
        expected=lambda: peers.rms_norm(x.double(), weight.double()),
        tolerance=TOLERANCE[dtype],
        alone=lambda whole: same_bits(ops.rms_norm(x[3:4], weight, eps=EPS), whole[3:4]),
        nbytes=2.0 * x.numel() * x.element_size(),
    )


def libraries(x, weight):
    def liger():
        norm = peers.liger_rms_norm()
        return lambda: norm(x, weight, EPS)

    return {
        "Liger": peers.optional("liger_kernel", liger),
        "FlashInfer": peers.optional("flashinfer", lambda: peers.flashinfer_rms_norm(x, weight, EPS)),
    }


def with_residual(name, T, D, dtype, *, compiled):
    x, residual = torch.randn(2, T, D).to(dtype)
    weight = torch.rand(D).to(dtype) + 0.5
    fused = "residual" in inspect.signature(ops.rms_norm).parameters

    def ours(x=x, residual=residual):
        if fused:
            return ops.rms_norm(x, weight, eps=EPS, residual=residual)
        total = x + residual
        return ops.rms_norm(total, weight, eps=EPS), total

    return Case(
        name=f"{name} [{T}, {D}] {str(dtype)[6:]} + residual",
        ours=ours,
        peers=peers.plain(peers.add_rms_norm, x, residual, weight, compiled=compiled),
        expected=lambda: (peers.rms_norm((x + residual).double(), weight.double()), x + residual),
        tolerance=TOLERANCE[dtype],
        alone=lambda whole: same_bits(ours(x[3:4], residual[3:4]), [y[3:4] for y in tensors(whole)]),
        nbytes=4.0 * x.numel() * x.element_size(),
    )


def training(name, T, D, dtype=torch.float32, *, compiled):
    leaves = [torch.randn(T, D).to(dtype).requires_grad_(), (torch.rand(D) + 0.5).to(dtype).requires_grad_()]
    upstream = [torch.randn(T, D).to(dtype)]

    def ours(x, weight):
        return ops.rms_norm(x, weight, eps=EPS)

    def liger():
        norm = peers.liger_rms_norm()
        return lambda: peers.with_gradients(lambda x, weight: norm(x, weight, EPS), leaves, upstream)

    rivals = dict(peers.plain_with_gradients(peers.rms_norm, leaves, upstream, compiled=compiled))
    if leaves[0].is_cuda:
        rivals["Liger"] = peers.optional("liger_kernel", liger)
    return Case(
        name=f"{name} [{T}, {D}] {str(dtype)[6:]}, with gradients",
        ours=lambda: peers.with_gradients(ours, leaves, upstream),
        peers=rivals,
        expected=lambda: peers.with_gradients(peers.rms_norm, peers.doubled(leaves), [upstream[0].double()]),
        tolerance=1e-5 if dtype == torch.float32 else TOLERANCE[dtype],  # the weight's gradient sums T rows
        alone=lambda whole: same_bits(ours(leaves[0][3:4], leaves[1]), whole[0][3:4]),
        nbytes=5.0 * upstream[0].nbytes,
    )


def cases(quick):
    for size in ("0.2M",) if quick else LADDER:
        yield training(size, 6144, LADDER[size][0], compiled=size == "0.2M")
        if not quick:
            yield forward(f"{size}, decode", 256, LADDER[size][0], torch.float32, compiled=size == "0.2M")
    yield forward("0.5B", 2048, 896, torch.bfloat16, compiled=not quick)
    yield with_residual("0.5B", 2048, 896, torch.bfloat16, compiled=True)


def cuda(quick):
    bf16 = torch.bfloat16
    for size in ("0.5B", "7B") if quick else QWEN:
        D = QWEN[size][0]
        yield partial(forward, size, 8192, D, bf16, compiled=not quick)
        yield partial(with_residual, size, 8192, D, bf16, compiled=size == "7B")
        yield partial(training, size, 8192, D, bf16, compiled=not quick)
        yield partial(forward, f"{size}, decode", 256, D, bf16, compiled=False)


if __name__ == "__main__":
    main("rms_norm", cases, cuda=cuda)
