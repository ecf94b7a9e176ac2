"""The public ops: each a thin function over one ``torch.ops.grpo_engine`` op.

Importing this module loads the native extension and needs torch and nothing else. Every op is
deterministic and batch-invariant: the bits of a row depend on that row alone, not on the batch, its
order or the number of threads. float64 tensors are accepted where a docstring says so, for gradcheck.

Letters: P prompts, G answers per prompt, N sequences, T packed tokens, R answer tokens, B rows,
V vocabulary, D width, F feed-forward width, H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from grpo_engine import _C  # noqa: F401  loading it registers the ops

__all__ = [
    "gather_logprob",
    "group_advantages",
    "kv_write",
    "linear",
    "paged_attention",
    "policy_loss",
    "ragged_attention",
    "rms_norm",
    "rope",
    "sample_token",
    "swiglu",
    "token_logprob",
]

_ops = torch.ops.grpo_engine


def _register_autograd(name: str, setup_context, backward) -> None:
    torch.library.register_autograd(
        f"grpo_engine::{name}", backward, setup_context=setup_context
    )


# ---------------------------------------------------------------- sample_token


# ---------------------------------------------------------------- gather_logprob


# ---------------------------------------------------------------- token_logprob


# ---------------------------------------------------------------- group_advantages


def group_advantages(
    rewards: Tensor,
    *,
    std: Literal["unbiased", "population", "none"] = "unbiased",
    eps: float = 1e-6,
) -> Tensor:
    """Turn the rewards of G sampled answers per prompt into group-relative advantages.

    ``A[p,g] = (r[p,g] - mean_g r[p,:]) / (std_g r[p,:] + eps)``, or with ``std="none"`` only the
    numerator.

    Args:
        rewards: [P, G] float32 or float64, contiguous; P prompts, G >= 2 answers.  Unit: reward.
        std: the standard deviation divides by G-1 ("unbiased"), by G ("population"), or the
            advantage is not divided at all ("none", as in Dr. GRPO).
        eps: added to the standard deviation.  Unit: reward.  Finite and >= 0.

    Returns:
        [P, G] of the dtype and device of ``rewards``; dimensionless, or in reward units when
        ``std="none"``.  A group of equal rewards gives exactly 0; a non-finite reward makes its own
        group NaN.  No gradient.

    Raises:
        ValueError: wrong rank, G < 2, eps < 0 or not finite, unknown ``std``, or not contiguous.
        TypeError: neither float32 nor float64.

    Source:
        Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2; without std: Liu et al. 2025,
        arXiv:2503.20783.
    """
    return _ops.group_advantages(rewards, std, eps)


# ---------------------------------------------------------------- policy_loss


# ---------------------------------------------------------------- rms_norm


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Root-mean-square normalisation of each row: ``x / sqrt(mean_d x^2 + eps) * weight``.

    float32 arithmetic; for bfloat16 the normalised row is rounded before the product with
    ``weight``, as Hugging Face models do.

    Args:
        x: [T, D] float32, bfloat16 or float64, contiguous.  T = 0 is allowed; D >= 1.
        weight: [D], dtype of ``x``.
        eps: added to the mean square; finite and >= 0.

    Returns:
        [T, D], dtype and device of ``x``.  Differentiable in ``x`` and ``weight``.  A row of zeros
        gives zeros (eps > 0); a NaN stays in its row.

    Raises:
        ValueError: wrong shape, not contiguous, or bad eps.
        TypeError: wrong dtype.

    Source:
        Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    return _ops.rms_norm(x, weight, eps)[0]


def _rms_norm_setup(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _rms_norm_backward(ctx, dy, _drstd):
    dx, dweight = _ops.rms_norm_backward(dy.contiguous(), *ctx.saved_tensors)
    return dx, dweight, None


_register_autograd("rms_norm", _rms_norm_setup, _rms_norm_backward)


# ---------------------------------------------------------------- rope


def rope(x: Tensor, position: Tensor, *, theta: float) -> Tensor:
    """Rotate each head by its token's position (rotary embedding, the ``rotate_half`` form).

    Element ``i`` of the first half of a head turns with element ``i`` of the second half, by the angle
    ``position / theta^(2i/E)``.  Frequency and angle are rounded to float32, as in the models that
    were trained so; cos and sin of that angle are exact to one float32 rounding at any position.

    Args:
        x: [T, H, E] float32, bfloat16 or float64; E even.  Contiguous in its last two axes, any
            stride over T, so a slice of a fused qkv projection needs no copy.
        position: [T] int64, >= 0, in any order.  Unit: tokens.  Above 2^24 rounded to float32.
        theta: base of the frequencies; finite and > 0.

    Returns:
        [T, H, E] contiguous, dtype and device of ``x``.  Differentiable in ``x``.  T = 0 is allowed;
        position 0 returns ``x`` itself.

    Raises:
        ValueError: wrong shape, odd E, inner axes not contiguous, bad theta, a negative position.
        TypeError: wrong dtype.

    Source:
        Su et al. 2021, arXiv:2104.09864.
    """
    return _ops.rope(x, position, theta, False)


def _rope_setup(ctx, inputs, output):
    _, position, ctx.theta, ctx.inverse = inputs
    ctx.save_for_backward(position)


def _rope_backward(ctx, dy):
    (position,) = ctx.saved_tensors
    return _ops.rope(dy.contiguous(), position, ctx.theta, not ctx.inverse), None, None, None


_register_autograd("rope", _rope_setup, _rope_backward)


# ---------------------------------------------------------------- swiglu


# ---------------------------------------------------------------- linear


# ---------------------------------------------------------------- kv_write


def kv_write(
    key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slot: Tensor
) -> None:
    """Store the keys and values of new tokens in the paged cache, in place.

    Args:
        key: [T, K, E] float32, bfloat16 or float64, contiguous in its last two axes, any stride
            over T.
        value: [T, K, E], dtype of ``key``, likewise.
        key_pages: [num_pages, K, E, page], dtype of ``key``, contiguous; written.  A page holds its
            keys transposed.  ``page`` is a multiple of 16.
        value_pages: [num_pages, K, page, E], dtype of ``key``, contiguous; written.
        slot: [T] int64, ``page_index * page + offset``; -1 skips the token.  Of two tokens with one
            slot the later wins.

    Returns:
        None.  Bits are copied as they are.  No gradient.

    Raises:
        ValueError: wrong shape, inner axes not contiguous, page not a multiple of 16, or a slot below
            -1 or past the last page (names the row; nothing is written).
        TypeError: wrong dtype.

    Source:
        Kwon et al. 2023, arXiv:2309.06180.
    """
    _ops.kv_write(key, value, key_pages, value_pages, slot)


# ---------------------------------------------------------------- paged_attention


def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    cu_query: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Causal attention of new tokens over the paged cache; decoding and chunked prefill alike.

    Token j of the q_n new tokens of sequence n sits at position ``kv_len[n] - q_n + j`` and sees the
    keys 0 .. its position, its own included: call ``kv_write`` first.  A row has the same bits in
    every batch, chunking and page layout, and the same as from ``ragged_attention``.

    Args:
        query: [T, H, E] float32, bfloat16 or float64, contiguous in its last two axes.  Query head h
            reads kv head ``h // (H // K)``.
        key_pages: [num_pages, K, E, page], dtype of ``query``, contiguous; page a multiple of 16.
        value_pages: [num_pages, K, page, E], likewise.
        page_table: [N, max_pages] int32; entries past the pages that ``kv_len`` needs are not read.
        cu_query: [N + 1] int32, first token of each sequence in ``query``, then T.  A sequence may
            have no new token; its pages are not read.
        kv_len: [N] int32, keys of each sequence in the cache, new tokens included.
        scale: factor of the scores, usually ``E ** -0.5``; finite and > 0.

    Returns:
        [T, H, E] contiguous, dtype of ``query``.  Slots past ``kv_len`` may hold anything, NaN too; a
        NaN in a visible key makes its rows NaN.  No gradient.

    Raises:
        ValueError: wrong shape, K does not divide H, cu_query falls, kv_len less than the new tokens,
            or a needed page missing or out of range (names the sequence).
        TypeError: wrong dtype.

    Source:
        Kwon et al. 2023, arXiv:2309.06180.
    """
    return _ops.paged_attention(
        query, key_pages, value_pages, page_table, cu_query, kv_len, scale
    )


