"""Runs the steps of a rollout on the model's device: KV pages, buffers and CUDA graphs.

On the CPU the arrays of a scheduler's plan are the model's inputs, without a copy. On CUDA:

- A plan goes up in one copy from pinned memory, what a step samples comes home in one, with an event behind it. That event
  is all that the host ever waits for.
- With lookahead the host starts a step before it has the tokens of the one before: those are taken on the device.
- With graphs, a step of one token a sequence runs from buffers that stay where they are, padded to one of a few sizes, so
  that it can be recorded once and played back. Other steps run as they come.

Steps run one after another, in the order in which they were started (one stream).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from grpo_engine import _C, ops
from grpo_engine.model.decoder import Layer, Model

# The arrays of a step's inputs, in the order in which they lie in one buffer: what is aligned to 8 bytes comes first.
DTYPES = {
    "tokens": torch.int64,
    "positions": torch.int64,
    "slots": torch.int64,
    "sample_row": torch.int64,
    "sample_seed": torch.int64,
    "sample_position": torch.int64,
    "temperature": torch.float32,
    "cu_query": torch.int32,
    "kv_len": torch.int32,
    "page_table": torch.int32,
    "page_copies": torch.int32,
}
# What a padding row has where it is not 0: it writes no key (slot -1), reads the key in slot 0 of page 0, which is there
# though it may hold anything, and samples a token that nobody takes. Rows do not depend on each other.
PADDING = {"slots": -1, "kv_len": 1, "temperature": 1.0}
SMALLEST_TABLE = 256  # tokens that a padded page table holds at least


def padded_rows(rows: int) -> int:
    """The size to which a step of some rows is padded: four sizes for each doubling, every size up to 8.

    1 ... 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ... 512: less than a fifth of the rows is padding.
    """
    unit = max(1, (1 << (rows - 1).bit_length()) // 8)
    return -(-rows // unit) * unit


def padded_pages(pages: int, page_size: int) -> int:
    """The width to which a page table is padded: SMALLEST_TABLE tokens, or that doubled until it is enough."""
    width = max(1, SMALLEST_TABLE // page_size)
    while width < pages:
        width *= 2
    return width


class StepInputs(NamedTuple):
    """A plan as tensors on the model's device; shapes as in `_C.StepPlan`."""

    tokens: Tensor  # [T] int64; -1 - s: what sample s of the step before drew
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    sample_row: Tensor  # [S] int64
    sample_seed: Tensor  # [S] int64
    sample_position: Tensor  # [S] int64
    temperature: Tensor  # [S] float32
    cu_query: Tensor  # [N+1] int32
    kv_len: Tensor  # [N] int32
    page_table: Tensor  # [N, max_pages] int32
    page_copies: Tensor  # [C, 2] int32


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

    def serves(self, model: Model, num_pages: int, page_size: int) -> bool:
        """Whether it has so many such pages where the model is, in the model's dtype."""
        key = self.key
        return (key.shape[1] >= num_pages and key.shape[-1] == page_size
                and key.dtype == model.dtype and key.device == model.device)  # fmt: skip

    def copy_pages(self, pairs: Tensor) -> None:
        """Copies pages; pairs [C, 2] int32 of (source, destination)."""
        if pairs.numel():
            source, destination = pairs.long().unbind(1)
            for pages in (self.key, self.value):
                pages.index_copy_(1, destination, pages.index_select(1, source))


