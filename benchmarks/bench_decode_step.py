"""One decode step - a token for each sequence, sampling included - beside transformers with a dense cache."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import MappingProxyType

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import LADDER, ladder_config, qwen_config, random_model  # noqa: E402
from benchmarks.table import OURS, Case, WrongAnswer, main, same_bits, tensors  # noqa: E402
from grpo_engine import ops  # noqa: E402
from grpo_engine.model.decoder import Model  # noqa: E402
from grpo_engine.model.flops import forward_flops  # noqa: E402

PAGE = 16
# of all log-probs, in nats; bfloat16 rounds through 24 layers and more
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}


class Decode:
    """B sequences with L tokens of context in KV pages of all layers; a step feeds the token at place L."""

    def __init__(self, model, B, L, how):
        c = model.config
        self.how = how
        layers, K, E = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
        dtype, each = model.dtype, -(-(L + 1) // PAGE)
        self.model, self.B, self.L = model, B, L
        self.key = (torch.randn(layers, B * each, K, E, PAGE) * 0.5).to(dtype)
        self.value = (torch.randn(layers, B * each, K, PAGE, E) * 0.5).to(dtype)
        self.table = torch.randperm(B * each).view(B, each).int()
        self.tokens = torch.randint(c.vocab_size, (B,))
        self.positions = torch.full((B,), L)
        self.slots = self.table[:, L // PAGE].long() * PAGE + L % PAGE
        self.cu_query = torch.arange(B + 1, dtype=torch.int32)
        self.kv_len = torch.full((B,), L + 1).int()
        self.seed = torch.arange(B)
        self.rows = slice(None)

    def layer(self, index, layer, x_TD, positions_T):
        """See `grpo_engine.model.decoder.Sequences`."""
        rows, n = self.rows, x_TD.shape[0]
        return ops.decoder_layer_paged(
            x_TD, layer.weights, positions_T, self.key[index], self.value[index], self.slots[rows], self.table[rows],
            self.cu_query[: n + 1], self.kv_len[rows], theta=layer.theta, eps=layer.eps, **self.how,
        )  # fmt: skip

    @torch.inference_mode()
    def logits(self):
        """[rows, V] float32."""
        rows = self.rows
        return self.model.logits(self.model(self.tokens[rows], self.positions[rows], self))

    @torch.inference_mode()
    def step(self):
        """Token, log-prob and entropy of each sequence."""
        drawn = ops.sample_token(self.logits(), seed=self.seed[self.rows], position=self.positions[self.rows])
        return [drawn.token, drawn.logprob, drawn.entropy]

    def one(self):
        """The step of the first sequence alone."""
        self.rows = slice(0, 1)
        try:
            return self.step()
        finally:
            self.rows = slice(None)

    def dense(self, pages):
        """[B, K, L, E] of one layer's pages: key pages [n, K, E, PAGE] turned first."""
        B, each = self.table.shape
        picked = pages[self.table.long()]  # [B, each, K, PAGE, E]
        return picked.transpose(1, 2).reshape(B, pages.shape[1], each * PAGE, -1)[:, :, : self.L].contiguous()


class Transformers:
    """The same step over transformers' DynamicCache, cut back after each."""

    def __init__(self, mine):
        from transformers import DynamicCache

        self.mine, self.model, self.cache = mine, peers.as_transformers(mine.model), DynamicCache()
        for index, (key, value) in enumerate(zip(mine.key, mine.value, strict=True)):
            self.cache.update(mine.dense(key.transpose(2, 3)), mine.dense(value), index)

    @torch.inference_mode()
    def logits(self):
        out = self.model(input_ids=self.mine.tokens[:, None], past_key_values=self.cache, use_cache=True)
        self.cache.crop(-1)
        return out.logits[:, -1].float()

    @torch.inference_mode()
    def step(self):
        return peers.multinomial_with_logprob(self.logits())


def graphed(run):
    """Replays of a call that was recorded in a CUDA graph; the tensors of its result are the same in each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay():
        graph.replay()
        return result

    return replay


def case(name, model, B, L, *, graph=False, peer=True, how=MappingProxyType({})):
    """`how`: settings of the layers; those that give up batch invariance are not held to it."""
    mine = Decode(model, B, L, how)
    theirs = peers.optional("transformers", lambda: Transformers(mine)) if peer else None
    eager = mine.step()

    def check(who, result):
        if who == OURS:
            if not how and not same_bits(result, eager):
                raise WrongAnswer("its bits are not those of the first step")
            return
        token = tensors(result)[0]
        error = float((torch.log_softmax(theirs.logits(), -1) - torch.log_softmax(mine.logits(), -1)).abs().max())
        if not error <= TOLERANCE[model.dtype] or int(token.max()) >= model.config.vocab_size:
            raise WrongAnswer(f"its log-probs differ from ours by {error:.3g}, allowed {TOLERANCE[model.dtype]}")

    c = model.config
    kv = 2.0 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (L + 1) * B * mine.key.element_size()
    weights = sum(p.nbytes for p in model.parameters()) - (0 if c.tie_word_embeddings else model.embed.weight.nbytes)
    return Case(
        name=f"{name}, batch {B}, {L} tokens of context" + graph * ", CUDA graph" + bool(how) * ", not batch-invariant",
        ours=graphed(mine.step) if graph else mine.step,
        peers={"transformers": getattr(theirs, "step", theirs)} if peer else {},
        tolerance=TOLERANCE[model.dtype],
        check=check,
        bits=mine.step,
        alone=(lambda whole: same_bits(mine.one(), [x[:1] for x in whole])) if B > 1 and not how else None,
        flops=forward_flops(model, tokens=B, pairs=B * (L + 1), head_rows=B),
        nbytes=weights + kv,
        products=model.dtype,
        derived={"tokens/s": lambda seconds: B / seconds},
    )


def qwen(size, B, L, *, graph, peer=False, how=MappingProxyType({})):
    model = random_model(qwen_config(size), torch.bfloat16, **how).requires_grad_(False)
    return case(f"{size} bfloat16", model, B, L, graph=graph, peer=peer, how=how)


def cases(quick):
    for size in ("0.2M",) if quick else LADDER:
        yield case(size, Model(ladder_config(size)).init_weights(1, std=None), 64, 32)


def cuda(quick):
    yield partial(qwen, "0.5B", 32, 512, graph=False, peer=True)
    for size, batches in (("0.5B", (1, 32, 256)), ("1.5B", (32,) if quick else (1, 32, 256))):
        for B in batches:
            yield partial(qwen, size, B, 512, graph=True)
            yield partial(qwen, size, B, 512, graph=True, how={"batch_invariant": False})


if __name__ == "__main__":
    note = "Random weights and context. Target on an H200: 0.5B at batch 32 in 0.6 ms."
    main("decode_step", cases, cuda=cuda, whole=True, unit="ms", note=note)
