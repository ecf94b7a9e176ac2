"""Prompts in, answers out: drives the native scheduler, the paged KV cache and the model.

The C++ scheduler (csrc/rollout) decides what each step computes; this module makes tensors of its plan, runs the
model on it and hands the drawn tokens back. An answer depends on its prompt, its seed and the weights alone: not on
the batch, the number of pages or preemption.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from grpo_engine import _C, ops
from grpo_engine.config import RolloutConfig
from grpo_engine.ledger import Ledger, forward_flops
from grpo_engine.model import Layer, Model
from grpo_engine.types import RolloutBatch, RolloutStats

Progress = Callable[[int, int], None]  # (answers finished, answers asked for)


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
        """Copies pages; pairs [C, 2] int64 of (source, destination)."""
        if pairs.numel():
            self.key[:, pairs[:, 1]] = self.key[:, pairs[:, 0]]
            self.value[:, pairs[:, 1]] = self.value[:, pairs[:, 0]]

    def at(self, step: _StepTensors) -> PagedSequences:
        """What `Model.forward` takes as sequences in this step."""
        return PagedSequences(self, step)


class _StepTensors:
    """A scheduler's plan as tensors (they share the plan's memory)."""

    def __init__(self, plan) -> None:
        for name in ("tokens", "positions", "slots", "cu_query", "kv_len", "sample_row", "sample_seq",
                     "sample_seed", "sample_position"):
            setattr(self, name, torch.from_numpy(getattr(plan, name)))
        self.page_table = torch.from_numpy(plan.page_table)
        self.page_copies = torch.from_numpy(plan.page_copies).long()


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

    Returns:
        A `RolloutBatch`. Its log-probs and entropies are those of softmax(logits / temperature) - of
        temperature 1 when greedy - whether or not a filter was on: what training recomputes.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, the wrong number of seeds, a prompt that with
            its answer exceeds the model's positions or the page pool; the prompt is named.
        RuntimeError: the model's logits hold NaN or infinity; the sequence and position are named.
    """
    P, G = len(prompts), group_size
    _check_request(model, prompts, G, seeds, config)
    temperature = config.temperature if temperature is None else temperature
    longest = max((len(p) for p in prompts), default=0) + config.max_new_tokens
    max_running = max(min(config.max_running, P * G), G, 1)
    pages_each = -(-longest // config.page_size)
    num_pages = config.num_pages or (max_running + 1) * pages_each
    scheduler = _C.Scheduler(
        num_pages,
        page_size=config.page_size,
        max_running=max_running,
        max_step_tokens=max(config.max_step_tokens, max_running),
    )
    for p, prompt in enumerate(prompts):
        try:
            scheduler.add_group(
                list(prompt),
                group_size=G,
                max_new_tokens=config.max_new_tokens,
                seeds=seeds[p * G : (p + 1) * G].tolist(),
                stop_ids=list(stop_ids),
            )
        except ValueError as e:
            raise ValueError(f"generate: prompt {p}: {e}") from e

    cache = KVCache(model, num_pages, config.page_size)
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
            S = step.sample_row.numel()
            if S:
                sample = ops.sample_token(
                    model.logits(hidden_TD[step.sample_row]),
                    seed=step.sample_seed,
                    position=step.sample_position,
                    temperature=temperature,
                    top_k=config.top_k,
                    top_p=config.top_p if config.top_p < 1.0 else None,
                    min_p=config.min_p if config.min_p > 0.0 else None,
                )
                _check_drawn(sample.token, step)
                drawn.append((step.sample_seq, step.sample_position, sample.token, sample.full_logprob, sample.entropy))
                finished += len(scheduler.commit(sample.token.numpy()))
            else:
                scheduler.commit(np.empty(0, dtype=np.int64))
            T = step.tokens.numel()
            prefill_share = (T - plan.num_decode_tokens) / T
            took = time.perf_counter() - start
            _book(ledger, phase, model, step, prefill_share, took)
            seconds["prefill"] += took * prefill_share
            seconds["decode"] += took * (1.0 - prefill_share)
            if progress is not None:
                progress(finished, P * G)
    return _collect(scheduler, prompts, G, drawn, seconds)


def _check_request(
    model: Model, prompts: Sequence[Sequence[int]], G: int, seeds: Tensor, config: RolloutConfig
) -> None:
    if G < 1:
        raise ValueError(f"generate: group_size must be >= 1, got {G}")
    if seeds.shape != (len(prompts) * G,) or seeds.dtype != torch.int64:
        raise ValueError(
            f"generate: seeds must be [P*G] = [{len(prompts) * G}] int64, got {list(seeds.shape)} {seeds.dtype}"
        )
    V, limit = model.config.vocab_size, model.config.max_position_embeddings
    for p, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"generate: prompt {p} is empty")
        if min(prompt) < 0 or max(prompt) >= V:
            bad = next(t for t in prompt if not 0 <= t < V)
            raise ValueError(f"generate: prompt {p} holds token {bad}, outside the vocabulary [0, {V})")
        if len(prompt) + config.max_new_tokens > limit:
            raise ValueError(
                f"generate: prompt {p} has {len(prompt)} tokens; with max_new_tokens={config.max_new_tokens} that is "
                f"more than the model's {limit} positions"
            )