class PagedSequences:
    """The new tokens of a step, whose keys and values go to pages and meet those that are there."""

    def __init__(self, cache: KVCache, inputs: StepInputs) -> None:
        self.cache, self.inputs = cache, inputs

    def layer(self, index: int, layer: Layer, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        """See `model.Sequences`."""
        s, key_pages, value_pages = self.inputs, self.cache.key[index], self.cache.value[index]
        if not layer.fused:

            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                ops.kv_write(key, value, key_pages, value_pages, s.slots)
                return ops.paged_attention(
                    query, key_pages, value_pages, s.page_table, s.cu_query, s.kv_len, scale=layer.scale
                )

            return layer.by_single_ops(x_TD, positions_T, attend)
        return ops.decoder_layer_paged(
            x_TD, layer.weights, positions_T, key_pages, value_pages, s.slots,
            s.page_table, s.cu_query, s.kv_len, theta=layer.theta, eps=layer.eps,
            batch_invariant=layer.batch_invariant,
        )  # fmt: skip


class Samples:
    """What a step samples, in one buffer: token [R] int64, and of each its full log-prob and entropy [R] float32."""

    def __init__(self, rows: int, device: torch.device | str, *, pinned: bool = False) -> None:
        self.bytes = torch.empty(16 * rows, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.token = self.bytes[: 8 * rows].view(torch.int64)
        self.logprob = self.bytes[8 * rows : 12 * rows].view(torch.float32)
        self.entropy = self.bytes[12 * rows :].view(torch.float32)


class Filters(NamedTuple):
    """See `ops.sample_token`; None: off."""

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


class _HostBuffers:
    """Host memory of one step under way, pinned for CUDA. Free again once the step is finished: its last copy is over."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.pinned = device.type == "cuda"
        self.inputs = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.samples = Samples(rows, "cpu", pinned=self.pinned)
        self.event = torch.cuda.Event() if self.pinned else None

    def room(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 for a step's inputs."""
        if self.inputs.numel() < nbytes:
            self.inputs = torch.empty(2 * nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
        return self.inputs[:nbytes]


class StartedStep:
    """A step that runs, or ran: its samples on their way home."""

    def __init__(self, samples: tuple[Tensor, Tensor, Tensor], host: _HostBuffers | None = None) -> None:
        self._samples, self._host = samples, host

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Waits for the step; (token [S] int64, full log-prob [S], entropy [S] float32) on the CPU, the caller's to keep."""
        if self._host is None:
            return self._samples
        if self._host.event is not None:
            self._host.event.synchronize()
        return tuple(x.clone() for x in self._samples)


class _StaticStep:
    """Inputs of a padded step that stay where they are, and the graph that was recorded over them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        self.bytes = torch.empty(_nbytes(shapes), dtype=torch.uint8, device=device)
        self.inputs = _cut(self.bytes, shapes)
        self.graph: torch.cuda.CUDAGraph | None = None


class ModelRunner:
    """Runs steps, and keeps what outlives a rollout.

    Args:
        model: the policy.
        lookahead: a plan may hold tokens that the step before samples.
        graphs: steps of one token a sequence run padded, from static buffers; on CUDA from the second of a size on as a
            graph. On the CPU nothing is recorded: for tests of padding.
    """

    def __init__(self, model: Model, *, lookahead: bool, graphs: bool) -> None:
        self.model, self.lookahead, self.graphs = model, lookahead, graphs
        self.release()

    def release(self) -> None:
        """Gives back pages, buffers and graphs."""
        self.cache: KVCache | None = None
        self._samples: Samples | None = None
        self._host: list[_HostBuffers] = []
        self._turn = 0
        self._weights: tuple[int, ...] = ()
        self._forget_graphs()

    @property
    def _pages(self) -> KVCache:
        assert self.cache is not None  # `prepare` comes before a step
        return self.cache

    @property
    def _sampled(self) -> Samples:
        assert self._samples is not None
        return self._samples

    def _forget_graphs(self) -> None:
        self._static: dict[tuple, _StaticStep] = {}
        self._pool = None  # of memory, shared by the graphs

    def prepare(self, *, num_pages: int, page_size: int, max_running: int, temperature_N: np.ndarray,
                filters: Filters) -> None:  # fmt: skip
        """Makes room for a rollout. What is there and large enough stays, with the graphs over it.

        Args:
            num_pages: KV pages, at least.
            page_size: tokens of each.
            max_running: samples of a step, at most.
            temperature_N: [N] float32 by sequence; 0 is greedy.
            filters: of all sequences.
        """
        self._temperature_N, self._filters, device = temperature_N, filters, self.model.device
        self._direct = device.type == "cpu" and not self.lookahead and not self.graphs
        weights = tuple(p.data_ptr() for p in self.model.parameters())
        if weights != self._weights:
            self._forget_graphs()
            self._weights = weights
        if self.cache is None or not self.cache.serves(self.model, num_pages, page_size):
            self.cache = None  # before the next is taken
            self._forget_graphs()
            self.cache = KVCache(self.model, num_pages, page_size)
        rows = padded_rows(max_running)
        fits = self._samples is not None and self._samples.token.numel() >= rows and self._samples.bytes.device == device
        if not self._direct and not fits:
            self._forget_graphs()
            self._samples = Samples(rows, device)
            # one for the step that runs, one for the next
            self._host = [_HostBuffers(rows, device) for _ in range(2)]

    @property
    def padded_sizes(self) -> list[tuple[int, int]]:
        """(rows, pages of a row) of the static buffers that there are, each with a graph on CUDA."""
        return sorted((rows, width) for rows, width, _ in self._static)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """For the time of a rollout: the model's device is the current one; after an error no step runs on."""
        device = self.model.device
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            try:
                yield
            except BaseException:
                torch.cuda.synchronize()  # the next rollout writes to the same buffers
                raise

    def start(self, plan: _C.StepPlan) -> StartedStep:
        """Starts a step behind those that were started before. At most two may be unfinished."""
        arrays = {name: getattr(plan, name) for name in DTYPES if name != "temperature"}
        arrays["temperature"] = self._temperature_N[plan.sample_seq]
        if self._direct:
            inputs = StepInputs(**{name: torch.from_numpy(array) for name, array in arrays.items()})
            self._pages.copy_pages(inputs.page_copies)
            sample = self._sample(inputs, plan.decode_only)
            return StartedStep((sample.token, sample.full_logprob, sample.entropy))
        host = self._host[self._turn]
        self._turn = 1 - self._turn
        if self.graphs and plan.decode_only:
            self._run_padded(arrays, host)
        else:
            shapes = {name: array.shape for name, array in arrays.items()}
            staged = host.room(_nbytes(shapes))
            _fill(staged.numpy(), shapes, arrays)
            inputs = _cut(staged.to(self.model.device, non_blocking=True), shapes)
            self._pages.copy_pages(inputs.page_copies)
            self._sample_into_buffer(inputs, plan.decode_only)
        host.samples.bytes.copy_(self._sampled.bytes, non_blocking=True)
        if host.event is not None:
            host.event.record()
        S, home = len(plan.sample_seq), host.samples
        return StartedStep((home.token[:S], home.logprob[:S], home.entropy[:S]), host)

    def _run_padded(self, arrays: dict[str, np.ndarray], host: _HostBuffers) -> None:
        rows, copies = padded_rows(len(arrays["tokens"])), len(arrays["page_copies"])
        width = padded_pages(arrays["page_table"].shape[1], self._pages.key.shape[-1])
        arrays["cu_query"] = np.arange(rows + 1, dtype=np.int32)
        wide = {"cu_query": (rows + 1,), "page_table": (rows, width), "page_copies": (rows, 2)}
        shapes = {name: wide.get(name, (rows,)) for name in DTYPES}
        key = (rows, width, self._filters)
        step = self._static.get(key)
        if step is None:
            step = self._static[key] = _StaticStep(shapes, self.model.device)
        staged = host.room(step.bytes.numel())
        _fill(staged.numpy(), shapes, arrays)
        step.bytes.copy_(staged, non_blocking=True)
        self._pages.copy_pages(step.inputs.page_copies[:copies])
        if step.graph is not None:
            step.graph.replay()
            return
        self._sample_into_buffer(step.inputs, decode_only=True)  # also loads the kernels, which recording must not do
        step.graph = self._record(step.inputs)

    def _record(self, inputs: StepInputs) -> torch.cuda.CUDAGraph | None:
        """The step as a graph, which was not run; None where there are no graphs."""
        if self.model.device.type != "cuda":
            return None
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # other threads may go on using CUDA
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._sample_into_buffer(inputs, decode_only=True)
        return graph

    def _sample_into_buffer(self, inputs: StepInputs, decode_only: bool) -> None:
        """A step from the samples of the one before to its own."""
        if self.lookahead:
            # where the step before could not sample, its commit will say so; until then any token will do
            before = self._sampled.token[(-1 - inputs.tokens).clamp_(min=0)].clamp_(min=0)
            inputs = inputs._replace(tokens=torch.where(inputs.tokens < 0, before, inputs.tokens))
        sample = self._sample(inputs, decode_only)
        S, to = sample.token.numel(), self._sampled
        to.token[:S].copy_(sample.token)
        to.logprob[:S].copy_(sample.full_logprob)
        to.entropy[:S].copy_(sample.entropy)

    def _sample(self, inputs: StepInputs, decode_only: bool) -> ops.SampledToken:
        hidden_TD = self.model(inputs.tokens, inputs.positions, PagedSequences(self._pages, inputs))
        return ops.sample_token(
            self.model.logits(hidden_TD if decode_only else hidden_TD[inputs.sample_row]),
            seed=inputs.sample_seed,
            position=inputs.sample_position,
            temperature=inputs.temperature,
            **self._filters._asdict(),
        )


# ---------------------------------------------------------------- a step's inputs in one buffer


def _places(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, last byte + 1) of each array of a step's inputs."""
    begin = 0
    for name, dtype in DTYPES.items():
        end = begin + dtype.itemsize * math.prod(shapes[name])
        yield name, begin, end
        begin = end


def _nbytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return max(end for _, _, end in _places(shapes))


def _cut(buffer: Tensor, shapes: dict[str, tuple[int, ...]]) -> StepInputs:
    """The tensors that lie in a buffer [_nbytes(shapes)] uint8."""
    return StepInputs(**{name: buffer[a:b].view(DTYPES[name]).view(shapes[name]) for name, a, b in _places(shapes)})


def _fill(buffer: np.ndarray, shapes: dict[str, tuple[int, ...]], arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays there, padded to their shapes there: new rows by PADDING, new columns of a page table by -1."""
    for name, a, b in _places(shapes):
        array = arrays[name]
        to = buffer[a:b].view(array.dtype).reshape(shapes[name])
        rows = len(array)
        if name == "page_table":
            to[:rows, array.shape[1] :] = -1
            to[:rows, : array.shape[1]] = array
        else:
            to[:rows] = array
        to[rows:] = PADDING.get(name, 0)
