"""Prompts in, responses out: drives the native scheduler, the paged KV cache and the model.

The C++ scheduler (csrc/rollout) decides what each step computes, `model_runner` runs the model on it, and this module
hands the sampled tokens back. A response depends on its prompt, its seed and the weights alone: not on the batch, the
number of pages, preemption, or whether the host plans ahead.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grpo_engine import _C
from grpo_engine.config import RolloutConfig
from grpo_engine.model.decoder import Model, packed_positions
from grpo_engine.model.flops import forward_flops
from grpo_engine.records.ledger import Ledger
from grpo_engine.rollout.model_runner import Filters, ModelRunner, StartedStep
from grpo_engine.types import RolloutBatch, RolloutStats

Progress = Callable[[int, int], None]  # (responses finished, responses requested)


def derive_seeds(*parts: int, count: int) -> Tensor:
    """Seeds of `count` requests, from what names them.

    Args:
        parts: integers that identify the sample, for instance (run seed, stream, step); any order matters.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRequest:
    """Prompts that are sampled alike. A rollout may hold several requests, whose sequences share its batches."""

    prompts: Sequence[Sequence[int]]  # P, each a non-empty list of token ids in [0, V)
    group_size: int  # G >= 1 responses to each
    seeds: Tensor  # [P*G] int64, one for each response, row p*G + g (see `derive_seeds`)
    temperature: float  # 0 is greedy
    max_new_tokens: int

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.group_size


