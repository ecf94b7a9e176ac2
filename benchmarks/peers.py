"""Every implementation that we are measured beside, once: plain torch, torch.compile, transformers, TRL, llama.cpp,
and on CUDA FlashInfer, Liger and flash-attn.

The plain-torch functions are the formulas that transformers and TRL evaluate; given float64 inputs they are the truth of
a check, and compiled they are a second peer.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.lengths import stopping_criteria
from benchmarks.limits import part
from benchmarks.table import Missing, Run, failure, tensors
from grpo_engine.model import weights
from grpo_engine.model.config import FAMILIES, family_of
from grpo_engine.model.decoder import Model

EAGER, COMPILED = "torch eager", "torch.compile"
LIBRARY = "ours, not batch-invariant"
NO_BFLOAT16 = "no bfloat16 products here"


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def optional(package: str, make: Callable[[], Run]) -> Run | Missing:
    """A peer that needs a package, or what the table says when it is absent or cannot be made."""
    if not installed(package):
        return Missing(why="not installed")
    try:
        return make()
    except Exception as e:
        return Missing(why=failure(e))


def plain(function: Callable, *args: Any, compiled: bool = True) -> Mapping[str, Run]:
    """A formula in plain torch, and the same compiled.

    Args:
        function: of tensors.
        *args: what it is called with.
        compiled: also as "torch.compile"; the first call, which compiles, is the one that is checked.

    Returns:
        Peers by name.
    """
    runs: dict[str, Run] = {EAGER: lambda: function(*args)}
    if compiled:
        fast = torch.compile(function, dynamic=False)
        runs[COMPILED] = lambda: fast(*args)
    return runs


def with_gradients(function: Callable, leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Results of a function and the gradients of its leaves: forward and backward.

    Args:
        function: of the leaves; returns a tensor or several.
        leaves: require gradients.
        upstream: gradient of each result.

    Returns:
        [*results, *gradients].
    """
    out = tensors(function(*leaves))
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


def plain_with_gradients(
    function: Callable, leaves: Sequence[Tensor], upstream: Sequence[Tensor], *, compiled: bool = True
) -> Mapping[str, Run]:
    """As `plain`, forward and backward."""
    runs: dict[str, Run] = {EAGER: lambda: with_gradients(function, leaves, upstream)}
    if compiled:
        fast = torch.compile(function, dynamic=False)
        runs[COMPILED] = lambda: with_gradients(fast, leaves, upstream)
    return runs


def doubled(leaves: Sequence[Tensor]) -> list[Tensor]:
    """The same values in float64, as leaves of their own."""
    return [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]


# ---------------------------------------------------------------- sampling and log-probs


def softmax_multinomial(logits: Tensor) -> Tensor:
    """Token ids only."""
    return torch.multinomial(torch.softmax(logits.float(), dim=-1), 1)[:, 0]


def exponential_race(logits: Tensor) -> Tensor:
    """Token ids only: the argmax of p over exponential noise."""
    p = torch.softmax(logits.float(), dim=-1)
    return (p / torch.empty_like(p).exponential_()).argmax(dim=-1)


def multinomial_with_logprob(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token, its log-prob and the entropy: what our op returns."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    p = log_p.exp()
    token = torch.multinomial(p, 1)
    return token[:, 0], log_p.gather(1, token)[:, 0], -(p * log_p).sum(dim=-1)


def warper_chain(top_k: int | None, top_p: float | None) -> Callable[[Tensor], Tensor]:
    """transformers' filters, those that are given, and its draw."""
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    warpers = [make(value) for make, value in ((TopKLogitsWarper, top_k), (TopPLogitsWarper, top_p)) if value is not None]

    def draw(logits: Tensor) -> Tensor:
        scores = logits
        for warp in warpers:
            scores = warp(None, scores)
        return softmax_multinomial(scores)

    return draw


def logprob_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=-1)


def head_logprob_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return logprob_entropy(F.linear(hidden, weight), target)


# ---------------------------------------------------------------- loss


def group_advantages(rewards: Tensor) -> Tensor:
    """TRL's, with its epsilon set to ours."""
    mean = rewards.mean(dim=1, keepdim=True)
    return (rewards - mean) / (rewards.std(dim=1, keepdim=True) + 1e-6)


