"""What a started process does: one cell, or one model.

python -m grpo_engine.study.job cell FOLDER
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from grpo_engine.study.design import Cell, Kind
from grpo_engine.study.plan_view import human
from grpo_engine.system.console import allow_any_text

LOG_FILE = "log.txt"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One process to run. It succeeds when it exits with 0."""

    name: str
    arguments: tuple[str, ...]  # what `main` of this module is given
    log: Path  # standard output and error are appended to it
    after: tuple[str, ...]  # names of jobs that must be done first
    seconds: float  # estimate, for the order and the time left
    cell: Cell | None = None  # None for a model

    @property
    def command(self) -> tuple[str, ...]:
        """The command line that does the same."""
        return (sys.executable, "-m", __name__, *self.arguments)


def main(arguments: Sequence[str]) -> int:
    """What the processes do that `run_study` starts: `model SIZE KIND SEED` or `cell FOLDER`.

    Args:
        arguments: these words.

    Returns:
        The exit code.

    Raises:
        ValueError: other words than these.
    """
    from grpo_engine.system.startup import skip_compiler

    skip_compiler()
    allow_any_text()
    match list(arguments):
        case ["model", size, kind, seed]:
            from grpo_engine.micro.pretrain import ensure_model

            print(ensure_model(size, cast(Kind, kind), seed=int(seed), progress=_print_progress()), flush=True)
        case ["cell", folder]:
            from grpo_engine.config import load_run_config
            from grpo_engine.run.run import train

            path = Path(folder)
            train(load_run_config(path / CONFIG_FILE), path, wait_s=10.0)  # until its predecessor is gone
        case _:
            raise ValueError(f"expected 'model SIZE KIND SEED' or 'cell FOLDER', got {' '.join(arguments)!r}")
    return 0


def _print_progress() -> Callable[[int, int, float], None]:
    """Prints how far a pretraining is, at most every two seconds."""
    last = 0.0

    def progress(read: int, total: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last >= 2.0:
            last = time.monotonic()
            print(f"{read / total:.0%} of {human(total)} tokens, loss {loss:.3f}", flush=True)

    return progress


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
