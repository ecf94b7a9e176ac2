"""What a GPU can do for a plan: the makers' figures, and assumptions.

`UTILISATION` is the share of the bfloat16 peak that a whole GRPO step reaches, sampling included. It is an assumption, not
a measurement: here training at 1.5B reached 0.22 on an H200, other programs commonly 0.4, and decoding is far below. Give
your own where you have measured it.
"""

from __future__ import annotations

from dataclasses import dataclass

UTILISATION = 0.15
BYTES_PER_PARAMETER = 18  # bfloat16 weights, gradients and a reference; float32 master weights and two AdamW moments
LEDGER_OVER_6NT = 2.0  # sampling, the reference pass and the old log-probs, beside forward and backward: 12 N T in all


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device, by the maker's data sheet; of several forms the SXM one."""

    name: str
    flops: float  # FLOP/s, bfloat16, dense, peak
    float32: float  # FLOP/s without tensor cores, peak
    bandwidth: float  # bytes a second
    memory: float  # bytes

    def peak(self, dtype: str) -> float:
        """FLOP/s of "bfloat16" or "float32" products."""
        return self.flops if dtype == "bfloat16" else self.float32


GPUS = {
    g.name: g
    for g in (
        Gpu(name="a100", flops=312e12, float32=19.5e12, bandwidth=2.04e12, memory=80e9),
        Gpu(name="h100", flops=989e12, float32=67e12, bandwidth=3.35e12, memory=80e9),
        Gpu(name="h200", flops=989e12, float32=67e12, bandwidth=4.8e12, memory=141e9),
        Gpu(name="b200", flops=2250e12, float32=75e12, bandwidth=7.7e12, memory=180e9),
        Gpu(name="l40s", flops=362e12, float32=91.6e12, bandwidth=0.864e12, memory=48e9),
        Gpu(name="l4", flops=121e12, float32=30.3e12, bandwidth=0.3e12, memory=24e9),
        Gpu(name="mi300x", flops=1307e12, float32=163.4e12, bandwidth=5.3e12, memory=192e9),
    )
}


def budget(
    name: str, hours: float, *, count: int = 1, utilisation: float = UTILISATION, overhead: float = LEDGER_OVER_6NT
) -> float:
    """What GPU hours buy, in the 6 N T that the laws are about.

    Args:
        name: a key of `GPUS`.
        hours: wall-clock, positive.
        count: devices.
        utilisation: share of the peak over a whole step, in (0, 1].
        overhead: FLOPs of all phases over 6 N T.

    Returns:
        FLOPs.

    Raises:
        ValueError: an unknown GPU, or a value out of range; the message names it.
    """
    if name not in GPUS:
        raise ValueError(f"gpu must be one of {list(GPUS)}, got {name!r}")
    for what, value, good in (
        ("hours", hours, hours > 0), ("count", count, count >= 1), ("utilisation", utilisation, 0 < utilisation <= 1),
        ("overhead", overhead, overhead >= 1),
    ):  # fmt: skip
        if not good:
            raise ValueError(f"{what}: out of range, got {value}")
    return GPUS[name].flops * utilisation * 3600.0 * hours * count / overhead