def trl_terms(logprob: Tensor, old: Tensor, ref: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ratio, KL and loss of each token in TRL's GRPOTrainer (loss_type "dapo", delta 3, beta 0.001) on padded [N, R]."""
    coef_1 = torch.exp(logprob - old)
    kl = torch.exp(ref - logprob) - (ref - logprob) - 1
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.2)
    coef_1 = torch.clamp(coef_1, max=3.0)
    per_token = -torch.min(coef_1 * advantage[:, None], coef_2 * advantage[:, None])
    return coef_1, kl, per_token + 0.001 * kl


def trl_loss(logprob: Tensor, old: Tensor, ref: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """TRL's loss without its metrics."""
    per_token = trl_terms(logprob, old, ref, advantage)[2]
    return (per_token * mask).sum() / mask.sum()


def trl_loss_and_metrics(logprob: Tensor, old: Tensor, ref: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """TRL's loss as its trainer evaluates it: with the numbers that it logs, but for the entropy. No distribution."""
    coef_1, kl, per_token = trl_terms(logprob, old, ref, advantage)
    loss = (per_token * mask).sum() / mask.sum()
    low = (coef_1 < 1 - 0.2) & (advantage[:, None] < 0)
    high = (coef_1 > 1 + 0.2) & (advantage[:, None] > 0)

    def mean(x: Tensor) -> float:
        total = torch.stack([(x * mask).sum(), mask.sum().float()])
        return (total[0] / total[1].clamp(min=1.0)).item()

    def extreme(of: Callable[[Tensor], Tensor], x: Tensor) -> float:
        rows = (x * mask).sum(-1) / mask.sum(-1)
        return math.nan if torch.isnan(rows).all() else of(rows[~torch.isnan(rows)]).item()

    for x in (kl, low.float(), high.float(), (low | high).float()):
        mean(x)
    extreme(torch.min, low.float())
    extreme(torch.max, high.float())
    return loss


# ---------------------------------------------------------------- the decoder's parts


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """transformers' Qwen2RMSNorm."""
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight), total


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope_tables(position: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, E] in float64: transformers computes them once for all layers, so they are not timed."""
    frequency = theta ** (-torch.arange(0, width, 2).double() / width)
    angle = (position.float()[:, None] * frequency.float()).double()
    return torch.cat([angle.cos()] * 2, dim=-1), torch.cat([angle.sin()] * 2, dim=-1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' apply_rotary_pos_emb, of [T, H, E]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """transformers' repeat_kv of [N, K, L, E]."""
    N, K, L, E = x.shape
    return x[:, :, None].expand(N, K, times, L, E).reshape(N, K * times, L, E)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """transformers' eager attention of [N, H, L, E] and [N, K, L, E]."""
    times, L = query.shape[1] // key.shape[1], query.shape[2]
    key, value = repeat_heads(key, times), repeat_heads(value, times)
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    hidden = torch.full((L, L), -math.inf, dtype=scores.dtype, device=scores.device).triu(1)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.softmax(scores + hidden, dim=-1, dtype=wide).to(query.dtype) @ value


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def decode_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """One new token [N, H, 1, E] over a dense cache [N, K, L, E]."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def decode_heads_as_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The query heads that share a kv head go in as rows of one query: no copy, and the fastest SDPA that we know."""
    N, H, _, E = query.shape
    rows = query.reshape(N, key.shape[1], H // key.shape[1], E)
    return F.scaled_dot_product_attention(rows, key, value, attn_mask=mask).reshape(N, H, 1, E)


def decode_repeat_kv(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """transformers' way: heads are copied, then SDPA."""
    times = query.shape[1] // key.shape[1]
    return F.scaled_dot_product_attention(query, repeat_heads(key, times), repeat_heads(value, times), attn_mask=mask)


def kv_index_copy(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot: Tensor) -> None:
    """Rows of a flat cache [slots, K, E]."""
    key_cache.index_copy_(0, slot, key)
    value_cache.index_copy_(0, slot, value)


def kv_index_put(key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slot: Tensor) -> None:
    """Into our own page layout."""
    page = key_pages.shape[-1]
    key_pages[slot // page, :, :, slot % page] = key
    value_pages[slot // page, :, slot % page] = value


# ---------------------------------------------------------------- CUDA libraries; each returns what is timed


def flashinfer_sample(logits: Tensor, top_k: int | None, top_p: float | None) -> Run:
    """Token ids only. Its filters go one after the other, as ours."""
    from flashinfer import sampling

    if top_k is not None:
        return lambda: sampling.top_k_top_p_sampling_from_logits(
            logits, top_k, 1.0 if top_p is None else top_p, filter_apply_order="top_k_first"
        )
    if top_p is not None:
        return lambda: sampling.top_p_sampling_from_probs(torch.softmax(logits.float(), dim=-1), top_p)
    return lambda: sampling.sampling_from_logits(logits)


def flashinfer_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Run:
    from flashinfer.norm import rmsnorm

    return lambda: rmsnorm(x, weight, eps)


def flashinfer_swiglu(gate_up: Tensor) -> Run:
    from flashinfer.activation import silu_and_mul

    return lambda: silu_and_mul(gate_up)


def flashinfer_rope(x: Tensor, position: Tensor, theta: float) -> Run:
    """It turns queries and keys in one call: all of x as queries, and its first head once more as keys."""
    from flashinfer.rope import apply_rope_pos_ids

    short = position.int()
    return lambda: apply_rope_pos_ids(x, x[:, :1], short, rope_theta=theta)[0]


def _flashinfer_pages(key: Tensor, value: Tensor, page: int) -> Tensor:
    """[B * pages each, 2, page, K, E] from dense [B, K, L, E], L a multiple of page."""
    B, K, L, E = key.shape
    return torch.stack([x.transpose(1, 2).reshape(B * (L // page), page, K, E) for x in (key, value)], dim=1)


def flashinfer_decode(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], page: int) -> Run:
    """Decoding of [B, H, E] over a dense [B, K, L, E] in pages of its own layout; planning is left out."""
    import flashinfer

    K, L, E = key.shape[1:]
    key, value = (F.pad(x, (0, 0, 0, -L % page)) for x in (key, value))
    pages, each = _flashinfer_pages(key, value, page), key.shape[2] // page
    length = torch.tensor(lengths)
    used = -(-length // page)
    indptr = F.pad(used.cumsum(0), (1, 0)).int()
    indices = torch.cat([torch.arange(n) + b * each for b, n in enumerate(used.tolist())]).int()
    # the path through tensor cores: the other has no kernel for seven query heads a kv head
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(128 << 20, dtype=torch.uint8), "NHD", use_tensor_cores=True, backend="fa2"
    )
    wrapper.plan(indptr, indices, ((length - 1) % page + 1).int(), query.shape[1], K, E, page,
                 q_data_type=query.dtype, kv_data_type=key.dtype, sm_scale=E**-0.5)  # fmt: skip
    return lambda: wrapper.run(query, pages)


def flashinfer_cascade(query: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], page: int) -> Run:
    """Decoding whose groups share a prefix: two levels, merged; planning is left out.

    Args:
        query: [B, H, E], the rows of a group one after another.
        prefix: keys and values [groups, K, P, E].
        own: keys and values [B, K, C, E].
        page: P and C are multiples of it.

    Returns:
        The call; its result is [B, H, E].
    """
    import flashinfer

    (groups, K, P, E), B, C = prefix[0].shape, query.shape[0], own[0].shape[2]
    shared, single = P // page, C // page
    pages = torch.cat([_flashinfer_pages(*prefix, page), _flashinfer_pages(*own, page)])
    rows = [torch.arange(groups + 1) * (B // groups), torch.arange(B + 1)]
    indptr = [torch.arange(groups + 1) * shared, torch.arange(B + 1) * single]
    indices = [torch.arange(groups * shared), groups * shared + torch.arange(B * single)]
    last = [torch.full((n,), page) for n in (groups, B)]
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.zeros(128 << 20, dtype=torch.uint8), "NHD")
    for level in wrapper._batch_prefill_wrappers:  # else Hopper's, which compiles for minutes when it is first called
        level._backend = "fa2"
    wrapper.plan(*([x.int() for x in level] for level in (rows, indptr, indices, last)), query.shape[1], K, E, page,
                 q_data_type=query.dtype, kv_data_type=query.dtype, sm_scale=E**-0.5)  # fmt: skip
    return lambda: wrapper.run(query, pages)


def liger_rms_norm() -> Callable[[Tensor, Tensor, float], Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def liger_swiglu() -> Callable[[Tensor, Tensor], Tensor]:
    """Of gate and up in two tensors, as it is called."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def liger_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Run:
    """It turns queries and keys in place, here those of a copy of x; each call turns them further."""
    from liger_kernel.ops.rope import LigerRopeFunction

    copy = x.clone()[None].transpose(1, 2)  # [1, H, T, E] over [1, T, H, E], as transformers has it
    key, cos, sin = copy[:, :1].clone(), cos[None], sin[None]
    return lambda: LigerRopeFunction.apply(copy, key, cos, sin)[0].transpose(1, 2)[0]


def liger_grpo(kl_coef: float) -> Callable[..., Tensor]:
    """Its loss (loss_type "dapo", delta 3) from hidden states, with a head that makes no [N, R, V] tensor."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=kl_coef, use_ref_model=True, delta=3.0, loss_type="dapo")

    def run(hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor, advantage: Tensor, old: Tensor, ref: Tensor):
        return loss(hidden, weight, target, mask, advantage, ref_per_token_logps=ref, old_per_token_logps=old)[0]

    return run


def torch_varlen(cu_seqlens: Tensor, longest: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's own attention over packed sequences, causal."""
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters  # they change from one version to the next
    how: dict[str, Any] = {"is_causal": True} if "is_causal" in takes else {"window_size": (-1, 0)}
    if "enable_gqa" in takes:
        how["enable_gqa"] = True
    return lambda q, k, v: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **how)


def flash_attn_varlen(cu_seqlens: Tensor, longest: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from flash_attn import flash_attn_varlen_func

    return lambda q, k, v: flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)


# ---------------------------------------------------------------- whole models


def native_bfloat16() -> bool:
    """Whether torch has fast bfloat16 products on this CPU. Without them it makes 1 to 10 GFLOP/s, a tenth of float32's."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def as_transformers(model: Model, attention: str = "sdpa", *, dtype: torch.dtype | None = None, share: bool = False):
    """transformers' model of the same family with our weights.

    Args:
        model: ours; of a family without scaled rotations.
        attention: "sdpa" or "eager".
        dtype: of its weights; None: ours.
        share: its weights are views of ours where the dtype is the same. Otherwise, and by default, they are copies.

    Returns:
        The model, in evaluation mode.
    """
    import transformers

    c, kind = model.config, family_of(model.config)
    if c.rope_scaling is not None:
        raise ValueError(f"as_transformers: model must have no rope_scaling, got {c.rope_scaling}")
    config = transformers.CONFIG_MAPPING[kind](
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings, rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_word_embeddings, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        attn_implementation=attention,
    )  # fmt: skip
    dtype = dtype or model.dtype
    with torch.device(model.device):
        theirs = getattr(transformers, FAMILIES[kind].architecture)._from_config(config, dtype=dtype)
    share = share and dtype == model.dtype
    absent, surplus = theirs.load_state_dict(dict(weights.split_parameters(model)), strict=False, assign=share)
    if surplus or set(absent) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not fit transformers' model: {absent}, {surplus}")
    theirs.tie_weights()
    return theirs.eval()


def padded(sequences: Sequence[Tensor], fill: int) -> Tensor:
    """[N, longest], padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=fill)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Of all gradients together, summed in float64: 1e8 float32 squares differ by 3e-5 with how weights are cut."""
    return torch.stack([torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters]).norm()


class TransformersTraining:
    """Training of transformers' model: padded, with AdamW(fused=True), as its Trainer does."""

    def __init__(self, theirs: Any, sequences: Sequence[Tensor], *, lr: float | None = None, micro_batches: int = 1,
                 compiled: bool = False):  # fmt: skip
        """`theirs`: see `as_transformers`; `step` needs lr, and a model of its own.

        With several micro-batches the sequences are sorted by length first, so that less is padded.
        """
        self.model = theirs.train()
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        if micro_batches > 1:
            sequences = sorted(sequences, key=len)
        size = -(-len(sequences) // micro_batches)
        self.parts = [self._part(sequences[i : i + size]) for i in range(0, len(sequences), size)]
        self.tokens = sum(len(s) - 1 for s in sequences)
        self.parameters = list(self.model.parameters())
        self.optimizer = lr and torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0, fused=True)

    @staticmethod
    def _part(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs, targets = padded([s[:-1] for s in sequences], 0), padded([s[1:] for s in sequences], -100)
        mask = targets != -100
        return inputs, targets, None if bool(mask.all()) else mask.long()

    def _backward(self) -> Tensor:
        """The loss; leaves the gradients."""
        total = torch.zeros((), device=self.parts[0][0].device)
        for inputs, targets, mask in self.parts:
            with part("forward"):
                logits = self.forward(input_ids=inputs, attention_mask=mask, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
                loss = loss / self.tokens
                del logits  # autograd keeps what it needs
            with part("backward"):
                loss.backward()
            total += loss.detach()
        return total

    def forward_and_backward(self) -> Tensor:
        """[loss, gradient norm] of one pass; the weights stay as they are."""
        loss = self._backward()
        norm = gradient_norm(self.parameters)
        self.model.zero_grad(set_to_none=True)
        return torch.stack([loss.float(), norm.float()])

    def step(self) -> Tensor:
        """[loss, gradient norm] of one step."""
        loss = self._backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss, norm])


class TransformersGeneration:
    """transformers' `generate` on prompts of one length, sampling; rows stop at lengths of their own."""

    def __init__(self, model: Model, prompts: Tensor, lengths: Sequence[int], *, dtype: torch.dtype | None = None):
        """`dtype`: see `as_transformers`; of our own dtype it shares our weights."""
        from transformers import GenerationConfig

        self.model, self.prompts = as_transformers(model, dtype=dtype, share=True), prompts
        self.criteria = stopping_criteria(prompts.shape[1], lengths)
        self.config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(lengths), min_new_tokens=None,
            eos_token_id=None, pad_token_id=0, bos_token_id=None, use_cache=True,
        )  # fmt: skip

    @torch.inference_mode()
    def generate(self) -> Tensor:
        """[N, longest] new tokens, padded."""
        out = self.model.generate(
            input_ids=self.prompts, attention_mask=torch.ones_like(self.prompts),
            generation_config=self.config, stopping_criteria=self.criteria,
        )  # fmt: skip
        return out[:, self.prompts.shape[1] :]

    @torch.inference_mode()
    def last_logits(self) -> Tensor:
        """[N, V] float32 after the prompts."""
        return self.model(input_ids=self.prompts, use_cache=False, logits_to_keep=1).logits[:, -1].float()


def write_gguf(model: Model, path: Path) -> None:
    """Our weights as a llama.cpp file without a vocabulary: matrices in bfloat16, vectors in float32.

    Args:
        model: a Qwen2 or a Llama.
        path: of the file.
    """
    import gguf

    c, kind = model.config, family_of(model.config)
    arch = {"qwen2": gguf.MODEL_ARCH.QWEN2, "llama": gguf.MODEL_ARCH.LLAMA}[kind]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    for theirs, tensor in weights.split_parameters(model):
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if kind == "llama" and theirs.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = neighbours(tensor, c.head_dim)
        if tensor.dim() == 1:
            writer.add_tensor(name, tensor.detach().float().numpy())
        else:
            raw = tensor.detach().bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a projection [heads * E, D] in the order that llama.cpp's Llama turns: pairs beside each other."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


class LlamaCpp:
    """llama.cpp decoding N sequences at once: all prompts in one batch, then a token of each sequence a step.

    The most probable token is taken, which costs least; ours draws and returns log-prob and entropy.
    """

    def __init__(self, model: Model, prompts: Tensor, lengths: Sequence[int]):
        import llama_cpp

        if min(lengths) != max(lengths):
            raise ValueError(f"LlamaCpp: lengths must be equal, got {min(lengths)} to {max(lengths)}")
        self.lib, self.prompts, self.new, self.vocabulary = llama_cpp, prompts, lengths[0], model.config.vocab_size
        N, P = prompts.shape
        llama_cpp.llama_log_set(_quiet(), None)
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path)
            how = llama_cpp.llama_model_default_params()
            how.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), how)
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the file")
        how = llama_cpp.llama_context_default_params()
        how.n_seq_max, how.n_batch, how.kv_unified = N, max(512, N * P), True
        how.n_ctx = -(-N * (P + self.new) // 256) * 256
        how.n_threads = how.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, how)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.batch = llama_cpp.llama_batch_init(N * P, 0, 1)

    def _decode(self, tokens: np.ndarray, start: int) -> np.ndarray:
        """[N, V] logits after the last of some tokens [N, n], which stand at position `start` and after."""
        N, n = tokens.shape
        batch = self.batch
        batch.n_tokens = N * n
        at = 0
        for row in range(N):
            for i in range(n):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = int(tokens[row, i]), start + i, 1
                batch.seq_id[at][0] = row
                batch.logits[at] = i == n - 1
                at += 1
        if self.lib.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama.cpp cannot decode the batch")
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), shape=(N, self.vocabulary))

    def _after_prompts(self) -> np.ndarray:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        return self._decode(self.prompts.numpy(), 0)

    def generate(self) -> Tensor:
        """[N, new] tokens."""
        tokens = [self._after_prompts().argmax(axis=1)]
        while len(tokens) < self.new:
            tokens.append(self._decode(tokens[-1][:, None], self.prompts.shape[1] + len(tokens) - 1).argmax(axis=1))
        return torch.from_numpy(np.stack(tokens, axis=1))

    def last_logits(self) -> Tensor:
        """[N, V] after the prompts."""
        return torch.from_numpy(self._after_prompts().copy())


@functools.cache
def _quiet() -> Any:
    """A log callback of llama.cpp that says nothing. Kept: llama.cpp holds it for good."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class TrlSteps:
    """Steps of TRL's GRPOTrainer, one at a time: it trains in a thread that waits after each."""

    def __init__(self, model: Model, prompts: Sequence[str], words: Sequence[str], lengths: Sequence[int], *,
                 group_size: int, reward: Callable[..., list[float]], lr: float, kl_coef: float):  # fmt: skip
        self.arguments = dict(model=model, prompts=prompts, words=words, lengths=lengths, group_size=group_size,
                              reward=reward, lr=lr, kl_coef=kl_coef)  # fmt: skip
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.closed = False
        self.trainer: Any = None
        self.threads = torch.get_num_threads()
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def step(self) -> Tensor:
        """[mean answer length, mean entropy] of one step."""
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error
        metrics = self.trainer._metrics["train"]
        return torch.tensor([metrics["completions/mean_length"][-1], metrics["entropy"][-1]])

    def close(self) -> None:
        self.closed = True
        self.go.release()
        self.thread.join()

    def _train(self) -> None:
        torch.set_num_threads(self.threads)  # torch keeps this for each thread
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.trainer = self._trainer(Path(folder), **self.arguments)
                self.go.acquire()
                if not self.closed:
                    self.trainer.train()
        except BaseException as e:
            self.error = e
            self.done.release()

    def _trainer(self, folder: Path, *, model: Model, prompts: Sequence[str], words: Sequence[str],
                 lengths: Sequence[int], group_size: int, reward: Callable[..., list[float]], lr: float,
                 kl_coef: float) -> Any:  # fmt: skip
        import transformers
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from trl import GRPOConfig, GRPOTrainer

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        steps, end = self, words[0]

        class Wait(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                steps.done.release()
                steps.go.acquire()
                control.should_training_stop = steps.closed

        weights.save_checkpoint(model, folder / "model")
        plain_words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=end))
        plain_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain_words, eos_token=end, pad_token=end)
        config = GRPOConfig(
            output_dir=str(folder / "out"), use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=len(prompts) * group_size, num_generations=group_size, steps_per_generation=1,
            max_completion_length=max(lengths), temperature=1.0, generation_kwargs={"suppress_tokens": [0]},
            learning_rate=lr, lr_scheduler_type="constant", beta=kl_coef, delta=3.0, max_grad_norm=1.0,
            max_steps=10**6, logging_steps=10**6, save_strategy="no", report_to="none", disable_tqdm=True,
            shuffle_dataset=False, model_init_kwargs={"dtype": "float32"}, seed=0,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=str(folder / "model"), reward_funcs=reward, args=config, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": list(prompts) * 64}), callbacks=[Wait()],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        # an answer's last token is the end token that fills the row: rows stop one token earlier
        rows = [n - (n < max(lengths)) for n in lengths for _ in range(group_size)]
        generate, prompt = trainer.model.generate, len(prompts[0].split())
        trainer.model.generate = lambda **inputs: generate(**inputs, stopping_criteria=stopping_criteria(prompt, rows))
        return trainer
