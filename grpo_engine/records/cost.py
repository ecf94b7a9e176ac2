"""Where the time of a run went, from its timing records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from grpo_engine.records.records import PHASES, PhaseCost, TimingRecord

OTHER = "other"  # wall-clock that no phase was booked for
COST_HEAD = ("phase", "seconds", "share", "tokens", "FLOPs", "GFLOP/s")


def total_cost(timings: Iterable[TimingRecord]) -> dict[str, PhaseCost]:
    """The cost of some steps by phase.

    Args:
        timings: records of one run.

    Returns:
        Sums in the order of `PHASES`, phases that did not happen left out, and last the rest of the wall-clock as
        "other"; no "other" when a record does not say its wall-clock time.
    """
    timings = list(timings)
    out: dict[str, PhaseCost] = {}
    for name in PHASES:
        found = [t.phase[name] for t in timings if name in t.phase]
        if found:
            out[name] = PhaseCost(
                seconds=sum(c.seconds for c in found),
                tokens=sum(c.tokens or 0 for c in found),
                flops=sum(c.flops or 0.0 for c in found),
            )
    if timings and all(t.seconds is not None for t in timings):
        wall = sum(t.seconds or 0.0 for t in timings)
        out[OTHER] = PhaseCost(seconds=max(0.0, wall - sum(c.seconds for c in out.values())))
    return out


def mean_cost(costs: Sequence[Mapping[str, PhaseCost]]) -> dict[str, PhaseCost]:
    """The mean of several runs' `total_cost`; a phase that a run lacks counts as nothing there."""
    n = len(costs)
    out = {}
    for name in (*PHASES, OTHER):
        found = [c[name] for c in costs if name in c]
        if found:
            out[name] = PhaseCost(
                seconds=sum(c.seconds for c in found) / n,
                tokens=round(sum(c.tokens or 0 for c in found) / n),
                flops=sum(c.flops or 0.0 for c in found) / n,
            )
    return out


def cost_rows(costs: Mapping[str, PhaseCost]) -> list[tuple[str, ...]]:
    """The cells under `COST_HEAD`: a row for each phase and one for all together.

    Args:
        costs: of `total_cost` or `mean_cost`.

    Returns:
        Text; empty where a phase has no tokens or FLOPs. GFLOP/s are FLOPs over the phase's own seconds.
    """
    seconds = sum(c.seconds for c in costs.values())
    tokens, flops = sum(c.tokens or 0 for c in costs.values()), sum(c.flops or 0.0 for c in costs.values())
    rows = [*costs.items(), ("all", PhaseCost(seconds=seconds, tokens=tokens, flops=flops))]
    return [
        (
            name,
            f"{c.seconds:.2f}",
            f"{c.seconds / seconds:.1%}" if seconds else "",
            f"{c.tokens:,}" if c.tokens else "",
            f"{c.flops:.3g}" if c.flops else "",
            f"{c.flops / c.seconds / 1e9:.1f}" if c.flops and c.seconds else "",
        )
        for name, c in rows
    ]
