"""Cuts a rollout into optimizer steps and micro-batches of packed tokens.

A minibatch is what one optimizer step sees: whole groups, in order, without what is masked. A micro-batch is what goes
through the model at once: whole groups, up to a token budget. The responses of a group share their prompt, whose tokens
are computed once: P + G R tokens and not G (P + R). Losses divide by the minibatch's totals, so the cut into
micro-batches changes memory and rounding, never the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_engine.model.decoder import packed_positions
from grpo_engine.types import RolloutBatch, TrainBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Minibatch:
    """The sequences of one optimizer step."""

    micro_batches: tuple[TrainBatch, ...]
    num_tokens: int  # response tokens, the denominator of a token mean
    num_sequences: int


def pack(rollout: RolloutBatch, advantage: Tensor, *, sequences: Sequence[int]) -> TrainBatch:
    """Packs some sequences of a rollout for training.

    Args:
        rollout: N sequences.
        advantage: [N] float32, one for each sequence, given to all its response tokens.
        sequences: indices in [0, N), in the order wanted; neighbours of one group share their prompt.

    Returns:
        A `TrainBatch` without reference log-probs.

    Raises:
        IndexError: a sequence outside the rollout.
    """
    on = rollout.tokens.device
    index = torch.tensor(list(sequences), dtype=torch.int64, device=on)
    starts = rollout.cu_seqlens[:-1].long()[index]
    prompt_len = rollout.prompt_len.long()[index]
    responses = rollout.response_len[index]

    # segments: a prompt where a group starts, and behind it the response of each of its sequences but the last token,
    # which is predicted and never read
    opens = torch.ones_like(index, dtype=torch.bool)
    opens[1:] = index[1:] // rollout.group_size != index[:-1] // rollout.group_size
    response_segment = torch.arange(index.numel(), device=on) + opens.cumsum(0)
    prompt_segment = response_segment[opens] - 1
    segments = index.numel() + prompt_segment.numel()
    length, source, position = torch.zeros(3, segments, dtype=torch.int64, device=on)
    length[prompt_segment], source[prompt_segment] = prompt_len[opens], starts[opens]
    length[response_segment], source[response_segment] = responses - 1, starts + prompt_len
    position[response_segment] = prompt_len
    cu_seqlens, cu_responses = _cumulative(length), _cumulative(responses)
    within_segment = packed_positions(cu_seqlens)

    # a response's first token is predicted at the end of the shared prompt
    within = packed_positions(cu_responses)
    first = torch.repeat_interleave(cu_seqlens.long()[response_segment], responses)
    last_of_prompt = cu_seqlens.long()[prompt_segment[opens.cumsum(0) - 1] + 1] - 1
    rows = torch.where(within == 0, torch.repeat_interleave(last_of_prompt, responses), first + within - 1)
    target_source = torch.repeat_interleave(starts + prompt_len, responses) + within
    return TrainBatch(
        tokens=rollout.tokens[torch.repeat_interleave(source, length) + within_segment],
        positions=torch.repeat_interleave(position, length) + within_segment,
        cu_seqlens=cu_seqlens,
        cu_groups=torch.cat([prompt_segment, torch.tensor([segments], device=on)]).int(),
        rows=rows,
        target=rollout.tokens[target_source],
        cu_responses=cu_responses,
        num_inputs=int((prompt_len + responses - 1).sum()),
        old_logprob=rollout.logprob[target_source],
        ref_logprob=None,
        advantage=torch.repeat_interleave(advantage.float()[index], responses),
        temperature=rollout.temperature,
    )


def minibatches(
    rollout: RolloutBatch,
    advantage: Tensor,
    *,
    count: int,
    tokens_per_micro_batch: int,
    mask_truncated: bool = False,
) -> Iterator[Minibatch]:
    """The optimizer steps of a rollout, in order.

    Args:
        rollout: N = P*G sequences.
        advantage: [N] float32.
        count: how many minibatches; P must divide by it.
        tokens_per_micro_batch: budget of a micro-batch. A larger group is cut, each part with the prompt; a longer
            sequence goes alone.
        mask_truncated: leave responses out that ended at the length limit: they are not computed, and no denominator
            counts them.

    Yields:
        `count` minibatches of N/count sequences each, less what is masked; one of none has no micro-batch.

    Raises:
        ValueError: P does not divide by count.
    """
    prompts = rollout.num_sequences // rollout.group_size
    if prompts % count:
        raise ValueError(f"minibatches: {prompts} prompts do not divide into {count} minibatches")
    G = rollout.group_size
    kept = [not mask_truncated or finish == "stop" for finish in rollout.finish]
    groups = [[n for n in range(p * G, p * G + G) if kept[n]] for p in range(prompts)]
    prompt_len, response_len = rollout.prompt_len.tolist(), rollout.response_len.tolist()
    size = prompts // count
    for first in range(0, prompts, size):
        parts = _fill(groups[first : first + size], prompt_len, response_len, tokens_per_micro_batch)
        micro = [pack(rollout, advantage, sequences=part) for part in parts]
        yield Minibatch(
            micro_batches=tuple(micro),
            num_tokens=sum(m.num_response_tokens for m in micro),
            num_sequences=sum(m.num_sequences for m in micro),
        )


def _fill(
    groups: Sequence[Sequence[int]], prompt_len: Sequence[int], response_len: Sequence[int], budget: int
) -> Iterator[list[int]]:
    part: list[int] = []
    used = 0
    for group in groups:
        if part and group and used + prompt_len[group[0]] + sum(response_len[n] for n in group) > budget:
            yield part
            part = []
        for n in group:
            shares = part and part[-1] >= group[0]
            cost = response_len[n] + (0 if shares else prompt_len[n])
            if shares and used + cost > budget:
                yield part
                part, cost = [], response_len[n] + prompt_len[n]
            used = used + cost if part else cost
            part.append(n)
    if part:
        yield part


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64, device=lengths.device), lengths.cumsum(0)]).int()
