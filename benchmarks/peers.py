"""Every implementation that we are measured beside, once: plain torch, torch.compile, transformers, TRL, llama.cpp.

The plain-torch functions are the formulas that transformers and TRL evaluate; given float64 inputs they are the truth of
a check, and compiled they are a second peer.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.table import Missing, Run, tensors

EAGER, COMPILED = "torch eager", "torch.compile"


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def optional(package: str, make: Callable[[], Run]) -> Run | Missing:
    """A peer that needs a package, or what the table says when it is absent."""
    return make() if installed(package) else Missing(why="not installed")


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


def warper_chain(top_k: int, top_p: float) -> Callable[[Tensor], Tensor]:
    """transformers' filters and its draw."""
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    warpers = (TopKLogitsWarper(top_k), TopPLogitsWarper(top_p))

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


def trl_loss(logprob: Tensor, old: Tensor, ref: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """The loss of TRL's GRPOTrainer (loss_type "dapo", delta 3, beta 0.001) on padded [N, R] tensors, without its metrics."""
    coef_1 = torch.exp(logprob - old)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.2)
    coef_1 = torch.clamp(coef_1, max=3.0)
    per_token = -torch.min(coef_1 * advantage[:, None], coef_2 * advantage[:, None])
    per_token = per_token + 0.001 * (torch.exp(ref - logprob) - (ref - logprob) - 1)
    return (per_token * mask).sum() / mask.sum()


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
