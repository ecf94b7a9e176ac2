"""Says what is built, what this machine has, and whether the engine keeps its promises here."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from grpo_engine import _C, device, ops, records


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One promise, tried out."""

    name: str
    ok: bool
    detail: str


def facts() -> dict[str, str]:
    """What is built and what there is.

    Returns:
        Name to value, ready to print.
    """
    hardware = records.collect_hardware()
    versions = records.collect_versions()
    return {
        "grpo_engine": str(versions["grpo_engine"]),
        "python": str(versions["python"]),
        "torch": str(versions["torch"]),
        "cpu": str(hardware["cpu"]),
        "instruction set": f"{_C.cpu_isa()} (this CPU has {', '.join(_C.cpu_isas())})",
        "threads": str(torch.get_num_threads()),
        "matrix products": "own kernels, one order of summation; MKL is not used by the engine "
        f"(MKL_CBWR={os.environ.get('MKL_CBWR', 'unset')} changes nothing here)",
        "cuda kernels": "built" if device.has_cuda_kernels() else "not built",
        "gpu": ", ".join(_gpu(i) for i in range(torch.cuda.device_count())) or "none",
        "device": f"{device.resolve('auto')} (what device=auto means here)",
    }


def _gpu(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    return f"{gpu.name} (compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 1e9:.0f} GB)"


def checks() -> list[Check]:
    """Tries the promises that results rest on: rows that depend on themselves alone, on any number of threads.

    Returns:
        One `Check` each, on the CPU and, where device=auto means it, on the GPU; all are quick.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 96, generator=generator)
    weight = torch.randn(200, 96, generator=generator)
    target = torch.randint(200, (64,), generator=generator)
    threads = Check(
        name="one and several threads give the same bits",
        ok=_same_on_threads(lambda: ops.token_logprob(x, weight, target)[0]),
        detail=f"token_logprob on 1 and {max(2, torch.get_num_threads())} threads",
    )
    places = dict.fromkeys(("cpu", device.resolve("auto")))
    return [check for place in places for check in _row_checks(x.to(place), weight.to(place))] + [threads]


def _row_checks(x: torch.Tensor, weight: torch.Tensor) -> list[Check]:
    whole = ops.linear(x, weight)
    rows_alone = all(torch.equal(ops.linear(x[i : i + 1], weight)[0], whole[i]) for i in range(0, 64, 7))
    seed = torch.arange(64, device=x.device)
    sampled = ops.sample_token(whole, seed=seed, position=torch.zeros_like(seed))
    scored, _ = ops.token_logprob(x, weight, sampled.token)
    return [
        Check(
            name="a row of a product has the same bits alone and in a batch",
            ok=rows_alone,
            detail=f"linear, 64 rows, {x.device.type}",
        ),
        Check(
            name="a sampled token's log-prob equals the trainer's, bit for bit",
            ok=torch.equal(scored, sampled.logprob),
            detail=f"sample_token and token_logprob, 64 rows, {x.device.type}",
        ),
    ]


def _same_on_threads(thunk) -> bool:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = thunk()
        torch.set_num_threads(max(2, before))
        return torch.equal(one, thunk())
    finally:
        torch.set_num_threads(before)
