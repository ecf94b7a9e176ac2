"""The control, which asks what RL really added: plain pretraining of the same length in its place.

It goes on with the base's own corpus, learning rate and annealing, for at least as many tokens a step as RL trains on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from grpo_engine.config import RunConfig
from grpo_engine.micro import facts
from grpo_engine.micro.corpus import Corpus
from grpo_engine.micro.ladder import MicroRecipe, recipe
from grpo_engine.micro.pretrain import document_batch, tested_keys
from grpo_engine.model.decoder import Model
from grpo_engine.model.flops import causal_pairs, forward_flops
from grpo_engine.records.ledger import Ledger
from grpo_engine.system.device import move
from grpo_engine.train.language import CLIP_NORM, DocumentBatch, language_loss
from grpo_engine.train.optimizer import update
from grpo_engine.train.schedule import Schedule


class ControlCorpus:
    """Documents of the control's steps: each step's are a function of (run seed, step) alone, so a run can resume.

    Args:
        r: recipe of the size; the control goes on with its corpus and learning rate.
        seed: of the run; its documents are others than those of pretraining.
        chat: an instruct model's control reads chat documents, as its second training did.
        tokens: that a step reads, or the few more that end its last batch of documents.
    """

    def __init__(self, r: MicroRecipe, *, seed: int, chat: bool, tokens: int) -> None:
        self.recipe = r
        self.tokens = tokens
        self._name = f"control/{r.seed}/{seed}"
        self._config = dataclasses.replace(r.corpus, chat=1.0) if chat else r.corpus

    def batches(self, step: int) -> Iterator[DocumentBatch]:
        """The optimizer steps of one run step.

        Args:
            step: 1 is the first.

        Yields:
            `DocumentBatch`es of `recipe.documents` documents each, until `tokens` are reached; the last holds
            as many documents as it still takes.
        """
        corpus = Corpus(f"{self._name}/{step}", config=self._config, held_out=tested_keys())
        left = self.tokens
        while left > 0:
            batch = document_batch(corpus, self.recipe.documents, max_tokens=left)
            left -= batch.tokens.numel()
            yield batch


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlOutcome:
    """What one step of the control did."""

    trained_tokens: int  # inputs of the training pass
    loss: float  # mean over the step's optimizer steps
    grad_norm: float  # before clipping, likewise


def control_corpus(config: RunConfig) -> ControlCorpus:
    """The documents that a control run reads.

    Args:
        config: of the run; model.size, .kind and .seed, seed, and batch.prompts x batch.group_size answers a step, each
            counted as long as a fully worked one: at least as many tokens as the RL run trains on.

    Returns:
        A `ControlCorpus`.

    Raises:
        ValueError: the model is a folder, whose corpus nobody knows, or no such size.
    """
    if config.model.size is None:
        raise ValueError("method=pretrain needs model.size: a control goes on with the corpus of an embedded model")
    chat = config.model.kind == "instruct"
    answers = config.batch.prompts * config.batch.group_size
    tokens = round(answers * facts.tokens_per_worked_answer(chat=chat))
    return ControlCorpus(recipe(config.model.size, seed=config.model.seed), seed=config.seed, chat=chat, tokens=tokens)


def control_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    corpus: ControlCorpus,
    *,
    config: RunConfig,
    step: int,
    ledger: Ledger,
) -> ControlOutcome:
    """Plain language modelling in the place of one GRPO step.

    The rate starts at the base's full learning rate and falls linearly to the floor of the base's schedule at the
    last step of the run: the most that plain pretraining can make of these tokens.

    Args:
        model: trained in place.
        optimizer: over its parameters; its learning rate is set here.
        corpus: of the run.
        config: of the run; its steps are the length of the annealing.
        step: 1 is the first.
        ledger: books the cost under "forward", "backward" and "optimizer".

    Returns:
        A `ControlOutcome`.

    Raises:
        RuntimeError: the training diverged.
    """
    base = corpus.recipe.base
    schedule = Schedule(tokens=corpus.tokens * config.steps, lr=base.lr, warmup=0.02, anneal=1.0, floor=base.floor)
    losses, norms, done = [], [], 0
    for batch in corpus.batches(step):
        T = batch.tokens.numel()
        pairs = sum(causal_pairs(n) for n in (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist())
        flops = forward_flops(model, tokens=T, pairs=pairs, head_rows=T)
        with ledger.timed("forward", tokens=T, flops=flops):
            loss = language_loss(model, move(batch, model.device))
        with ledger.timed("backward", tokens=T, flops=2 * flops):
            loss.backward()
        with ledger.timed("optimizer"):
            share = (step - 1 + min(done / corpus.tokens, 1.0)) / config.steps
            norms.append(update(optimizer, lr=schedule.rate(share), clip_norm=CLIP_NORM))
        losses.append(float(loss.detach()))
        done += T
    return ControlOutcome(trained_tokens=done, loss=sum(losses) / len(losses), grad_norm=sum(norms) / len(norms))