class Engine:
    """Samples responses to prompts, and keeps what outlives a rollout: KV pages, buffers and, on CUDA, graphs.

    A run that owns one pays for them once. Weights may change between rollouts where they lie, as an optimizer does it.
    Pages and graphs are made anew when a rollout needs more pages or more running sequences than any before it, when a
    weight got other memory (another device or dtype, a checkpoint put in its place), and after `release`. Graphs of
    other filters than before are further graphs.

    Args:
        model: the policy, on any device.
        lookahead: start a step before the tokens of the one before are known on the host, so that the device never waits
            for it; responses that stop meanwhile cost a row that is dropped. None: on CUDA.
        graphs: run steps of one token a sequence from static buffers, padded to a few sizes, and on CUDA as graphs. None:
            on CUDA. On the CPU it only pads, for tests.
        keep: False gives everything back after each rollout, where training needs the room.
    """

    def __init__(
        self, model: Model, *, lookahead: bool | None = None, graphs: bool | None = None, keep: bool = True
    ) -> None:
        on_cuda = model.device.type == "cuda"
        self.model = model
        self.keep = keep
        self.lookahead = on_cuda if lookahead is None else lookahead
        self.runner = ModelRunner(model, lookahead=self.lookahead, graphs=on_cuda if graphs is None else graphs)

    def release(self) -> None:
        """Gives back all memory; the next rollout takes it anew."""
        self.runner.release()

    def generate(
        self,
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
        """Samples `group_size` responses to each prompt.

        Args:
            prompts: P prompts, each a non-empty list of token ids in [0, V).
            group_size: G >= 1.
            seeds: [P*G] int64, one for each response, row p*G + g (see `derive_seeds`).
            stop_ids: a response ends with any of these ("stop"); the stop token belongs to the response.
            config: lengths, filters, pages and batch limits.
            temperature: overrides config.temperature; 0 is greedy.
            ledger: books the cost, under "prefill" and "decode" or, when given, under `phase`.
            phase: see ledger.
            progress: called after each step.

        Returns:
            A `RolloutBatch`, on the CPU. Its log-probs and entropies are those of softmax(logits / temperature) - of
            temperature 1 when greedy - whether or not a filter was on: what training recomputes.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, the wrong number of seeds, a prompt that with
                its response exceeds the model's positions or the page pool; the prompt is named.
            RuntimeError: the model's logits hold NaN or infinity; the sequence and position are named.
        """
        request = SamplingRequest(
            prompts=prompts,
            group_size=group_size,
            seeds=seeds,
            temperature=config.temperature if temperature is None else temperature,
            max_new_tokens=config.max_new_tokens,
        )
        (batch,) = self.stream(
            [request], stop_ids=stop_ids, config=config, ledger=ledger, phase=phase, progress=progress
        ).run()
        return batch

    def stream(
        self,
        requests: Sequence[SamplingRequest],
        *,
        stop_ids: Sequence[int],
        config: RolloutConfig,
        ledger: Ledger | None = None,
        phase: str | None = None,
        progress: Progress | None = None,
    ) -> Rollout:
        """A rollout of several requests, for the caller to iterate over: the batch stays full until the last runs out.

        A response has the tokens that `generate` gives for its request alone. Sequences are numbered through all requests.

        Args:
            requests: what to sample.
            stop_ids, ledger, phase, progress: see `generate`.
            config: filters, pages and batch limits; its temperature and max_new_tokens are the requests' own.

        Returns:
            A `Rollout`. Nothing is computed before it is iterated over.

        Raises:
            ValueError: see `generate`; prompts are numbered through all requests.
        """
        scheduler = _queue(self.model, requests, stop_ids, config, lookahead=self.lookahead)
        return Rollout(self, scheduler, requests, config, ledger, phase, progress)

    def _run(
        self,
        scheduler: _C.Scheduler,
        requests: Sequence[SamplingRequest],
        config: RolloutConfig,
        ledger: Ledger | None,
        phase: str | None,
        progress: Progress | None,
    ) -> Generator[Finished, None, list[RolloutBatch]]:
        """Yields what each step finished, and returns the batches."""
        N = sum(request.num_sequences for request in requests)
        sampled: list[tuple[Tensor, ...]] = []
        wanted: list[Tensor] = []  # with lookahead: which of those; the others are of responses that had stopped
        seconds = {"prefill": 0.0, "decode": 0.0}
        ended_N, finished = np.zeros(N, dtype=bool), 0
        with self.runner.running():
            self._prepare(scheduler, requests, config)
            start = time.perf_counter()
            for plan, samples in self._steps(scheduler):
                sequence, position = torch.from_numpy(plan.sample_seq), torch.from_numpy(plan.sample_position)
                ended = _commit(scheduler, sequence, position, samples[0])
                sampled.append((sequence, position, *samples))
                if self.lookahead:
                    wanted.append(torch.from_numpy(~ended_N[plan.sample_seq]))
                    ended_N[ended] = True
                took = time.perf_counter() - start
                decode_share = plan.num_decode_tokens / len(plan.tokens)
                seconds["prefill"] += took * (1.0 - decode_share)
                seconds["decode"] += took * decode_share
                finished += len(ended)
                if progress is not None:
                    progress(finished, N)
                if ended:
                    yield Finished(ended, [scheduler.response(sequence) for sequence in ended])
                start = time.perf_counter()  # what the caller does with responses is not the rollout's time
        stats = _stats(scheduler, seconds)
        if ledger is not None:
            _book(ledger, phase, self.model, scheduler.totals, stats)
        columns = tuple(torch.cat(column) for column in zip(*sampled, strict=True))
        if wanted:
            wanted_rows = torch.cat(wanted)
            columns = tuple(column[wanted_rows] for column in columns)
        if not self.keep:
            self.release()
        return _collect(scheduler, requests, columns, stats)

    def _prepare(self, scheduler: _C.Scheduler, requests: Sequence[SamplingRequest], config: RolloutConfig) -> None:
        temperatures = np.array([request.temperature for request in requests], dtype=np.float32)
        self.runner.prepare(
            num_pages=scheduler.num_pages,
            page_size=config.page_size,
            max_running=scheduler.max_running,
            temperature_N=temperatures.repeat(np.array([r.num_sequences for r in requests], dtype=np.int64)),
            filters=Filters(
                top_k=config.top_k,
                top_p=config.top_p if config.top_p < 1.0 else None,
                min_p=config.min_p if config.min_p > 0.0 else None,
            ),
        )

    def _steps(self, scheduler: _C.Scheduler) -> Iterator[tuple[_C.StepPlan, tuple[Tensor, Tensor, Tensor]]]:
        """Each step's plan and samples, for the caller to commit; with lookahead, once the next step is started."""
        under_way: deque[tuple[_C.StepPlan, StartedStep]] = deque()
        while scheduler.has_work() or under_way:
            with torch.inference_mode():  # left before the caller goes on
                while scheduler.has_work() and len(under_way) <= self.lookahead:
                    plan = scheduler.schedule()
                    under_way.append((plan, self.runner.start(plan)))
                plan, step = under_way.popleft()
                samples = step.finish()
            yield plan, samples


class Finished(NamedTuple):
    """The responses that one step of a rollout finished."""

    sequences: list[int]  # which, numbered through all requests
    responses: list[list[int]]  # their tokens, the stop token included


class Rollout:
    """A rollout to iterate over: it runs as it is read, and yields the responses of each step as they finish.

    Example:
        rollout = engine.stream([request], stop_ids=stop_ids, config=config)
        for sequences, responses in rollout:
            ...  # score them while the others are sampled
        (batch,) = rollout.batches
    """

    def __init__(self, engine: Engine, *arguments: Any) -> None:
        self._steps = engine._run(*arguments)
        self._batches: list[RolloutBatch] | None = None

    def __iter__(self) -> Iterator[Finished]:
        if self._batches is None:
            # where the caller leaves its loop, this closes the steps too: no step runs on, and the device is let go
            self._batches = yield from self._steps

    @property
    def batches(self) -> list[RolloutBatch]:
        """A `RolloutBatch` for each request; their `stats` are those of the whole rollout.

        Raises:
            RuntimeError: the rollout was not read to its end.
        """
        if self._batches is None:
            raise RuntimeError("Rollout.batches: wanted after the rollout was iterated over to its end")
        return self._batches

    def run(self) -> list[RolloutBatch]:
        """Runs it to its end; see `batches`."""
        for _ in self:
            pass
        return self.batches


def generate(model: Model, prompts: Sequence[Sequence[int]], **options: Any) -> RolloutBatch:
    """`Engine.generate`, once: nothing is kept for the next rollout."""
    return Engine(model).generate(prompts, **options)


def _queue(
    model: Model, requests: Sequence[SamplingRequest], stop_ids: Sequence[int], config: RolloutConfig, *, lookahead: bool
) -> _C.Scheduler:
    """A scheduler that holds every prompt, with pages for as many sequences as may run."""
    first = 0
    for request in requests:
        _check_request(model, request, first)
        first += len(request.prompts)
    longest = max((len(p) + request.max_new_tokens for request in requests for p in request.prompts), default=1)
    most = max((request.group_size for request in requests), default=1)
    max_running = max(min(config.max_running, sum(request.num_sequences for request in requests)), most)
    pages_each = -(-longest // config.page_size)
    scheduler = _C.Scheduler(
        config.num_pages or (max_running + 1) * pages_each,
        page_size=config.page_size,
        max_running=max_running,
        max_step_tokens=max(config.max_step_tokens, max_running),
        lookahead=lookahead,
    )
    number = 0
    for request in requests:
        G, seeds = request.group_size, request.seeds.tolist()
        for p, prompt in enumerate(request.prompts):
            try:
                scheduler.add_group(
                    prompt,
                    group_size=G,
                    max_new_tokens=request.max_new_tokens,
                    seeds=seeds[p * G : (p + 1) * G],
                    stop_ids=stop_ids,
                )
            except ValueError as e:
                raise ValueError(f"generate: prompt {number}: {e}") from e
            number += 1
    return scheduler


def _check_request(model: Model, request: SamplingRequest, first: int) -> None:
    G, wanted = request.group_size, request.num_sequences
    if G < 1:
        raise ValueError(f"generate: group_size must be >= 1, got {G}")
    if request.seeds.shape != (wanted,) or request.seeds.dtype != torch.int64:
        raise ValueError(
            f"generate: seeds must be [P*G] = [{wanted}] int64, got {list(request.seeds.shape)} {request.seeds.dtype}"
        )
    V, limit = model.config.vocab_size, model.config.max_position_embeddings
    for p, prompt in enumerate(request.prompts, start=first):
        if len(prompt) == 0:
            raise ValueError(f"generate: prompt {p} is empty")
        if min(prompt) < 0 or max(prompt) >= V:
            bad = next(t for t in prompt if not 0 <= t < V)
            raise ValueError(f"generate: prompt {p} holds token {bad}, outside the vocabulary [0, {V})")
        if len(prompt) + request.max_new_tokens > limit:
            raise ValueError(
                f"generate: prompt {p} has {len(prompt)} tokens; with max_new_tokens={request.max_new_tokens} that is "
                f"more than the model's {limit} positions"
            )


def _commit(scheduler: _C.Scheduler, sequence: Tensor, position: Tensor, token: Tensor) -> list[int]:
    """Hands the sampled tokens back; the sequences that they finish."""
    try:
        return scheduler.commit(token.numpy())
    except ValueError as e:
        s = next(s for s in (token < 0).nonzero()[:, 0].tolist() if scheduler.finish(int(sequence[s])) is None)
        raise RuntimeError(
            f"generate: the logits of sequence {int(sequence[s])} at position {int(position[s])} hold NaN or infinity; "
            "the weights have diverged"
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
    scheduler: _C.Scheduler, requests: Sequence[SamplingRequest], sampled: tuple[Tensor, ...], stats: RolloutStats
) -> list[RolloutBatch]:
    """`sampled`: (sequence, position, token, log-prob, entropy) of all response tokens; () when there are none."""
    prompts = [prompt for request in requests for prompt in request.prompts]
    responses_P = _int64(request.group_size for request in requests for _ in request.prompts)
    prompt_len_P = _int64(map(len, prompts))
    prompt_len_N = prompt_len_P.repeat_interleave(responses_P)
    N = prompt_len_N.numel()
    seq, position, token, logprob, entropy = sampled or (*[_int64(())] * 3, *[torch.empty(0, device="cpu")] * 2)
    cu_seqlens = _int64([0]).repeat(N + 1)
    cu_seqlens[1:] = (prompt_len_N + torch.bincount(seq, minlength=N)).cumsum(0)
    starts, T = cu_seqlens[:-1], int(cu_seqlens[-1])
    tokens = torch.empty(T, dtype=torch.int64, device="cpu")
    all_logprob, all_entropy = torch.zeros(2, T, device="cpu")
    # the prompts, each written once for every response to it
    flat = _int64(itertools.chain.from_iterable(prompts))
    flat_start_N = (prompt_len_P.cumsum(0) - prompt_len_P).repeat_interleave(responses_P)
    within = packed_positions(torch.nn.functional.pad(prompt_len_N.cumsum(0), (1, 0)))
    tokens[starts.repeat_interleave(prompt_len_N) + within] = flat[flat_start_N.repeat_interleave(prompt_len_N) + within]
    index = starts[seq] + position
    tokens[index] = token
    all_logprob[index] = logprob
    all_entropy[index] = entropy
    batches, first = [], 0
    for request in requests:
        last = first + request.num_sequences
        a, b = int(cu_seqlens[first]), int(cu_seqlens[last])
        batches.append(
            RolloutBatch(
                tokens=tokens[a:b],
                cu_seqlens=(cu_seqlens[first : last + 1] - a).int(),
                prompt_len=prompt_len_N[first:last].int(),
                logprob=all_logprob[a:b],
                entropy=all_entropy[a:b],
                finish=tuple(scheduler.finish(n) for n in range(first, last)),
                group_size=request.group_size,
                temperature=request.temperature,
                stats=stats,
            )
        )
        first = last
    return batches


def _int64(values: Iterable[int]) -> Tensor:
    """On the CPU, whatever the default device is."""
    return torch.tensor(list(values), dtype=torch.int64, device="cpu")
