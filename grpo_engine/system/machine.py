"""What a run ran on: versions, commit, hardware."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def collect_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that can change a result; None for one that is not installed.

    Returns:
        {"python": ..., "grpo_engine": ..., "torch": ..., ...}
    """
    from importlib import metadata

    names = ("grpo_engine", "torch", "transformers", "tokenizers", "safetensors", "math-verify", "pyarrow")
    out: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    return out


def collect_source(package: Path = Path(__file__).parents[1]) -> dict[str, str | None]:
    """Which code a run was made by.

    Args:
        package: folder of the package.

    Returns:
        {"commit": of the repository that the package lies in, with "-dirty" where files differ from it; None for an
        installed wheel, "wheel": SHA-256 of an installed wheel's list of files and hashes (RECORD); None in a repository}.
    """
    from importlib import metadata

    if (package.parent / ".git").exists():
        git = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            found = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            found = None  # no git here
        return {"commit": found, "wheel": None}
    try:
        record = metadata.distribution("grpo_engine").read_text("RECORD")
    except metadata.PackageNotFoundError:
        record = None
    return {"commit": None, "wheel": None if record is None else hashlib.sha256(record.encode()).hexdigest()}


def num_cores() -> int:
    """CPU cores that this process may use; 1 where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def collect_hardware() -> dict[str, Any]:
    """What the run is on: CPU, its vector instructions, cores, memory, threads, GPUs.

    Returns:
        {"platform", "cpu", "isa": list, "cores", "memory_bytes", "threads", "gpus": list}; None where the system
        does not say. `threads` and `gpus` are those of torch if it is loaded already, None if not;
        a study's job may get more or fewer threads later.
    """
    cpu: str | None = platform.processor() or None
    flags: set[str] = set()
    memory: int | None = None
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        pass  # not Linux: the fields stay None
    torch = sys.modules.get("torch")
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "isa": sorted(flags & {"avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd"}),
        "cores": num_cores(),
        "memory_bytes": memory,
        "threads": torch.get_num_threads() if torch else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else None,
    }
