"""Prompts in, answers out: drives the native scheduler, the paged KV cache and the model.

The C++ scheduler (csrc/rollout) decides what each step computes; this module makes tensors of its plan, runs the
model on it and hands the drawn tokens back. An answer depends on its prompt, its seed and the weights alone: not on
the batch, the number of pages or preemption.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo_engine import _C, ops
from grpo_engine.config import RolloutConfig
from grpo_engine.ledger import Ledger, forward_flops
from grpo_engine.model import Layer, Model, packed_positions
from grpo_engine.types import RolloutBatch, RolloutStats

Progress = Callable[[int, int], None]  # (answers finished, answers asked for)
Answered = Callable[[list[int], list[list[int]]], None]  # (sequences that a step finished, their answer tokens)


def derive_seeds(*parts: int, count: int) -> Tensor:
    """Seeds of `count` requests, from what names them.

    Args:
        parts: integers that identify the draw, for instance (run seed, stream, step); any order matters.
        count: how many.

    Returns:
        [count] int64, SplitMix64 of the parts and the index: well mixed, the same on every machine.
    """
    with np.errstate(over="ignore"):
        state = np.uint64(0x9E3779B97F4A7C15)
        for part in parts:
            state = _mix(state ^ _mix(np.uint64(part % 2**64)))
        seeds = _mix(state + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return torch.from_numpy(seeds.view(np.int64))


def _mix(x: np.uint64) -> np.uint64:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class KVCache:
    """Keys and values of all layers in pages.

    key [L, num_pages, K, E, page_size], value [L, num_pages, K, page_size, E]: a page holds the keys of one token
    across its rows, so that attention reads sixteen keys with one vector.
    """

    def __init__(self, model: Model, num_pages: int, page_size: int) -> None:
        c = model.config
        L, K, E = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
        like = model.embed.weight
        self.key = like.new_empty((L, num_pages, K, E, page_size))
        self.value = like.new_empty((L, num_pages, K, page_size, E))

    def copy_pages(self, pairs: Tensor) -> None:
        """Copies pages; pairs [C, 2] int32 of (source, destination)."""
        if pairs.numel():
            source, destination = pairs.long().unbind(1)
            for pages in (self.key, self.value):
                pages.index_copy_(1, destination, pages.index_select(1, source))

    def at(self, step: _StepTensors) -> PagedSequences:
        """What `Model.forward` takes as sequences in this step."""
        return PagedSequences(self, step)


class _StepTensors:
    """A scheduler's plan as tensors (they share the plan's memory)."""

    def __init__(self, plan) -> None:
        for name in ("tokens", "positions", "slots", "cu_query", "kv_len", "page_table", "page_copies",
                     "sample_row", "sample_seq", "sample_seed", "sample_position"):
            setattr(self, name, torch.from_numpy(getattr(plan, name)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """Prompts that are answered alike: one of the parts that `generate_all` answers together."""

    prompts: Sequence[Sequence[int]]  # P, each a non-empty list of token ids in [0, V)
    group_size: int  # G >= 1 answers to each
    seeds: Tensor  # [P*G] int64, one for each answer, row p*G + g (see `derive_seeds`)
    temperature: float  # 0 is greedy
    max_new_tokens: int

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.group_size


class PagedSequences:
    """The new tokens of a step, whose keys and values go to pages and meet those that are there."""

    def __init__(self, cache: KVCache, step: _StepTensors) -> None:
        self.cache, self.step = cache, step

    def layer(self, index: int, layer: Layer, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        """See `model.Sequences`."""
        s = self.step
        return ops.decoder_layer_paged(
            x_TD, layer.weights, positions_T, self.cache.key[index], self.cache.value[index], s.slots,
            s.page_table, s.cu_query, s.kv_len, theta=layer.theta, eps=layer.eps,
            batch_invariant=layer.batch_invariant,
        )  # fmt: skip


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    seeds: Tensor,
    stop_ids: Sequence[int],
    config: RolloutConfig,
    temperature: float | None = None,
    ledger: Ledger | None = None,
    phase: str | None = None,
    progress: Progress | None = None,
    answered: Answered | None = None,
) -> RolloutBatch:
    """Samples `group_size` answers to each prompt.

    Args:
        model: the policy.
        prompts: P prompts, each a non-empty list of token ids in [0, V).
        group_size: G >= 1.
        seeds: [P*G] int64, one for each answer, row p*G + g (see `derive_seeds`).
        stop_ids: an answer ends with any of these ("stop"); the stop token belongs to the answer.
        config: lengths, filters, pages and batch limits.
        temperature: overrides config.temperature; 0 is greedy.
        ledger: books the cost, under "prefill" and "decode" or, when given, under `phase`.
        phase: see ledger.
        progress: called after each step.
        answered: called after each step with the answers that it finished.

    Returns:
        A `RolloutBatch`. Its log-probs and entropies are those of softmax(logits / temperature) - of
        temperature 1 when greedy - whether or not a filter was on: what training recomputes.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, the wrong number of seeds, a prompt that with
            its answer exceeds the model's positions or the page pool; the prompt is named.
        RuntimeError: the model's logits hold NaN or infinity; the sequence and position are named.
    """
    ask = Ask(
        prompts=prompts,
        group_size=group_size,
        seeds=seeds,
        temperature=config.temperature if temperature is None else temperature,
        max_new_tokens=config.max_new_tokens,
    )
    return generate_all(
        model, [ask], stop_ids=stop_ids, config=config, ledger=ledger, phase=phase, progress=progress, answered=answered
    )[0]


def generate_all(
    model: Model,
    asks: Sequence[Ask],
    *,
    stop_ids: Sequence[int],
    config: RolloutConfig,
    ledger: Ledger | None = None,
    phase: str | None = None,
    progress: Progress | None = None,
    answered: Answered | None = None,
) -> list[RolloutBatch]:
    """Answers several asks in one go, so that the batch stays full until the last of them runs out.

    An answer is the one that `generate` gives for its ask alone. Sequences are numbered through all asks.

    Args:
        model: the policy.
        asks: what to answer.
        stop_ids, ledger, phase, progress, answered: see `generate`.
        config: filters, pages and batch limits; its temperature and max_new_tokens are the asks' own.

    Returns:
        A `RolloutBatch` for each ask; their `stats` are those of the whole.

    Raises:
        ValueError, RuntimeError: see `generate`; prompts are numbered through all asks.
    """
    scheduler = _queue(model, asks, stop_ids, config)
    cache = KVCache(model, scheduler.num_pages, config.page_size)
    N = sum(ask.num_sequences for ask in asks)
    temperature_N = torch.cat([torch.full((ask.num_sequences,), ask.temperature) for ask in asks])
    filters = {
        "top_k": config.top_k,
        "top_p": config.top_p if config.top_p < 1.0 else None,
        "min_p": config.min_p if config.min_p > 0.0 else None,
    }
    drawn: list[tuple[Tensor, ...]] = []
    seconds = {"prefill": 0.0, "decode": 0.0}
    finished = 0
    with torch.inference_mode():
        while scheduler.has_work():
            start = time.perf_counter()
            plan = scheduler.schedule()
            step = _StepTensors(plan)
            cache.copy_pages(step.page_copies)
            hidden_TD = model(step.tokens, step.positions, cache.at(step))
            sample = ops.sample_token(
                model.logits(hidden_TD[step.sample_row]),
                seed=step.sample_seed,
                position=step.sample_position,
                temperature=temperature_N[step.sample_seq],
                **filters,
            )
            drawn.append((step.sample_seq, step.sample_position, sample.token, sample.full_logprob, sample.entropy))
            ended = _commit(scheduler, step, sample.token)
            took = time.perf_counter() - start
            decode_share = plan.num_decode_tokens / step.tokens.numel()
            seconds["prefill"] += took * (1.0 - decode_share)
            seconds["decode"] += took * decode_share
            finished += len(ended)
            if answered is not None:
                answered(ended, [scheduler.answer(sequence) for sequence in ended])
            if progress is not None:
                progress(finished, N)
    stats = _stats(scheduler, seconds)
    if ledger is not None:
        _book(ledger, phase, model, scheduler.totals, stats)
    return _collect(scheduler, asks, drawn, stats)


def _queue(model: Model, asks: Sequence[Ask], stop_ids: Sequence[int], config: RolloutConfig) -> _C.Scheduler:
    """A scheduler that holds every prompt, with pages for as many answers as may run."""
    first = 0
    for ask in asks:
        _check_ask(model, ask, first)
        first += len(ask.prompts)
    longest = max((len(p) + ask.max_new_tokens for ask in asks for p in ask.prompts), default=1)
    most = max((ask.group_size for ask in asks), default=1)
    max_running = max(min(config.max_running, sum(ask.num_sequences for ask in asks)), most)
    pages_each = -(-longest // config.page_size)
    scheduler = _C.Scheduler(
        config.num_pages or (max_running + 1) * pages_each,
        page_size=config.page_size,
        max_running=max_running,
        max_step_tokens=max(config.max_step_tokens, max_running),
    )
    number = 0
    for ask in asks:
        G, seeds = ask.group_size, ask.seeds.tolist()
        for p, prompt in enumerate(ask.prompts):
            try:
                scheduler.add_group(
                    prompt,
                    group_size=G,
                    max_new_tokens=ask.max_new_tokens,
                    seeds=seeds[p * G : (p + 1) * G],
                    stop_ids=stop_ids,
                )
            except ValueError as e:
                raise ValueError(f"generate: prompt {number}: {e}") from e
            number += 1
    return scheduler


def _check_ask(model: Model, ask: Ask, first: int) -> None:
    G, wanted = ask.group_size, ask.num_sequences
    if G < 1:
        raise ValueError(f"generate: group_size must be >= 1, got {G}")
    if ask.seeds.shape != (wanted,) or ask.seeds.dtype != torch.int64:
        raise ValueError(
            f"generate: seeds must be [P*G] = [{wanted}] int64, got {list(ask.seeds.shape)} {ask.seeds.dtype}"
        )
    V, limit = model.config.vocab_size, model.config.max_position_embeddings
    for p, prompt in enumerate(ask.prompts, start=first):
        if len(prompt) == 0:
            raise ValueError(f"generate: prompt {p} is empty")
        if min(prompt) < 0 or max(prompt) >= V:
            bad = next(t for t in prompt if not 0 <= t < V)
            raise ValueError(f"generate: prompt {p} holds token {bad}, outside the vocabulary [0, {V})")
        if len(prompt) + ask.max_new_tokens > limit:
            raise ValueError(
                f"generate: prompt {p} has {len(prompt)} tokens; with max_new_tokens={ask.max_new_tokens} that is "
                f"more than the model's {limit} positions"
            )


def _commit(scheduler: _C.Scheduler, step: _StepTensors, token: Tensor) -> list[int]:
    """Hands the drawn tokens back; the sequences that they finish."""
    try:
        return scheduler.commit(token.numpy())
    except ValueError as e:
        s = int((token < 0).nonzero()[0])
        raise RuntimeError(
            f"generate: the logits of sequence {int(step.sample_seq[s])} at position {int(step.sample_position[s])} "
            "hold NaN or infinity; the weights have diverged"
        ) from e


def _stats(scheduler: _C.Scheduler, seconds: dict[str, float]) -> RolloutStats:
    totals = scheduler.totals
    return RolloutStats(
        prefill_tokens=totals.prefill_tokens,
        recomputed_tokens=totals.recomputed_tokens,
        decode_tokens=totals.decode_tokens,
        preemptions=totals.preemptions,
        prefill_seconds=seconds["prefill"],
        decode_seconds=seconds["decode"],
    )


def _book(ledger: Ledger, phase: str | None, model: Model, totals: _C.SchedulerTotals, stats: RolloutStats) -> None:
    prefill_tokens = stats.prefill_tokens + stats.recomputed_tokens
    for name, tokens, pairs, head_rows, seconds in (
        ("prefill", prefill_tokens, totals.prefill_pairs, totals.prefill_samples, stats.prefill_seconds),
        ("decode", stats.decode_tokens, totals.decode_pairs, totals.decode_samples, stats.decode_seconds),
    ):
        if tokens:
            flops = forward_flops(model, tokens=tokens, pairs=pairs, head_rows=head_rows)
            ledger.add(phase or name, tokens=tokens, flops=flops, seconds=seconds)


def _collect(
    scheduler: _C.Scheduler, asks: Sequence[Ask], drawn: list[tuple[Tensor, ...]], stats: RolloutStats
) -> list[RolloutBatch]:
    prompts = [prompt for ask in asks for prompt in ask.prompts]
    answers_P = torch.tensor([ask.group_size for ask in asks for _ in ask.prompts], dtype=torch.int64)
    prompt_len_P = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
    prompt_len_N = prompt_len_P.repeat_interleave(answers_P)
    N = prompt_len_N.numel()
    if drawn:
        seq, position, token, logprob, entropy = (torch.cat(columns) for columns in zip(*drawn, strict=True))
    else:
        seq = position = token = torch.empty(0, dtype=torch.int64)
        logprob = entropy = torch.empty(0)
    cu_seqlens = torch.zeros(N + 1, dtype=torch.int64)
    cu_seqlens[1:] = (prompt_len_N + torch.bincount(seq, minlength=N)).cumsum(0)
    starts, T = cu_seqlens[:-1], int(cu_seqlens[-1])
    tokens = torch.empty(T, dtype=torch.int64)
    all_logprob, all_entropy = torch.zeros(T), torch.zeros(T)
    # the prompts, each written once for every answer to it
    flat = torch.tensor(list(itertools.chain.from_iterable(prompts)), dtype=torch.int64)
    flat_start_N = (prompt_len_P.cumsum(0) - prompt_len_P).repeat_interleave(answers_P)
    within = packed_positions(torch.nn.functional.pad(prompt_len_N.cumsum(0), (1, 0)))
    tokens[starts.repeat_interleave(prompt_len_N) + within] = flat[flat_start_N.repeat_interleave(prompt_len_N) + within]
    place = starts[seq] + position
    tokens[place] = token
    all_logprob[place] = logprob
    all_entropy[place] = entropy
    batches, first = [], 0
    for ask in asks:
        last = first + ask.num_sequences
        a, b = int(cu_seqlens[first]), int(cu_seqlens[last])
        batches.append(
            RolloutBatch(
                tokens=tokens[a:b],
                cu_seqlens=(cu_seqlens[first : last + 1] - a).int(),
                prompt_len=prompt_len_N[first:last].int(),
                logprob=all_logprob[a:b],
                entropy=all_entropy[a:b],
                finish=tuple(scheduler.finish(n) for n in range(first, last)),
                group_size=ask.group_size,
                stats=stats,
            )
        )
        first = last
    return batches
