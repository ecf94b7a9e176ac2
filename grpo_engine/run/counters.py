"""How far a run has come: what every record begins with, and what a checkpoint keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

from grpo_engine.records.ledger import Ledger


@dataclasses.dataclass(kw_only=True, slots=True)
class Counters:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0
    prompts_seen: int = 0
    trained_tokens: int = 0
    flops: float = 0.0  # the ledger's, evaluation left out


class Odometer:
    """Keeps the counters of a run, and states them as records do."""

    def __init__(self, counters: Counters, ledger: Ledger, *, unique: int, params: int) -> None:
        """Goes on from counters.

        Args:
            counters: of the steps that were done; kept up to date here.
            ledger: books the cost of the run's steps.
            unique: different training problems that there are.
            params: of the model, without embedding and head.
        """
        self.counters, self.ledger = counters, ledger
        self._unique, self._params = unique, params

    def advance(self, step: int, *, prompts: int, tokens: int) -> None:
        """A step was done: so many prompts were sampled for, and so many tokens trained on."""
        self.counters.step = step
        self.counters.prompts_seen += prompts
        self.counters.trained_tokens += tokens
        self.counters.flops = self.ledger.flops_without_evaluation

    def fields(self) -> dict[str, Any]:
        """The fields of `records.Position`, which steps and evaluations share."""
        seen = self.counters.prompts_seen
        return {
            "step": self.counters.step,
            "prompts_seen": seen,
            "unique_prompts": min(seen, self._unique),
            "trained_tokens": self.counters.trained_tokens,
            "compute_6nt": 6.0 * self._params * self.counters.trained_tokens,
            "compute_ledger": self.counters.flops,
        }
