"""Which problems of a task have prompts that a run has room for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from grpo_engine.model.tokenizer import PromptTokens
from grpo_engine.types import Problem, Task


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FittingTask:
    """A task without its long prompts, and how many those were."""

    task: Task
    too_long: int
    evals_too_long: dict[str, int]  # of each evaluation set

    def notice(self, limit: int) -> str:
        """One line that says what was left out."""
        return (
            f"longer than {limit} tokens and left out: {self.too_long} of {len(self.task.train) + self.too_long} training "
            "prompts" + "".join(f", {n} of {name}" for name, n in self.evals_too_long.items() if n)
        )


def leave_out_long_prompts(task: Task, encode: PromptTokens, limit: int | None) -> FittingTask:
    """Keeps what fits, in training and in evaluation, and counts the rest.

    Args:
        task: any.
        encode: its prompts in tokens.
        limit: rollout.max_prompt_tokens; None keeps all.

    Returns:
        A `FittingTask`.

    Raises:
        ValueError: nothing would be left to train on, or of an evaluation set.
    """

    def fitting(what: str, problems: Sequence[Problem]) -> Sequence[Problem]:
        if limit is None:
            return problems
        kept = [p for p in problems if len(encode(p)) <= limit]
        if not kept:
            raise ValueError(f"rollout.max_prompt_tokens={limit} leaves no problem {what}")
        return kept

    train = fitting("to train on", task.train)
    evals = {name: dataclasses.replace(s, problems=fitting(f"of {name}", s.problems)) for name, s in task.evals.items()}
    return FittingTask(
        task=Task(name=task.name, train=train, evals=evals),
        too_long=len(task.train) - len(train),
        evals_too_long={name: len(s.problems) - len(evals[name].problems) for name, s in task.evals.items()},
    )