# ---------------------------------------------------------------- ragged_attention


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, scale: float
) -> Tensor:
    """Causal self-attention within each of N packed sequences, for training.

    Args:
        query: [T, H, E] float32, bfloat16 or float64, contiguous in its last two axes, any stride
            over T.  Query head h reads kv head ``h // (H // K)``.
        key: [T, K, E], dtype of ``query``, likewise; K divides H.
        value: [T, K, E], dtype of ``query``, likewise.
        cu_seqlens: [N + 1] int32, first token of each sequence, then T; empty sequences are allowed.
        scale: factor of the scores, usually ``E ** -0.5``; finite and > 0.

    Returns:
        [T, H, E] contiguous, dtype of ``query``.  Differentiable in ``query``, ``key`` and ``value``;
        result and gradients of a sequence depend on that sequence alone.  A NaN in a token reaches
        the tokens after it, not those before.

    Raises:
        ValueError: wrong shape, K does not divide H, inner axes not contiguous, or cu_seqlens falls
            or does not run from 0 to T.
        TypeError: wrong dtype.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762; recomputation in the backward pass: Dao et al. 2022,
        arXiv:2205.14135.
    """
    return _ops.ragged_attention(query, key, value, cu_seqlens, scale)[0]


def _ragged_attention_setup(ctx, inputs, output):
    query, key, value, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, cu_seqlens, *output)


def _ragged_attention_backward(ctx, dout, _dstats):
    grads = _ops.ragged_attention_backward(dout.contiguous(), *ctx.saved_tensors, ctx.scale)
    return *grads, None, None


_register_autograd("ragged_attention", _ragged_attention_setup, _ragged_attention_backward)