def _check_drawn(token: Tensor, step: _StepTensors) -> None:
    if bool((token < 0).any()):
        s = int((token < 0).nonzero()[0])
        raise RuntimeError(
            f"generate: the logits of sequence {int(step.sample_seq[s])} at position {int(step.sample_position[s])} "
            "hold NaN or infinity; the weights have diverged"
        )


def _book(
    ledger: Ledger | None, phase: str | None, model: Model, step: _StepTensors, prefill_share: float, took: float
) -> None:
    if ledger is None:
        return
    T = step.tokens.numel()
    pairs = int((step.positions + 1).sum())
    flops = forward_flops(model, tokens=T, pairs=pairs, head_rows=step.sample_row.numel())
    prefill_tokens = round(T * prefill_share)
    for name, share, tokens in (
        ("prefill", prefill_share, prefill_tokens),
        ("decode", 1.0 - prefill_share, T - prefill_tokens),
    ):
        if tokens:
            ledger.add(phase or name, tokens=tokens, flops=flops * share, seconds=took * share)


def _collect(
    scheduler, prompts: Sequence[Sequence[int]], G: int, drawn: list[tuple[Tensor, ...]], seconds: dict[str, float]
) -> RolloutBatch:
    N = len(prompts) * G
    prompt_len = torch.tensor([len(p) for p in prompts], dtype=torch.int64).repeat_interleave(G)
    if drawn:
        seq, position, token, logprob, entropy = (torch.cat(columns) for columns in zip(*drawn, strict=True))
    else:
        seq = position = token = torch.empty(0, dtype=torch.int64)
        logprob = entropy = torch.empty(0)
    cu_seqlens = torch.zeros(N + 1, dtype=torch.int64)
    cu_seqlens[1:] = (prompt_len + torch.bincount(seq, minlength=N)).cumsum(0)
    T = int(cu_seqlens[-1])
    tokens = torch.empty(T, dtype=torch.int64)
    starts = cu_seqlens[:-1]
    for p, prompt in enumerate(prompts):
        ids = torch.tensor(prompt, dtype=torch.int64)
        for n in range(p * G, (p + 1) * G):
            tokens[starts[n] : starts[n] + len(prompt)] = ids
    place = starts[seq] + position
    tokens[place] = token
    all_logprob, all_entropy = torch.zeros(T), torch.zeros(T)
    all_logprob[place] = logprob
    all_entropy[place] = entropy
    totals = scheduler.totals
    return RolloutBatch(
        tokens=tokens,
        cu_seqlens=cu_seqlens.int(),
        prompt_len=prompt_len.int(),
        logprob=all_logprob,
        entropy=all_entropy,
        finish=tuple(scheduler.finish(n) for n in range(N)),
        group_size=G,
        stats=RolloutStats(
            prefill_tokens=totals.prefill_tokens,
            recomputed_tokens=totals.recomputed_tokens,
            decode_tokens=totals.decode_tokens,
            preemptions=totals.preemptions,
            prefill_seconds=seconds["prefill"],
            decode_seconds=seconds["decode"],
        ),
    )
