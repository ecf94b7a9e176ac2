"""Which device a run computes on, found out without starting CUDA.

A process that has initialised CUDA cannot be forked, and the cells of a study are forks
(`grpo_engine.system.processes`). So GPUs are counted by `torch.cuda.device_count`, which asks the driver's management
library (NVML); `torch.cuda.is_available` would initialise CUDA. A run uses one GPU, the first that it sees:
CUDA_VISIBLE_DEVICES says which one that is, for torch and for every library beside it, and so a setting like cuda:1
would only be a second word for it.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")


def resolve(asked: str) -> Literal["cpu", "cuda"]:
    """What a configuration's device means on this machine.

    Args:
        asked: "auto" (cuda where there are a GPU and CUDA kernels, else cpu), "cpu" or "cuda".

    Returns:
        "cpu" or "cuda".

    Raises:
        ValueError: cuda is asked for, and the build has no CUDA kernels or torch sees no GPU.
    """
    if asked == "cpu" or (asked == "auto" and not (torch.cuda.device_count() and has_cuda_kernels())):
        return "cpu"
    if not has_cuda_kernels():
        raise ValueError(
            f"device=cuda: this build has no CUDA kernels (torch {torch.__version__}); install a CUDA torch and build "
            "again with nvcc on the PATH and GRPO_ENGINE_CUDA=1, or set device=cpu"
        )
    if not torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        raise ValueError(
            f"device=cuda: torch sees no GPU (CUDA_VISIBLE_DEVICES is {visible}); look at nvidia-smi, or set device=cpu"
        )
    return "cuda"


def require_capability() -> None:
    """Refuses a GPU that the CUDA kernels are not compiled for. It starts CUDA, so only a process that computes asks.

    Raises:
        ValueError: a compute capability under 8.0.
    """
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise ValueError(
            f"device=cuda: {torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, and the "
            "CUDA kernels need 8.0 (A100) or later; set device=cpu"
        )


def has_cuda_kernels() -> bool:
    """Whether the extension was built with them."""
    from grpo_engine import ops  # noqa: F401  registers what there is

    return torch._C._dispatch_has_kernel_for_dispatch_key("grpo_engine::rms_norm", "CUDA")


def visible_gpus() -> list[str]:
    """Each GPU that this process may use, as CUDA_VISIBLE_DEVICES would name it alone; [] where there is none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [str(i) for i in range(count)] if named is None else [x.strip() for x in named.split(",")][:count]


def move(record: Record, device: torch.device) -> Record:
    """The same record with its tensors on a device.

    Args:
        record: a dataclass with CPU tensors.
        device: where to. For a GPU the tensors are copied from pinned memory, and the host goes on meanwhile.

    Returns:
        The record itself for the CPU, else a new one.
    """
    if device.type == "cpu":
        return record
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(record, **{name: t.pin_memory().to(device, non_blocking=True) for name, t in tensors.items()})
