"""Plain language modelling: packed documents, their loss, training on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_engine.model.decoder import Model
from grpo_engine.system.memory import keep_freed_memory
from grpo_engine.train.optimizer import adamw, update
from grpo_engine.train.schedule import Schedule

Progress = Callable[[int, int, float], None]  # (tokens read, tokens to read, loss)
CLIP_NORM = 1.0


@dataclass(frozen=True, slots=True)
class DocumentBatch:
    """Packed documents of one optimizer step: N of them, T inputs."""

    tokens: Tensor  # [T] int64, each document without its last token, which is predicted and never read
    cu_seqlens: Tensor  # [N+1] int32
    target: Tensor  # [T] int64, the token after each input
    weight: Tensor  # [T] float32, loss weight of each target


def language_loss(model: Model, batch: DocumentBatch) -> Tensor:
    """Weighted mean cross-entropy of the next token, in nats.

    Args:
        model: the model.
        batch: packed documents, on the model's device.

    Returns:
        Scalar float32, ``-sum(weight * logprob) / sum(weight)``, differentiable in the weights.
    """
    rows = torch.arange(batch.tokens.numel(), device=batch.tokens.device)
    logprob, _ = model.logprobs(batch.tokens, batch.cu_seqlens, rows=rows, target=batch.target)
    return -(batch.weight * logprob).sum() / batch.weight.sum()


def train_language(
    model: Model,
    schedule: Schedule,
    *,
    batches: Iterator[DocumentBatch],
    betas: tuple[float, float],
    progress: Progress | None = None,
) -> float:
    """Reads batches of documents until the schedule's tokens are spent.

    Args:
        model: trained in place.
        schedule: tokens and learning rate.
        batches: documents of one optimizer step each.
        betas: of AdamW, which has no weight decay here.
        progress: called every step.

    Returns:
        The last step's loss.

    Raises:
        RuntimeError: the training diverged, or a document holds a test problem.
    """
    keep_freed_memory()
    optimizer = adamw(model.parameters(), lr=schedule.lr, betas=betas)
    done, loss = 0, math.nan
    while done < schedule.tokens:
        batch = next(batches)
        step_loss = language_loss(model, batch)
        step_loss.backward()
        update(optimizer, lr=schedule.rate(done / schedule.tokens), clip_norm=CLIP_NORM)
        done += batch.tokens.numel()
        loss = float(step_loss.detach())
        if progress is not None:
            progress(min(done, schedule.tokens), schedule.tokens, loss)
    return loss
