"""What runs inside a worker process of `RewardPool`. Imports no torch."""

from __future__ import annotations

import functools
import math
import resource
import signal
import sys
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

from grpo_engine.rewards import Question, Scorer, import_scorer


class Item(NamedTuple):
    """What a scorer sees of a problem, and no more: prompts need not travel."""

    answer: str
    info: Mapping[str, object]


class Outcome(NamedTuple):
    """What one scoring gave."""

    value: float
    error: str | None = None  # of a scorer that raised: type and message


_load = functools.cache(import_scorer)


def prepare(targets: tuple[str, ...], memory_bytes: int, scratch: str) -> None:
    """Called once when a worker starts.

    Args:
        targets: scorers to import now, and to warm up by their module's `warm_up()` if it has one, so that no
            answer's time pays for it.
        memory_bytes: of address space; a scorer that wants more gets a MemoryError.
        scratch: folder for temporary files; whoever owns it removes it, since a killed worker removes nothing.
    """
    tempfile.tempdir = scratch
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for target in targets:
        module = sys.modules[import_scorer(target).__module__]
        getattr(module, "warm_up", lambda: None)()


def run(target: str, response: str, answer: str, info: Mapping[str, object], limit_s: int) -> Outcome:
    """Scores one answer.

    Args:
        target: the scorer, "module:function".
        response: decoded answer.
        answer: of the problem.
        info: of the problem.
        limit_s: wall-clock seconds after which the kernel ends this process.

    Returns:
        An `Outcome`; every exception is turned into text, since not every exception survives being pickled.
    """
    # The pool kills an overdue worker. This is for the worker whose pool is gone: the default action of SIGALRM
    # ends it in the middle of C code too.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limit_s)
    try:
        return checked(_load(target), response, Item(answer, info))
    except BaseException as e:
        return Outcome(0.0, f"{type(e).__name__}: {e}"[:500])
    finally:
        signal.alarm(0)


def checked(scorer: Scorer, response: str, problem: Question) -> Outcome:
    """Calls a scorer and refuses what is no reward.

    Args:
        scorer: any.
        response: decoded answer.
        problem: what the scorer takes.

    Returns:
        The value, as a float in [0, 1].

    Raises:
        ValueError: the scorer returned anything else.
        Exception: whatever the scorer raised.
    """
    value = scorer(response, problem)
    if not isinstance(value, (int, float)) or not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"a scorer must return a number in [0, 1], got {value!r}")
    return Outcome(float(value))
