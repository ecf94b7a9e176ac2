"""Says what is built, what this machine has, and whether the engine keeps its promises here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grpo_engine import _C, ops
from grpo_engine.system import device, machine, threads


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
    hardware = machine.collect_hardware()
    versions = machine.collect_versions()
    return {
        "grpo_engine": str(versions["grpo_engine"]),
        "python": str(versions["python"]),
        "torch": str(versions["torch"]),
        "cpu": str(hardware["cpu"]),
        "instruction set": f"{_C.cpu_isa()} (this CPU has {', '.join(_C.cpu_isas())})",
        "threads": f"{threads_of_a_kernel()} in a kernel, as counted; torch has {torch.get_num_threads()}, "
        f"this process {hardware['cores']} cores",
        "cuda kernels": "built" if device.has_cuda_kernels() else "not built",
        "gpu": ", ".join(_gpu(i) for i in range(torch.cuda.device_count())) or "none",
        "device": f"{device.resolve('auto')} (what device=auto means here)",
    }


def _gpu(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    return f"{gpu.name} (compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 1e9:.0f} GB)"


def checks() -> list[Check]:
    """Tries the promises that results rest on: rows that depend on themselves alone, and kernels on all threads.

    Returns:
        One `Check` each, on the CPU and, where device=auto means it, on the GPU; all are quick.
    """
    places = dict.fromkeys(("cpu", device.resolve("auto")))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 96, generator=generator)
    weight = torch.randn(200, 96, generator=generator)
    rows = [check for place in places for check in _row_checks(x.to(place), weight.to(place))]
    return [*rows, _all_threads_check(), *_runtime_checks(), _same_bits_check()]


def threads_of_a_kernel() -> int:
    """How many threads take part in a kernel that has work for all that torch has.

    Returns:
        The number that was counted; fewer than `torch.get_num_threads()` is a fault of the build.
    """
    rows = 64 * torch.get_num_threads()  # each thread's part is 131,072 operations, enough to wake it
    x, weight = torch.ones(rows, 512), torch.ones(512)
    with threads.count_threads() as count:
        ops.rms_norm(x, weight, eps=1e-6)
    assert count.number is not None  # the block has ended
    return count.number


def _all_threads_check() -> Check:
    used, wanted = threads_of_a_kernel(), torch.get_num_threads()
    detail = f"rms_norm: {used} took part, torch has {wanted}"
    if used < wanted:
        detail += "; was the extension built with GRPO_ENGINE_OPENMP=0, or is OMP_THREAD_LIMIT set?"
    return Check(name="a kernel uses all threads of torch", ok=used == wanted, detail=detail)


def _runtime_checks() -> list[Check]:
    found = threads.openmp_runtimes()
    if found is None:
        return []
    detail = ", ".join(found) or "none is loaded"
    if len(found) > 1:
        detail += ": each runs threads of its own on the same cores; link the extension to the one that torch loads"
    return [Check(name="one OpenMP runtime at most is loaded", ok=len(found) <= 1, detail=detail)]


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


def _same_bits_check(op: Callable[..., torch.Tensor] = ops.rms_norm) -> Check:
    wanted = [1, max(2, torch.get_num_threads())]
    generator = torch.Generator().manual_seed(0)
    # the gradient of the weight is a sum over rows, which threads share in chunks of 64
    x = torch.randn(128 * wanted[1], 512, generator=generator).requires_grad_()
    weight = torch.randn(512, generator=generator).requires_grad_()
    results, counted = [], []
    for number in wanted:
        with threads.num_threads(number), threads.count_threads() as count:
            y = op(x, weight, eps=1e-6)
            results.append([y, *torch.autograd.grad(y, [x, weight], x)])
        counted.append(count.number)
    return Check(
        name="one and several threads give the same bits",
        ok=counted == wanted and all(torch.equal(a, b) for a, b in zip(*results, strict=True)),
        detail=f"rms_norm and its gradients on {counted[0]} and on {counted[1]} threads, as counted",
    )
