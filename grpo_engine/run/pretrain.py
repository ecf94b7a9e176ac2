"""The control's step of a run: plain pretraining on as many tokens, and its record."""

from __future__ import annotations

import dataclasses

import torch

from grpo_engine.config import RunConfig
from grpo_engine.micro.control import ControlCorpus, control_step
from grpo_engine.model.decoder import Model
from grpo_engine.records.records import StepRecord
from grpo_engine.run.counters import Odometer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PretrainStepper:
    """Goes on with the pretraining of an embedded model."""

    config: RunConfig
    model: Model
    optimizer: torch.optim.Optimizer
    corpus: ControlCorpus
    position: Odometer

    def step(self, step: int) -> StepRecord:
        """Does a step; 1 is the first."""
        ledger = self.position.ledger
        outcome = control_step(self.model, self.optimizer, self.corpus, config=self.config, step=step, ledger=ledger)
        self.position.advance(step, prompts=0, tokens=outcome.trained_tokens)
        rate = self.optimizer.param_groups[0]["lr"]
        return StepRecord(**self.position.fields(), lr=rate, loss=outcome.loss, grad_norm=outcome.grad_norm)
