"""The learning rate of language modelling over a budget of tokens. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Tokens to read, and the learning rate on the way: linear warm-up, constant, linear annealing."""

    tokens: int
    lr: float
    warmup: float = 0.025  # share of the tokens
    anneal: float = 0.5  # share of the tokens, at the end
    floor: float = 0.03  # the last rate, as a share of lr

    def rate(self, done: float) -> float:
        """The learning rate.

        Args:
            done: share of the tokens that were read, in [0, 1].

        Returns:
            The rate; it is never 0, so that the first step moves the weights.
        """
        up = min(1.0, (done + 1e-3) / self.warmup) if self.warmup else 1.0
        down = min(1.0, (1.0 - done) / self.anneal) if self.anneal else 1.0
        return self.lr * up * (self.floor + (1.0 - self.floor) * max(down, 0.0))
