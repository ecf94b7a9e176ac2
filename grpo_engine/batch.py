"""Cuts a rollout into optimizer steps and micro-batches of packed tokens.

A minibatch is what one optimizer step sees: whole groups, in order. A micro-batch is what goes through the model at
once: whole sequences, up to a token budget. Losses divide by the minibatch's totals, so the cut into micro-batches
changes memory and rounding, never the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_engine.model import packed_positions
from grpo_engine.types import RolloutBatch, TrainBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Minibatch:
    """The sequences of one optimizer step."""

    micro_batches: tuple[TrainBatch, ...]
    num_tokens: int  # answer tokens, the denominator of a token mean
    num_sequences: int


def pack(rollout: RolloutBatch, advantage: Tensor, *, sequences: Sequence[int]) -> TrainBatch:
    """Packs some sequences of a rollout for training.

    Args:
        rollout: N sequences.
        advantage: [N] float32, one for each sequence, given to all its answer tokens.
        sequences: indices in [0, N), in the order wanted.

    Returns:
        A `TrainBatch` without reference log-probs.

    Raises:
        IndexError: a sequence outside the rollout.
    """
    index = torch.as_tensor(list(sequences), dtype=torch.int64)
    starts = rollout.cu_seqlens[:-1].long()[index]
    lengths = rollout.cu_seqlens[1:].long()[index] - starts
    prompt_len = rollout.prompt_len.long()[index]
    inputs = lengths - 1  # the last token is predicted, never read
    answers = lengths - prompt_len
    cu_seqlens, cu_answers = _cumulative(inputs), _cumulative(answers)
    place = packed_positions(cu_seqlens)
    source = torch.repeat_interleave(starts, inputs) + place
    within = packed_positions(cu_answers)
    target_source = torch.repeat_interleave(starts + prompt_len, answers) + within
    return TrainBatch(
        tokens=rollout.tokens[source],
        positions=place,
        cu_seqlens=cu_seqlens,
        rows=torch.repeat_interleave(cu_seqlens[:-1].long() + prompt_len - 1, answers) + within,
        target=rollout.tokens[target_source],
        cu_answers=cu_answers,
        old_logprob=rollout.logprob[target_source],
        ref_logprob=None,
        advantage=torch.repeat_interleave(advantage.float()[index], answers),
    )


def minibatches(
    rollout: RolloutBatch, advantage: Tensor, *, count: int, tokens_per_micro_batch: int
) -> Iterator[Minibatch]:
    """The optimizer steps of a rollout, in order.

    Args:
        rollout: N = P*G sequences.
        advantage: [N] float32.
        count: how many minibatches; P must divide by it.
        tokens_per_micro_batch: budget of a micro-batch; a longer sequence goes alone.

    Yields:
        `count` minibatches of N/count sequences each.

    Raises:
        ValueError: P does not divide by count.
    """
    prompts = rollout.num_sequences // rollout.group_size
    if prompts % count:
        raise ValueError(f"minibatches: {prompts} prompts do not divide into {count} minibatches")
    size = rollout.num_sequences // count
    lengths = (rollout.cu_seqlens[1:] - rollout.cu_seqlens[:-1]).tolist()
    for first in range(0, rollout.num_sequences, size):
        micro = [
            pack(rollout, advantage, sequences=part)
            for part in _fill(range(first, first + size), lengths, tokens_per_micro_batch)
        ]
        yield Minibatch(
            micro_batches=tuple(micro),
            num_tokens=sum(m.num_answer_tokens for m in micro),
            num_sequences=size,
        )


def _fill(sequences: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    part: list[int] = []
    used = 0
    for n in sequences:
        if part and used + lengths[n] > budget:
            yield part
            part, used = [], 0
        part.append(n)
        used += lengths[n]
    if part:
        yield part


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
