"""The records that one stage hands to the next.

P prompts, G responses per prompt, N = P*G sequences (row p*G + g), T packed tokens, R response tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]
RewardStatus = Literal["ok", "timeout", "crash", "error"]


class Message(NamedTuple):
    """One message of a chat."""

    role: str  # "system", "user", "assistant", ...
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One question with a known answer.

    Example: Problem(uid="chain/7+8", prompt="7+8=", answer="15", domain="chain", reward="exact", grade=0)
    """

    uid: str  # stable and unique within its task
    prompt: str  # text shown to the model, before any chat template; of several messages all contents
    answer: str  # ground truth in the form that the scorer reads
    domain: str  # task family, for instance "chain", "math", "code"
    reward: str  # name of the scorer (`grpo_engine.rewards`), or "module:function"
    messages: tuple[Message, ...] | None = None  # what a chat template is given; None: prompt is a user's only message
    grade: int | None = None  # difficulty level, None when ungraded
    info: Mapping[str, object] = field(default_factory=dict)  # what the source said besides


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSet:
    """Problems that are only ever evaluated."""

    name: str
    in_domain: bool  # same kind of problem as the training set
    problems: Sequence[Problem]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a run trains on and what it is tested on; the two share no problem."""

    name: str
    train: Sequence[Problem]
    evals: Mapping[str, EvalSet]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """The value of one response, in [0, 1], and how it was obtained; anything but "ok" is worth 0."""

    value: float
    status: RewardStatus = "ok"


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutStats:
    """Counts of one rollout, all in tokens but the last."""

    prefill_tokens: int  # prompt tokens computed, each prompt once per group
    recomputed_tokens: int  # tokens computed again after a preemption
    decode_tokens: int
    preemptions: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutBatch:
    """G responses to each of P prompts, packed end to end without padding.

    Example (P=1, G=2, prompt [5, 9], responses [2] and [7, 2]):
        tokens = [5, 9, 2, 5, 9, 7, 2], cu_seqlens = [0, 3, 7], prompt_len = [2, 2], finish = ("stop", "stop")
    """

    tokens: Tensor  # [T] int64, prompt + response of each sequence
    cu_seqlens: Tensor  # [N+1] int32, start of each sequence in tokens
    prompt_len: Tensor  # [N] int32, the response starts here
    logprob: Tensor  # [T] float32, natural log of p(tokens[t] | tokens before t); 0 at prompt tokens
    entropy: Tensor  # [T] float32, nats, of the distribution that token t was drawn from; 0 at prompt tokens
    finish: tuple[FinishReason, ...]  # N
    group_size: int
    temperature: float  # that the logits were divided by; 0: greedy
    stats: RolloutStats

    @property
    def num_sequences(self) -> int:
        return len(self.finish)

    @property
    def response_len(self) -> Tensor:
        """[N] int64, tokens of each response, stop token included when there is one."""
        return (self.cu_seqlens[1:] - self.cu_seqlens[:-1] - self.prompt_len).long()

    def take(self, groups: Sequence[int]) -> RolloutBatch:
        """Some of the P groups, in the order given; the counts in stats stay those of the whole rollout."""
        G = self.group_size
        kept = [g * G + i for g in groups for i in range(G)]
        starts, ends = self.cu_seqlens[:-1].tolist(), self.cu_seqlens[1:].tolist()
        rows = torch.cat([torch.arange(starts[n], ends[n], device=self.tokens.device) for n in kept])
        lengths = (self.cu_seqlens[1:] - self.cu_seqlens[:-1])[kept]
        return dataclasses.replace(
            self, tokens=self.tokens[rows], logprob=self.logprob[rows], entropy=self.entropy[rows],
            cu_seqlens=torch.cat([self.cu_seqlens[:1], lengths.cumsum(0)]).int(), prompt_len=self.prompt_len[kept],
            finish=tuple(self.finish[n] for n in kept),
        )  # fmt: skip

    @classmethod
    def join(cls, batches: Sequence[RolloutBatch]) -> RolloutBatch:
        """Rollouts of one group size and temperature behind each other, their counts added up."""
        first, *_ = batches
        ends = itertools.accumulate(int(b.cu_seqlens[-1]) for b in batches)
        starts = [0, *ends]
        return dataclasses.replace(
            first,
            **{
                name: torch.cat([getattr(b, name) for b in batches])
                for name in ("tokens", "logprob", "entropy", "prompt_len")
            },
            cu_seqlens=torch.cat(
                [first.cu_seqlens[:1], *(b.cu_seqlens[1:] + n for b, n in zip(batches, starts[:-1], strict=True))]
            ),
            finish=tuple(f for b in batches for f in b.finish),
            stats=RolloutStats(
                **{f.name: sum(getattr(b.stats, f.name) for b in batches) for f in dataclasses.fields(RolloutStats)}
            ),
        )

    def responses(self) -> list[list[int]]:
        """The response tokens of each sequence, stop token included when there is one."""
        starts = (self.cu_seqlens[:-1] + self.prompt_len).tolist()
        ends = self.cu_seqlens[1:].tolist()
        tokens = self.tokens.tolist()
        return [tokens[a:b] for a, b in zip(starts, ends, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """Packed sequences with what the loss needs for each of their R response tokens.

    S segments: the prompt of a group, then what each of the group's responses adds to it.

    Example (prompt [5, 9], responses [7, 2] and [4]): tokens = [5, 9, 7], cu_seqlens = [0, 2, 3, 3], cu_groups = [0, 3],
    rows = [1, 2, 1], target = [7, 2, 4] (the hidden state of row t predicts the token after t, so the last token of a
    sequence is not an input, and a response's first token is predicted at the end of the shared prompt).
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, of each token in its sequence, prompt included
    cu_seqlens: Tensor  # [S+1] int32 in tokens
    cu_groups: Tensor  # [M+1] int32 in segments; the first segment of a group is its prompt
    rows: Tensor  # [R] int64, row of tokens whose hidden state predicts target
    target: Tensor  # [R] int64
    cu_responses: Tensor  # [N+1] int32, start of each sequence's response tokens in rows
    num_inputs: int  # input tokens of the sequences, each counted whole: the T of 6 N T
    old_logprob: Tensor  # [R] float32, of the policy that sampled
    ref_logprob: Tensor | None  # [R] float32, of the reference; None when the KL coefficient is 0
    advantage: Tensor  # [R] float32
    temperature: float  # of old_logprob, hence of every log-prob that is compared with it

    @property
    def num_response_tokens(self) -> int:
        return self.target.numel()

    @property
    def num_sequences(self) -> int:
        return self.cu_responses.numel() - 1
