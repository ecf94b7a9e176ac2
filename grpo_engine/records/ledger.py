"""Who spent what: tokens, FLOPs and seconds of each phase.

FLOPs and tokens follow from shapes alone and are the same in every run of a configuration; seconds are the
clock's, on CUDA the device's. One multiply-add counts as two FLOPs; norms, rotations and activations are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grpo_engine.records.records import PHASES, PhaseCost


class Ledger:
    """Adds up costs by phase, for the step at hand and for the whole run.

    Phases are those of `records.PHASES`; "evaluation" is kept out of `flops_without_evaluation`.

    Args:
        flops_so_far: of a run that goes on.
        device: on "cuda" the host runs ahead of the work, so `timed` puts marks (events) into the device's queue, and
            `close_step` reads how far apart they were.
    """

    def __init__(self, flops_so_far: float = 0.0, device: str = "cpu") -> None:
        self.flops_without_evaluation = flops_so_far
        self._on_cuda = device == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._step: dict[str, list[float]] = {}

    def add(self, phase: str, *, tokens: int = 0, flops: float = 0.0, seconds: float = 0.0) -> None:
        """Books a cost.

        Args:
            phase: one of `records.PHASES`.
            tokens: that went through the model.
            flops: see `forward_flops`.
            seconds: wall-clock.

        Raises:
            ValueError: an unknown phase.
        """
        if phase not in PHASES:
            raise ValueError(f"Ledger.add: phase must be one of {', '.join(PHASES)}, got {phase!r}")
        cost = self._step.setdefault(phase, [0.0, 0, 0.0])
        cost[0] += seconds
        cost[1] += tokens
        cost[2] += flops
        if phase != "evaluation":
            self.flops_without_evaluation += flops

    @contextmanager
    def timed(self, phase: str, *, tokens: int = 0, flops: float = 0.0) -> Iterator[None]:
        """Books the wall-clock time of a block besides what `add` takes."""
        if self._on_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._marks.append((phase, begin, end))
            return self.add(phase, tokens=tokens, flops=flops)
        start = time.perf_counter()
        yield
        self.add(phase, tokens=tokens, flops=flops, seconds=time.perf_counter() - start)

    def close_step(self) -> dict[str, PhaseCost]:
        """The costs booked since the last call, by phase, in the order of `records.PHASES`; on CUDA it waits."""
        for phase, begin, end in self._marks:
            end.synchronize()
            self.add(phase, seconds=begin.elapsed_time(end) / 1000)
        self._marks.clear()
        step, self._step = self._step, {}
        return {
            name: PhaseCost(seconds=step[name][0], tokens=int(step[name][1]), flops=step[name][2])
            for name in PHASES
            if name in step
        }
