"""What a GPU can do: peaks from the makers' data sheets, and the fractions of them that a run is assumed to reach.

This is the only model of a GPU's time and memory. `study plan --gpu` and `study recommend --gpu` both use it, through
`grpo_engine.study.forecast`, which counts the work.

    learning   prefill, reference, forward and backward passes are bound by FLOP/s
    sampling   decoding, of training and of evaluations, is bound by bandwidth, or by FLOP/s where that is slower

The two fractions were measured on one H200 with bfloat16 weights of 0.5B and 1.5B (benchmarks/results/h200/results.md):

    training, 4,096 tokens      0.5B 132 TFLOP/s (0.13 of the peak), 1.5B 220 TFLOP/s (0.22)
    a decode step, recorded     0.5B 416 to 555 GB/s (0.09 to 0.12 of the peak), 1.5B 620 GB/s (0.13)

Larger models reach more. No other GPU and no float32 model was measured; the same fractions are assumed there. Give
your own as `estimate.flops_fraction` and `estimate.bandwidth_fraction` where you have measured them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from grpo_engine.train import footprint

GpuName = Literal["a100", "h100", "h200", "b200", "l40s", "l4", "mi300x"]

FLOPS_FRACTION = 0.22  # of the peak FLOP/s, in matmul-bound phases
BANDWIDTH_FRACTION = 0.12  # of the peak bandwidth, in decoding


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device, by the maker's data sheet; of several forms the SXM one."""

    name: str
    flops: float  # FLOP/s, bfloat16, dense, peak
    float32: float  # FLOP/s without tensor cores, peak
    bandwidth: float  # bytes a second
    memory: float  # bytes

    def peak(self, dtype: str) -> float:
        """FLOP/s of "bfloat16" or "float32" matmuls."""
        return self.flops if dtype == "bfloat16" else self.float32

    def learning_seconds(self, flops: float, *, dtype: str, flops_fraction: float = FLOPS_FRACTION) -> float:
        """Time of a phase that is bound by matmuls."""
        return flops / (self.peak(dtype) * flops_fraction)

    def sampling_seconds(
        self, flops: float, bytes_read: float, *, dtype: str, flops_fraction: float = FLOPS_FRACTION,
        bandwidth_fraction: float = BANDWIDTH_FRACTION,
    ) -> float:  # fmt: skip
        """Time of decoding: that of its matmuls or of its reads, whichever is longer.

        Args:
            flops: of all tokens.
            bytes_read: weights once a decode step; keys and values of each running sequence.
            dtype: of the weights.
            flops_fraction: of the peak FLOP/s.
            bandwidth_fraction: of the peak bandwidth.

        Returns:
            Seconds.
        """
        reads = bytes_read / (self.bandwidth * bandwidth_fraction)
        return max(self.learning_seconds(flops, dtype=dtype, flops_fraction=flops_fraction), reads)

    def devices(self, peak_bytes: float) -> int:
        """The smallest power of two of these GPUs that holds so much."""
        count = 1
        while peak_bytes > self.room(count):
            count *= 2
        return count

    def room(self, count: int) -> float:
        """Bytes that a run may fill on so many of these GPUs."""
        return count * footprint.ROOM * self.memory


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


def get_gpu(name: str) -> Gpu:
    """The GPU of a name.

    Raises:
        ValueError: it is not listed.
    """
    if name not in GPUS:
        raise ValueError(f"gpu must be one of {list(GPUS)}, got {name!r}")
    return GPUS[name]


def gpu_here() -> GpuName:
    """The key in `GPUS` of this machine's first GPU.

    Raises:
        ValueError: no GPU, or one that is not listed.
    """
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    for gpu in get_args(GpuName):
        if name is not None and gpu in name.lower().replace(" ", ""):
            return gpu
    raise ValueError(f"the GPU here must be one of {', '.join(GPUS)}, got {name or 'none'}")
