"""Scorers: an answer's text and its problem in, a number in [0, 1] out.

    exact          last word of the response equals the answer
    math           the last box, read for what it says (`rewards.answers`), expressions by math-verify
    choice         letter A to J in the last box
    logic          share of right cells of a zebra puzzle's grid, as in the paper
    logic_strict   1.0 for a grid that is right throughout, else 0.0
    code           HumanEval's tests, run in a sandbox
    paper_...      math, aime, gsm8k, choice, logic, code: as the paper's code scores (`rewards.paper`)
    module:name    a function of your own; `reward.function` gives it to every problem of a run

A scorer is deterministic, reads `problem.answer` and `problem.info` alone, and may hang, crash or raise on the text of
a model that is being trained to please it: `rewards.pool.RewardPool` runs it where that costs one zero. Nothing under
`grpo_engine.rewards` but `pool` imports torch, so that its workers start quickly and stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from grpo_engine.system import plugins


class Question(Protocol):
    """What a scorer sees of a problem; `grpo_engine.types.Problem` is one."""

    @property
    def answer(self) -> str: ...

    @property
    def info(self) -> Mapping[str, object]: ...


Scorer = Callable[[str, Question], float]

SCORERS: dict[str, str] = {
    "exact": "grpo_engine.rewards.exact:score",
    "math": "grpo_engine.rewards.math:score",
    "choice": "grpo_engine.rewards.choice:score",
    "logic": "grpo_engine.rewards.logic:score",
    "logic_strict": "grpo_engine.rewards.logic:score_strict",
    "code": "grpo_engine.rewards.code:score",
    "paper_math": "grpo_engine.rewards.paper:math",
    "paper_aime": "grpo_engine.rewards.paper:aime",
    "paper_gsm8k": "grpo_engine.rewards.paper:gsm8k",
    "paper_choice": "grpo_engine.rewards.paper:choice",
    "paper_logic": "grpo_engine.rewards.paper:logic",
    "paper_code": "grpo_engine.rewards.paper:code",
}

# Linear in the response, no parser of expressions, nothing run: safe in the trainer's own process.
HARMLESS = frozenset({"exact", "choice", "paper_choice"})


def register_scorer(name: str, target: str) -> None:
    """Makes a scorer known by name, for problems whose `reward` is that name. It always runs in a worker.

    Args:
        name: not yet taken, unless by the same target.
        target: "module:function"; imported in the workers, whose `sys.path` is the caller's.

    Raises:
        ValueError: the name is taken, or target has no "module:function" form.
    """
    if not plugins.is_target(target):
        raise ValueError(f"register_scorer: target must read 'module:function', got {target!r}")
    if SCORERS.setdefault(name, target) != target:
        raise ValueError(f"register_scorer: {name!r} is already {SCORERS[name]}, got {target}")


def scorer_target(name: str) -> str:
    """Where a scorer lives.

    Args:
        name: "exact", "math", ..., a registered one, or "module:function" itself.

    Returns:
        "module:function".

    Raises:
        ValueError: no such scorer; the message lists those there are.
    """
    if name not in SCORERS and not plugins.is_target(name):
        raise ValueError(f"no scorer {name!r}: there are {', '.join(sorted(SCORERS))}, and 'module:function'")
    return SCORERS.get(name, name)


def import_scorer(target: str) -> Scorer:
    """The function behind a target.

    Args:
        target: "module:function".

    Returns:
        The scorer.

    Raises:
        ValueError: no such module, or no such function in it.
    """
    return plugins.load(target, "scorer")
