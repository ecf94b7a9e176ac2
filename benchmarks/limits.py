"""What this machine can do, measured in the same run as the rows that are held against it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from grpo_engine import ops

SAMPLE_S = 5e-3  # a sample repeats a call until it lasts about this long
SIDE = 1024  # of the square matrices
READ_BYTES = 1 << 28  # larger than any last-level cache that is likely here

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Rates of one machine with one number of threads."""

    sgemm_torch: float  # FLOP/s of torch.mm, float32, 1024^3
    sgemm_ours: float  # FLOP/s of ops.linear at the same size
    read: float  # B/s of a sum over memory

    @property
    def sgemm(self) -> float:
        """The better of the two products: what a share of the machine's limit means."""
        return max(self.sgemm_torch, self.sgemm_ours)

    def roof(self, *, flops: float, nbytes: float) -> tuple[float, str]:
        """Shortest time that the limits allow.

        Args:
            flops: floating-point operations.
            nbytes: bytes that must be read or written at least once.

        Returns:
            (seconds, "compute" or "memory").
        """
        compute, memory = flops / self.sgemm, nbytes / self.read
        return (compute, "compute") if compute >= memory else (memory, "memory")

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"SGEMM 1024^3: torch.mm {self.sgemm_torch / 1e9:.0f}, ops.linear {self.sgemm_ours / 1e9:.0f} GFLOP/s; "
            f"memory read {self.read / 1e9:.1f} GB/s"
        )


def clock_for(threads: int) -> Clock:
    """CPU time for one thread, which other jobs on the machine do not enter; wall-clock time for more."""
    return time.process_time if threads == 1 else time.perf_counter


def interleave(
    runs: Mapping[str, Callable[[], object]], *, clock: Clock, repeats: int, budget_s: float, at_least: int = 3
) -> dict[str, list[float]]:
    """Times several functions in turns, A B A B, so that whatever the machine does meets all of them.

    Args:
        runs: by name; each is called at least once before it is timed.
        clock: seconds.
        repeats: samples of each, at least 1.
        budget_s: after this many seconds no further round is begun, once there are `at_least`.
        at_least: see budget_s.

    Returns:
        Seconds a call, by name, one entry a sample.
    """
    loops = {}
    for name, run in runs.items():
        taken = _seconds(run, clock)
        if taken < SAMPLE_S:  # a first call may have been the slow one
            taken = _seconds(run, clock)
        loops[name] = max(1, round(SAMPLE_S / max(taken, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= at_least and time.perf_counter() - begin > budget_s:
            break
        for name, run in runs.items():
            start = clock()
            for _ in range(loops[name]):
                run()
            samples[name].append((clock() - start) / loops[name])
    return samples


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    start = clock()
    run()
    return clock() - start


def measure(clock: Clock, *, repeats: int = 9) -> Limits:
    """Takes a second or two.

    Args:
        clock: as for the rows.
        repeats: samples of each limit.

    Returns:
        Medians.
    """
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    memory = torch.ones(READ_BYTES // 4)
    runs = {
        "torch": lambda: torch.mm(a, b),
        "ours": lambda: ops.linear(a, b),
        "read": lambda: memory.sum(),
    }
    seconds = {
        name: statistics.median(taken)
        for name, taken in interleave(runs, clock=clock, repeats=repeats, budget_s=5.0).items()
    }
    flops = 2.0 * SIDE**3
    return Limits(
        sgemm_torch=flops / seconds["torch"], sgemm_ours=flops / seconds["ours"], read=READ_BYTES / seconds["read"]
    )
