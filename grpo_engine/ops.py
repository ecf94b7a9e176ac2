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


def token_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-prob of one token and entropy of each row, from hidden states and the head's weight.

    ``logprob[t] = z[t, target[t]] - log sum_v exp z[t, v]`` with
    ``z = hidden @ weight.T / temperature``.  The logits are formed a tile at a time and never kept:
    extra memory is under 5 % of theirs at a vocabulary of 151,936.  They are those of
    ``linear(hidden, weight, out_dtype=torch.float32)`` bit for bit, so the log-prob equals that of
    `sample_token` and `gather_logprob` on them.

    Args:
        hidden: [T, D] float32, bfloat16 or float64, contiguous.  T = 0 is allowed.
        weight: [V, D], dtype of ``hidden``, contiguous; V >= 1.
        target: [T] int64 in [0, V).
        temperature: divides the logits; finite, > 0.

    Returns:
        (logprob [T], entropy [T]), float32 (float64 for float64), natural log and nats; both
        differentiable in ``hidden`` and ``weight``.  Gradients are summed in float32 over ascending
        v and t and rounded once; that of a frozen ``weight`` is not computed.  A NaN or +inf logit
        makes its row NaN.

    Raises:
        ValueError: wrong shape, not contiguous, a target outside [0, V) (the row is named), or a bad
            temperature.
        TypeError: wrong dtype, or dtypes of ``hidden`` and ``weight`` that differ.

    Source:
        Shao et al. 2024, arXiv:2402.03300, eq. 3 (the log-probs of the policy ratio); Wijmans et al.
        2024, arXiv:2411.09009 (the recomputation, here without its gradient filter).
    """
    return _ops.token_logprob(hidden, weight, target, temperature)[:2]


def _token_logprob_setup(ctx, inputs, output):
    hidden, weight, target, ctx.temperature = inputs
    ctx.save_for_backward(hidden, weight, target, output[2])


def _token_logprob_backward(ctx, g_logprob, g_entropy, _g_saved):
    need = ctx.needs_input_grad[:2]
    grads = _ops.token_logprob_backward(
        g_logprob.contiguous(), g_entropy.contiguous(), *ctx.saved_tensors, ctx.temperature, *need
    )
    return *(g if n else None for g, n in zip(grads, need, strict=True)), None, None


_register_autograd("token_logprob", _token_logprob_setup, _token_logprob_backward)


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


# ---------------------------------------------------------------- swiglu


# ---------------------------------------------------------------- linear


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Matrix product of each row with the rows of ``weight``: ``y = x @ weight.T + bias``.

    Each output element is one chain of float32 fused multiply-adds in ascending i (float64 for
    float64), so a row has the same bits in a batch of any size.  The bias is added once at the end
    and the result is rounded once, to nearest even.

    Args:
        x: [T, I] float32, bfloat16 or float64; columns adjacent, rows may be strided.  T = 0 and
            I = 0 are allowed.
        weight: [O, I], dtype of ``x``, contiguous.
        bias: [O], dtype of ``x``, or None.
        out_dtype: dtype of the result; that of ``x`` by default.  float32 is allowed for bfloat16
            ``x`` (unrounded logits).

    Returns:
        [T, O] of ``out_dtype`` on the device of ``x``.  Differentiable in ``x``, ``weight`` and
        ``bias``; the gradient of one that needs none is not computed.

    Raises:
        ValueError: wrong shape, columns of ``x`` not adjacent, or an ``out_dtype`` not listed.
        TypeError: wrong dtype, or dtypes of ``x``, ``weight`` and ``bias`` that differ.

    Source:
        Goto and van de Geijn 2008, ACM TOMS 34(3):12 (the blocking); the fixed order of each sum is
        that of He et al. 2025, "Defeating Nondeterminism in LLM Inference", Thinking Machines Lab.
    """
    return _ops.linear(x, weight, bias, out_dtype)


def _linear_setup(ctx, inputs, output):
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight)


def _linear_backward(ctx, dy):
    need = ctx.needs_input_grad[:3]
    grads = _ops.linear_backward(dy.contiguous(), *ctx.saved_tensors, *need)
    return *(g if n else None for g, n in zip(grads, need, strict=True)), None


_register_autograd("linear", _linear_setup, _linear_backward)


# ---------------------------------------------------------------- kv_write


# ---------------------------------------------------------------- paged_attention


# ---------------------------------------------------------------- ragged_attention
