"""How time is taken on a device, and what this machine can do, measured in the same run as the rows held against it."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from grpo_engine import ops

SAMPLE_S = 5e-3  # a sample of the host's clock repeats a call until it lasts about this long
SIDE = 1024  # of the square matrices on the CPU
READ_BYTES = 1 << 28  # larger than any last-level cache that is likely here
CUDA_SIDE, CUDA_SIDE_FP32, CUDA_COPY_BYTES = 8192, 4096, 1 << 30
LEAD_S = (50e-6, 20e-3)  # least and most that a GPU is kept busy before a sample, while the host launches it

Clock = Callable[[], float]
Run = Callable[[], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Rates of one machine with one number of threads, or of one GPU."""

    sgemm_torch: float  # FLOP/s of torch.mm, float32, 1024^3 (4096^3 on CUDA)
    sgemm_ours: float = 0.0  # FLOP/s of ops.linear at the same size; 0: not measured, as on CUDA
    read: float = 0.0  # B/s of a sum over memory; CPU only
    copy: float = 0.0  # B/s of a copy within the GPU's memory, read and written; CUDA only
    bf16: float = 0.0  # FLOP/s of torch.mm, bfloat16, 8192^3; CUDA only
    empty_s: float = 0.0  # s between two events with nothing between them; CUDA only

    @property
    def sgemm(self) -> float:
        """The better of the two products: what a share of the machine's limit means."""
        return max(self.sgemm_torch, self.sgemm_ours)

    def roof(self, *, flops: float, nbytes: float, bf16: bool = False) -> tuple[float, str]:
        """Shortest time that the limits allow.

        Args:
            flops: floating-point operations.
            nbytes: bytes that must be read or written at least once.
            bf16: whether the operands of products are bfloat16; no difference on the CPU.

        Returns:
            (seconds, "compute" or "memory").
        """
        compute = flops / (self.bf16 if bf16 and self.bf16 else self.sgemm)
        memory = nbytes / (self.copy or self.read)
        return (compute, "compute") if compute >= memory else (memory, "memory")

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        if self.bf16:
            return (
                f"torch.mm: bfloat16 8192^3 {self.bf16 / 1e12:.0f}, float32 4096^3 {self.sgemm_torch / 1e12:.0f} TFLOP/s; "
                f"copy {self.copy / 1e9:,.0f} GB/s; an empty interval {1e6 * self.empty_s:.1f} us"
            )
        return (
            f"SGEMM 1024^3: torch.mm {self.sgemm_torch / 1e9:.0f}, ops.linear {self.sgemm_ours / 1e9:.0f} GFLOP/s; "
            f"memory read {self.read / 1e9:.1f} GB/s"
        )


# ---------------------------------------------------------------- timers


class Timer(Protocol):
    """Takes the time of a call."""

    name: str  # shown under the table

    def prepare(self, run: Run) -> Any:
        """Calls `run` until it is warm; returns what `seconds` needs to know of it."""
        ...

    def seconds(self, run: Run, prepared: Any) -> float:
        """One sample: seconds a call."""
        ...


@dataclass(frozen=True, slots=True)
class HostTimer:
    """A clock of the host around as many calls as last a few milliseconds."""

    clock: Clock
    name: str

    def prepare(self, run: Run) -> int:
        taken = self._seconds(run)
        if taken < SAMPLE_S:  # a first call may have been the slow one
            taken = self._seconds(run)
        return max(1, round(SAMPLE_S / max(taken, 1e-7)))

    def seconds(self, run: Run, prepared: int) -> float:
        start = self.clock()
        for _ in range(prepared):
            run()
        return (self.clock() - start) / prepared

    def _seconds(self, run: Run) -> float:
        start = self.clock()
        run()
        return self.clock() - start


class WallTimer:
    """Wall-clock time of one call, until the GPU has done its work: for steps that host and GPU share."""

    name = "perf_counter, GPU idle before and after"

    def __init__(self, synchronize: Callable[[], None] = torch.cuda.synchronize) -> None:
        self.synchronize = synchronize

    def prepare(self, run: Run) -> None:
        run()

    def seconds(self, run: Run, prepared: None) -> float:
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start


class CudaTimer:
    """GPU time of one call between two events, with nothing of its inputs in the L2 cache.

    Before each sample the GPU reads four times its L2 cache (a read leaves nothing to be written back) and then spins
    for longer than the host takes to launch the call, so that a kernel of microseconds is not hidden by its launch. A
    call that waits for the GPU within itself is timed with its waits.
    """

    name = "CUDA events, cold L2"

    def __init__(self, cuda: Any = torch.cuda, clock: Clock = time.perf_counter) -> None:
        """`cuda` and `clock` can be stand-ins, for tests."""
        self.cuda, self.clock = cuda, clock
        cache = getattr(cuda.get_device_properties(cuda.current_device()), "L2_cache_size", 64 << 20)
        self.cold = torch.ones(cache, device=cuda.current_device())  # float32: four times the cache
        self.spins_a_second = 1.0
        spins = 10_000_000
        for _ in range(2):  # the first is of a GPU that wakes up
            self.spins_a_second = spins / self._between(lambda: cuda._sleep(spins))

    def prepare(self, run: Run) -> float:
        """Seconds that the GPU must be kept busy while the host launches the call."""
        run()
        self.cuda.synchronize()
        start = self.clock()
        run()
        taken = self.clock() - start
        self.cuda.synchronize()
        return min(max(2 * taken, LEAD_S[0]), LEAD_S[1])

    def seconds(self, run: Run, prepared: float) -> float:
        self.cold.sum()
        self.cuda._sleep(int(prepared * self.spins_a_second))
        return self._between(run)

    def _between(self, run: Run) -> float:
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)


def timer_for(device: str, threads: int, *, whole: bool = False) -> Timer:
    """How rows are timed.

    Args:
        device: "cpu" or "cuda".
        threads: on the CPU; with one the clock is that of CPU time, which other jobs on the machine do not enter.
        whole: whether rows are steps of a run, which host and GPU share, and not ops.

    Returns:
        The timer.
    """
    if device == "cuda":
        return WallTimer() if whole else CudaTimer()
    if threads == 1:
        return HostTimer(time.process_time, "process_time")
    return HostTimer(time.perf_counter, "perf_counter")


class Samples(list[float]):
    """Seconds a call, one entry a sample. `parts`: the same of each `part` of the call, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, list[float]] = {}


class _Stopwatch:
    """Adds up the parts of the calls of one sample."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.taken: dict[str, float] = {}


_stopwatch: _Stopwatch | None = None  # of the sample that is being taken


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """A named part of a call. It is timed while the host's clock takes a sample; otherwise this does nothing.

    Args:
        name: of the part; parts of one name add up.
    """
    watch = _stopwatch
    if watch is None:
        yield
        return
    start = watch.clock()
    yield
    watch.taken[name] = watch.taken.get(name, 0.0) + watch.clock() - start


def interleave(
    runs: Mapping[str, Run], *, timer: Timer, repeats: int, budget_s: float, at_least: int = 3, warm: bool = False
) -> dict[str, Samples]:
    """Times several functions in turns, A B A B, so that whatever the machine does meets all of them.

    Args:
        runs: by name; each is called at least once before it is timed.
        timer: see `timer_for`.
        repeats: samples of each, at least 1.
        budget_s: after this many seconds no further round is begun, once there are `at_least`.
        at_least: see budget_s.
        warm: each has been called before and takes seconds, so that a sample is one call. Timers of the host only.

    Returns:
        Seconds a call, by name, one entry a sample.
    """
    global _stopwatch
    prepared = {name: 1 if warm else timer.prepare(run) for name, run in runs.items()}
    samples = {name: Samples() for name in runs}
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= at_least and time.perf_counter() - begin > budget_s:
            break
        for name, run in runs.items():
            _stopwatch = _Stopwatch(timer.clock) if isinstance(timer, HostTimer) else None
            try:
                samples[name].append(timer.seconds(run, prepared[name]))
                for piece, seconds in (_stopwatch.taken if _stopwatch else {}).items():
                    samples[name].parts.setdefault(piece, []).append(seconds / prepared[name])
            finally:
                _stopwatch = None
    return samples


# ---------------------------------------------------------------- limits


def measure(device: str, threads: int = 1, *, repeats: int = 9) -> Limits:
    """Takes a second or two.

    Args:
        device: "cpu" or "cuda".
        threads: as for the rows.
        repeats: samples of each limit.

    Returns:
        Medians.
    """
    timer = timer_for(device, threads)

    def medians(runs: Mapping[str, Run]) -> dict[str, float]:
        taken = interleave(runs, timer=timer, repeats=repeats, budget_s=5.0)
        return {name: statistics.median(samples) for name, samples in taken.items()}

    if device == "cuda":
        a, b = torch.randn(2, CUDA_SIDE, CUDA_SIDE, device=device, dtype=torch.bfloat16)
        x, y = torch.randn(2, CUDA_SIDE_FP32, CUDA_SIDE_FP32, device=device)
        source, target = torch.randint(256, (2, CUDA_COPY_BYTES), dtype=torch.uint8, device=device)
        seconds = medians({
            "bf16": lambda: torch.mm(a, b),
            "fp32": lambda: torch.mm(x, y),
            "copy": lambda: target.copy_(source),
            "empty": lambda: None,
        })  # fmt: skip
        return Limits(
            sgemm_torch=2.0 * CUDA_SIDE_FP32**3 / seconds["fp32"],
            copy=2.0 * CUDA_COPY_BYTES / seconds["copy"],
            bf16=2.0 * CUDA_SIDE**3 / seconds["bf16"],
            empty_s=seconds["empty"],
        )
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    memory = torch.ones(READ_BYTES // 4)
    seconds = medians({
        "torch": lambda: torch.mm(a, b),
        "ours": lambda: ops.linear(a, b),
        "read": lambda: memory.sum(),
    })  # fmt: skip
    flops = 2.0 * SIDE**3
    return Limits(
        sgemm_torch=flops / seconds["torch"], sgemm_ours=flops / seconds["ours"], read=READ_BYTES / seconds["read"]
    )
