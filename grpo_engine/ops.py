"""The public ops: each a thin function over one ``torch.ops.grpo_engine`` op.

Importing this module loads the native extension and needs torch and nothing else. Every op is
deterministic and batch-invariant: the bits of a row depend on that row alone, not on the batch, its
order or the number of threads. Those with matrix products have ``batch_invariant=False`` for users who
prefer cuBLAS's speed on CUDA to equal bits; on the CPU it changes nothing. float64 tensors are accepted
where a docstring says so, for gradcheck.

Letters: P prompts, G responses per prompt, N sequences, T packed tokens, R response tokens, B rows,
V vocabulary, D width, F feed-forward width, H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from grpo_engine import _C  # noqa: F401  loading it registers the ops

__all__ = [
    "adamw",
    "decoder_layer",
    "decoder_layer_paged",
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


def _differentiable(name: str, setup_context, backward, *, visible: int = 1):
    """Registers an op's gradient and returns the function that calls the op with it.

    torch.library.register_autograd serves whoever calls ``torch.ops.grpo_engine`` or compiles; it costs 50 to 100 us a
    call, and 10 us where no gradient is wanted. Eager calls of the public functions go through an autograd.Function of
    the same two functions, at a quarter, and reach the kernel from below autograd.

    Args:
        name: of the op.
        setup_context: (ctx, inputs, outputs), as torch.library.register_autograd has it.
        backward: (ctx, *gradients of all outputs); those past `visible` may be missing.
        visible: how many of the op's first outputs the caller sees.

    Returns:
        A function of the op's inputs that gives its first `visible` outputs: one as it is, more as a tuple.
    """
    op = getattr(_ops, name)
    torch.library.register_autograd(f"grpo_engine::{name}", backward, setup_context=setup_context)

    def seen(outputs):
        return outputs if isinstance(outputs, Tensor) else outputs[0] if visible == 1 else outputs[:visible]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                outputs = op(*inputs)
            setup_context(ctx, inputs, outputs)
            return seen(outputs)

    Function.backward = staticmethod(backward)
    Function.__name__ = name

    def call(*inputs):
        if torch.compiler.is_compiling():
            return seen(op(*inputs))
        if torch.is_grad_enabled():
            return Function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return seen(op(*inputs))

    return call


# ---------------------------------------------------------------- sample_token


class SampledToken(NamedTuple):
    """What `sample_token` returns, one entry a row."""

    token: Tensor  # [B] int64; -1 for a row that cannot be sampled
    logprob: Tensor  # [B] float32, of the distribution that was sampled, filters included
    full_logprob: Tensor  # [B] float32, of softmax(logits / temperature)
    entropy: Tensor  # [B] float32, nats, of softmax(logits / temperature)


def _per_row(value: float | Tensor, B: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((B,), value, dtype=dtype, device=device)


def sample_token(
    logits: Tensor,
    *,
    seed: Tensor,
    position: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
) -> SampledToken:
    """Draw one token a row, with its log-prob and the row's entropy, in one pass over the logits.

    The uniform of a row is Philox4x32-10 of (seed, position): the same seed and position give the same
    token whatever the batch. Filters apply in the order top-k, top-p (of what top-k left, renormalised),
    min-p. Ties at the top-k boundary go to the lowest ids; top-p keeps every token that ties.

    Args:
        logits: [B, V] float32 or bfloat16, rows contiguous (the batch may be strided).  B = 0 is
            allowed.  -inf means probability 0.
        seed: [B] int64, one for each request.
        position: [B] int64, position in its sequence of the token to sample.
        temperature: divides the logits; number or [B] float32; finite, >= 0.  0 takes the lowest id
            among the largest logits, with log-prob 0; the other outputs are then those of temperature 1.
        top_k: keep the k largest; number or [B] int64; None, <= 0 or >= V is off.
        top_p: keep the smallest set of this mass; number or [B] float32 in [0, 1]; None or 1 is off,
            0 keeps the largest.
        min_p: keep tokens with at least this share of the largest probability; number or [B] float32 in
            [0, 1]; None or 0 is off.

    Returns:
        `SampledToken`.  A row that holds NaN or +inf, or -inf only, gives token -1 and NaN; the other
        rows keep their bits.

    Raises:
        ValueError: wrong shape, or a temperature, top_p or min_p outside its range (the row is named;
            on CUDA, which does not read them back, that row gives token -1 and NaN).
        TypeError: wrong dtype.

    Source:
        Salmon et al. 2011, SC'11 (Philox); Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al.
        2024, arXiv:2407.01082 (min-p).
    """
    B, device = logits.shape[0] if logits.dim() else 0, logits.device
    optional = [
        None if value is None else _per_row(value, B, dtype, device)
        for value, dtype in ((top_k, torch.int64), (top_p, torch.float32), (min_p, torch.float32))
    ]
    temperatures = _per_row(temperature, B, torch.float32, device)
    return SampledToken(*_ops.sample_token(logits, seed, position, temperatures, *optional))


# ---------------------------------------------------------------- gather_logprob


def gather_logprob(logits: Tensor, target: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of one token and entropy of each row of given logits.

    ``logprob[t] = z[t, target[t]] - log sum_v exp z[t, v]`` with ``z = logits / temperature``. When the
    logits come from a head that is at hand, `token_logprob` does without them.

    Args:
        logits: [T, V] float32, bfloat16 or float64, contiguous.  T = 0 is allowed.
        target: [T] int64 in [0, V).
        temperature: divides the logits; finite, > 0.

    Returns:
        (logprob [T], entropy [T]), float32 (float64 for float64 logits), natural log and nats; both
        differentiable in ``logits``.  A -inf logit has probability 0; a NaN or +inf makes its row NaN.

    Raises:
        ValueError: wrong shape, not contiguous, a target outside [0, V) (the row is named), or a bad
            temperature.
        TypeError: wrong dtype.

    Source:
        Shao et al. 2024, arXiv:2402.03300, eq. 3 (the log-probs of the policy ratio).
    """
    return _gather_logprob(logits, target, temperature)


def _gather_logprob_setup(ctx, inputs, output):
    logits, target, ctx.temperature = inputs
    ctx.save_for_backward(logits, target, output[2])


def _gather_logprob_backward(ctx, g_logprob, g_entropy, _g_saved=None):
    logits, target, saved = ctx.saved_tensors
    dlogits = _ops.gather_logprob_backward(
        g_logprob.contiguous(), g_entropy.contiguous(), logits, target, saved, ctx.temperature
    )
    return dlogits, None, None


_gather_logprob = _differentiable("gather_logprob", _gather_logprob_setup, _gather_logprob_backward, visible=2)


# ---------------------------------------------------------------- token_logprob


def token_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float = 1.0, batch_invariant: bool = True
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
        batch_invariant: False takes the products on CUDA from torch's library (cuBLAS), over windows of
            the logits of at most 64 MiB of float32 (twice for float64).  Then no equality of bits is
            promised, and for bfloat16 the gradient of the logits is rounded to bfloat16 once; logits,
            log-probs and all sums stay float32.  On the CPU it changes nothing.

    Returns:
        (logprob [T], entropy [T]), float32 (float64 for float64), natural log and nats; both
        differentiable in ``hidden`` and ``weight``.  Gradients are summed in float32 over ascending
        v and t (on CUDA with bfloat16, over windows of them) and rounded once; that of a frozen
        ``weight`` is not computed.  A NaN or +inf logit makes its row NaN.

    Raises:
        ValueError: wrong shape, not contiguous, a target outside [0, V) (the row is named), or a bad
            temperature.
        TypeError: wrong dtype, or dtypes of ``hidden`` and ``weight`` that differ.

    Source:
        Shao et al. 2024, arXiv:2402.03300, eq. 3 (the log-probs of the policy ratio); Wijmans et al.
        2024, arXiv:2411.09009 (the recomputation, here without its gradient filter).
    """
    return _token_logprob(hidden, weight, target, temperature, batch_invariant)


def _token_logprob_setup(ctx, inputs, output):
    hidden, weight, target, ctx.temperature, ctx.batch_invariant = inputs
    ctx.save_for_backward(hidden, weight, target, output[2])


def _token_logprob_backward(ctx, g_logprob, g_entropy, _g_saved=None):
    need = ctx.needs_input_grad[:2]
    grads = _ops.token_logprob_backward(
        g_logprob.contiguous(), g_entropy.contiguous(), *ctx.saved_tensors, ctx.temperature, *need, ctx.batch_invariant
    )
    return *(g if n else None for g, n in zip(grads, need, strict=True)), None, None, None


_token_logprob = _differentiable("token_logprob", _token_logprob_setup, _token_logprob_backward, visible=2)


# ---------------------------------------------------------------- group_advantages


def group_advantages(
    rewards: Tensor,
    *,
    std: Literal["unbiased", "population", "none"] = "unbiased",
    eps: float = 1e-6,
) -> Tensor:
    """Turn the rewards of G sampled responses per prompt into group-relative advantages.

    ``A[p,g] = (r[p,g] - mean_g r[p,:]) / (std_g r[p,:] + eps)``, or with ``std="none"`` only the
    numerator.

    Args:
        rewards: [P, G] float32 or float64, contiguous; P prompts, G >= 2 responses.  Unit: reward.
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


class PolicyStats(NamedTuple):
    """Raw sums and maxima over the kept tokens of one call; add up calls with `merge`."""

    tokens: float  # kept tokens
    policy_loss: float  # the loss without its KL term
    kl_loss: float  # the KL term of the loss, coefficient included
    kl: float  # sum of the KL estimates, times their ratios with kl_ratio
    ratio: float  # sum of the ratios
    ratio_max: float
    clip_low: float  # tokens clipped from below: A < 0 and ratio < 1 - clip_low
    clip_high: float  # tokens clipped from above: A > 0 and ratio > 1 + clip_high
    dual_clip: float  # tokens where the dual clip binds
    mismatch_max: float  # max |logprob - old_logprob|

    def merge(self, other: PolicyStats) -> PolicyStats:
        """The statistics of both calls together."""
        joined = {
            name: max(a, b) if name.endswith("_max") else a + b for name, a, b in zip(self._fields, self, other, strict=True)
        }
        return PolicyStats(**joined)


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns."""

    loss: Tensor  # scalar, differentiable in logprob
    stats: Tensor  # [10] float64, the fields of PolicyStats in order


def policy_loss(
    logprob: Tensor,
    *,
    advantage: Tensor,
    cu_seqlens: Tensor,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    mask: Tensor | None = None,
    ratio: Literal["token", "sequence"] = "token",
    objective: Literal["clip", "cispo"] = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    kl: Literal["k1", "k2", "k3"] = "k3",
    kl_coef: float = 0.0,
    kl_ratio: bool = False,
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean",
    num_tokens: int | None = None,
    num_sequences: int | None = None,
    constant_length: int | None = None,
) -> PolicyLoss:
    """The clipped policy-gradient loss of response tokens, its gradient and its statistics, in one pass.

    ``loss = sum_t w_t (f_t + kl_coef KL_t)`` over kept tokens, where f is
    ``max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high))`` ("clip"; where A < 0 at most
    ``-A dual_clip``) or ``-A stop_gradient(clamp(r, ...)) logprob`` ("cispo"), and the weight w is
    ``1 / num_tokens``, ``1 / (num_sequences * kept tokens of the sequence)`` or
    ``1 / (num_sequences * constant_length)``.

    =========  =====================================================================
    GRPO       ratio="token", aggregation="sequence_mean" (the paper's formula)
    DAPO       ratio="token", aggregation="token_mean", clip_high > clip_low
    Dr. GRPO   aggregation="constant", and advantages without their std
    GSPO       ratio="sequence", aggregation="sequence_mean"
    CISPO      objective="cispo", aggregation="token_mean"
    =========  =====================================================================

    Args:
        logprob: [R] float32 or float64, contiguous: log-probs under the policy that is trained.
        advantage: [R], dtype of ``logprob``.
        cu_seqlens: [N+1] int32, start of each sequence's response tokens; from 0 to R.
        old_logprob: [R], of the policy that sampled; None means equal to ``logprob``: every ratio is
            1 and the gradient flows.
        ref_logprob: [R], of the reference policy; None when ``kl_coef`` is 0.
        mask: [R] bool, tokens to keep; None keeps all.  A masked token is skipped whatever it holds.
        ratio: of each token, or one for the sequence: exp of its mean log-ratio.
        objective: "clip" (PPO, GRPO) or "cispo".
        clip_low: in [0, 1].
        clip_high: finite, >= 0.
        dual_clip: > 1, or None for off.
        kl: estimator of the KL to the reference.
        kl_coef: finite, >= 0.
        kl_ratio: multiply each KL estimate by the ratio, which is differentiated as well; of k3 and token ratios the
            gradient is then an unbiased one of the reverse KL.
        aggregation: what the weights divide by.
        num_tokens: kept tokens of the whole optimizer step, for "token_mean"; None: of this call.
        num_sequences: sequences of the whole optimizer step, for the others; None: N.
        constant_length: tokens, for "constant".

    Returns:
        `PolicyLoss`: the loss (0 for R = 0) and the statistics.  Log-ratios are clamped to +-20, with
        gradient 0 beyond.  NaN in a kept token reaches the loss.

    Raises:
        ValueError: wrong shape or value, the argument named.
        TypeError: wrong dtype.

    Source:
        Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4; Yu et al. 2025, arXiv:2503.14476 (DAPO); Liu et
        al. 2025, arXiv:2503.20783 (Dr. GRPO); Zheng et al. 2025, arXiv:2507.18071 (GSPO); MiniMax 2025,
        arXiv:2506.13585 (CISPO); Ye et al. 2020, arXiv:1912.09729 (dual clip); Schulman 2020 (k1-k3);
        DeepSeek-AI 2025, arXiv:2512.02556 (kl_ratio).
    """
    if (aggregation == "constant") != (constant_length is not None):
        raise ValueError(
            "policy_loss: constant_length goes with aggregation='constant', and only with it, "
            f"got aggregation={aggregation!r}, constant_length={constant_length}"
        )
    if aggregation == "token_mean":
        kept = num_tokens
        if kept is None:
            kept = logprob.numel() if mask is None else int(mask.sum())
        denominator = float(kept if num_tokens is not None else max(kept, 1))
    else:
        sequences = num_sequences if num_sequences is not None else max(cu_seqlens.numel() - 1, 1)
        denominator = float(sequences * (constant_length if constant_length is not None else 1))
    loss, _, stats = _ops.policy_loss(
        logprob, advantage, cu_seqlens, old_logprob, ref_logprob, mask, ratio, objective,
        clip_low, clip_high, dual_clip, kl, kl_coef, kl_ratio, aggregation, denominator,
    )  # fmt: skip
    return PolicyLoss(loss, stats)


# ---------------------------------------------------------------- rms_norm


@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation of each row: ``x / sqrt(mean_d x^2 + eps) * weight``.

    With ``residual`` it is ``x + residual`` that is normalised, and the sum is returned too, as a
    pre-norm decoder needs: the branch reads the norm, the stream goes on with the sum.
    float32 arithmetic; for bfloat16 the sum is rounded, and the normalised row is rounded before the
    product with ``weight``, as Hugging Face models do.

    Args:
        x: [T, D] float32, bfloat16 or float64, contiguous.  T = 0 is allowed; D >= 1.
        weight: [D], dtype of ``x``.
        eps: added to the mean square; finite and >= 0.
        residual: [T, D], dtype of ``x``, contiguous; or None.

    Returns:
        [T, D], dtype and device of ``x``; with ``residual`` a pair of that and ``x + residual``.
        Differentiable in ``x``, ``weight`` and ``residual``.  A row of zeros gives zeros (eps > 0); a
        NaN stays in its row.  The bits with ``residual`` are those of ``rms_norm(x + residual, ...)``.

    Raises:
        ValueError: wrong shape, not contiguous, or bad eps.
        TypeError: wrong dtype.

    Source:
        Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if residual is None:
        return _rms_norm(x, weight, eps)
    return _rms_norm_residual(x, residual, weight, eps)


def _rms_norm_setup(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _rms_norm_backward(ctx, dy, _drstd=None):
    dx, dweight = _ops.rms_norm_backward(dy.contiguous(), None, *ctx.saved_tensors)
    return dx, dweight, None


_rms_norm = _differentiable("rms_norm", _rms_norm_setup, _rms_norm_backward)


def _rms_norm_residual_setup(ctx, inputs, output):
    _, total, rstd = output
    ctx.save_for_backward(total, inputs[2], rstd)
    ctx.set_materialize_grads(False)  # the last sum of a decoder is often not used: no pass over zeros


def _rms_norm_residual_backward(ctx, dy, dsum, _drstd=None):
    if dy is None:
        return dsum, dsum, None, None
    dsum = None if dsum is None else dsum.contiguous()
    dx, dweight = _ops.rms_norm_backward(dy.contiguous(), dsum, *ctx.saved_tensors)
    return dx, dx, dweight, None


_rms_norm_residual = _differentiable("rms_norm_residual", _rms_norm_residual_setup, _rms_norm_residual_backward, visible=2)


# ---------------------------------------------------------------- rope


def rope(x: Tensor, position: Tensor, *, theta: float, frequency: Tensor | None = None) -> Tensor:
    """Rotate each head by its token's position (rotary embedding, the ``rotate_half`` form).

    Element ``i`` of the first half of a head turns with element ``i`` of the second half, by the angle
    ``position / theta^(2i/E)``.  Frequency and angle are rounded to float32, as in the models that
    were trained so; cos and sin of that angle are exact to one float32 rounding at any position.

    Args:
        x: [T, H, E] float32, bfloat16 or float64; E even.  Contiguous in its last two axes, any
            stride over T, so a slice of a fused qkv projection needs no copy.
        position: [T] int64, >= 0, in any order.  Unit: tokens.  Above 2^24 rounded to float32.
        theta: base of the frequencies; finite and > 0.
        frequency: [E/2] float32, radians a token, in place of those of theta, for models that scale them; or
            None.  No gradient.

    Returns:
        [T, H, E] contiguous, dtype and device of ``x``.  Differentiable in ``x``.  T = 0 is allowed;
        position 0 returns ``x`` itself.

    Raises:
        ValueError: wrong shape, odd E, inner axes not contiguous, bad theta, a negative position.
        TypeError: wrong dtype.

    Source:
        Su et al. 2021, arXiv:2104.09864.
    """
    return _rope(x, position, theta, False, frequency)


def _rope_setup(ctx, inputs, output):
    _, position, ctx.theta, ctx.inverse, frequency = inputs
    ctx.save_for_backward(position, frequency)


def _rope_backward(ctx, dy):
    position, frequency = ctx.saved_tensors
    dx = _ops.rope(dy.contiguous(), position, ctx.theta, not ctx.inverse, frequency)
    return dx, None, None, None, None


_rope = _differentiable("rope", _rope_setup, _rope_backward)


# ---------------------------------------------------------------- swiglu


def swiglu(gate_up: Tensor) -> Tensor:
    """The gated activation of the feed-forward block: ``silu(gate) * up``.

    float32 arithmetic; for bfloat16 ``silu(gate)`` is rounded before the product, as Hugging Face
    models do.

    Args:
        gate_up: [T, 2F] float32, bfloat16 or float64, contiguous; columns 0..F-1 are the gate, the rest
            up.  T = 0 is allowed.

    Returns:
        [T, F], dtype and device of ``gate_up``; differentiable.

    Raises:
        ValueError: wrong rank, an odd number of columns, or not contiguous.
        TypeError: wrong dtype.

    Source:
        Shazeer 2020, arXiv:2002.05202.
    """
    return _swiglu(gate_up)


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, dy):
    return _ops.swiglu_backward(dy.contiguous(), *ctx.saved_tensors)


_swiglu = _differentiable("swiglu", _swiglu_setup, _swiglu_backward)


# ---------------------------------------------------------------- linear


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = True,
) -> Tensor:
    """Matrix product of each row with the rows of ``weight``: ``y = x @ weight.T + bias``.

    Each output element is one chain of float32 fused multiply-adds in ascending i (float64 for
    float64; on CUDA bfloat16 goes through the tensor cores, 16 terms at a time in the same order), so a
    row has the same bits in a batch of any size.  The bias is added once at the end and the result is
    rounded once, to nearest even.

    Args:
        x: [T, I] float32, bfloat16 or float64; columns adjacent, rows may be strided.  T = 0 and
            I = 0 are allowed.
        weight: [O, I], dtype of ``x``, contiguous.
        bias: [O], dtype of ``x``, or None.
        out_dtype: dtype of the result; that of ``x`` by default.  float32 is allowed for bfloat16
            ``x`` (unrounded logits).
        batch_invariant: False takes the products on CUDA, gradients too, from torch's library (cuBLAS),
            whose bits change with the shape: bfloat16 with sums in float32, float32 under torch's switch
            for TF32.  A float32 gradient of bfloat16 ``x`` is rounded to bfloat16 first.  On the CPU,
            which is invariant at full speed, it changes nothing.

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
    return _linear(x, weight, bias, out_dtype, batch_invariant)


def _linear_setup(ctx, inputs, output):
    x, weight, _, _, ctx.batch_invariant = inputs
    ctx.save_for_backward(x, weight)


def _linear_backward(ctx, dy):
    need = ctx.needs_input_grad[:3]
    grads = _ops.linear_backward(dy.contiguous(), *ctx.saved_tensors, *need, ctx.batch_invariant)
    return *(g if n else None for g, n in zip(grads, need, strict=True)), None, None


_linear = _differentiable("linear", _linear_setup, _linear_backward)


# ---------------------------------------------------------------- kv_write


def kv_write(key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slot: Tensor) -> None:
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
    return _ops.paged_attention(query, key_pages, value_pages, page_table, cu_query, kv_len, scale)


# ---------------------------------------------------------------- ragged_attention


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    cu_groups: Tensor | None = None,
) -> Tensor:
    """Causal self-attention within each of N packed sequences, for training.

    With ``cu_groups`` one packed prompt serves all its responses: a token of a response sees the whole
    prompt and then its own response up to itself, nothing of the other responses.  The result has the bits
    that the same tokens have when every response is packed behind a copy of its prompt.

    Args:
        query: [T, H, E] float32, bfloat16 or float64, contiguous in its last two axes, any stride
            over T.  Query head h reads kv head ``h // (H // K)``.
        key: [T, K, E], dtype of ``query``, likewise; K divides H.
        value: [T, K, E], dtype of ``query``, likewise.
        cu_seqlens: [N + 1] int32, first token of each sequence, then T; empty sequences are allowed.
        scale: factor of the scores, usually ``E ** -0.5``; finite and > 0.
        cu_groups: [M + 1] int32, first sequence of each group, then N, strictly rising.  The first
            sequence of a group is the prompt that the others of the group continue.  None: every
            sequence is on its own.

    Returns:
        [T, H, E] contiguous, dtype of ``query``.  Differentiable in ``query``, ``key`` and ``value``;
        the gradient of a prompt's keys and values sums over its own queries and then those of its
        responses in their order.  Result and gradients of a group depend on that group alone.  A NaN in
        a token reaches the tokens that see it and no other.

    Raises:
        ValueError: wrong shape, K does not divide H, inner axes not contiguous, cu_seqlens falls or
            does not run from 0 to T, cu_groups does not rise or does not run from 0 to N.
        TypeError: wrong dtype.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762; recomputation in the backward pass: Dao et al. 2022,
        arXiv:2205.14135.
    """
    return _ragged_attention(query, key, value, cu_seqlens, cu_groups, scale)


def _ragged_attention_setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _ragged_attention_backward(ctx, dout, _dstats=None):
    grads = _ops.ragged_attention_backward(dout.contiguous(), *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None


_ragged_attention = _differentiable("ragged_attention", _ragged_attention_setup, _ragged_attention_backward)


# ---------------------------------------------------------------- decoder_layer


class LayerWeights(NamedTuple):
    """The weights of one decoder layer, all of one dtype and contiguous."""

    attn_norm: Tensor  # [D]
    qkv_weight: Tensor  # [(H + 2K) E, D]; rows: q, then k, then v
    qkv_bias: Tensor | None  # [(H + 2K) E]; None: without (Llama)
    out_weight: Tensor  # [D, H E]
    mlp_norm: Tensor  # [D]
    gate_up_weight: Tensor  # [2F, D]; rows: gate, then up
    down_weight: Tensor  # [D, F]


def decoder_layer(
    x: Tensor,
    weights: LayerWeights,
    position: Tensor,
    cu_seqlens: Tensor,
    *,
    num_kv_heads: int,
    head_dim: int,
    theta: float,
    eps: float,
    cu_groups: Tensor | None = None,
    batch_invariant: bool = True,
) -> Tensor:
    """One layer of a Qwen2.5 or Llama decoder over N packed sequences, for training: ten ops in one call.

    ``s = x + linear(ragged_attention(rope(qkv)), out_weight)`` with
    ``qkv = linear(rms_norm(x), qkv_weight, qkv_bias)``, then
    ``s + linear(swiglu(linear(rms_norm(s), gate_up_weight)), down_weight)``: the same bits as those ops give
    one after another, and as `decoder_layer_paged`.

    Args:
        x: [T, D] float32, bfloat16 or float64, contiguous.  T = 0 is allowed.
        weights: see `LayerWeights`; dtype of ``x``.
        position: [T] int64, >= 0, of each token in its sequence.
        cu_seqlens: [N + 1] int32, first token of each sequence, then T.
        num_kv_heads: K; divides the number of query heads.
        head_dim: E, even; attention scores are scaled by ``1 / sqrt(E)``.
        theta: base of the rotary frequencies; finite and > 0.
        eps: of both norms; finite and >= 0.
        cu_groups: [M + 1] int32, groups of sequences that share a prompt; see `ragged_attention`.
        batch_invariant: False takes the products on CUDA from cuBLAS; see `linear`.

    Returns:
        [T, D], dtype of ``x``; differentiable in ``x`` and the weights.  A row depends on its own sequence
        alone; a gradient of a weight is one sum over ascending tokens.

    Raises:
        ValueError: wrong shape or value, the argument named.
        TypeError: wrong dtype.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762; Qwen team 2024, arXiv:2412.15115.
    """
    save = torch.is_grad_enabled() and (x.requires_grad or any(w is not None and w.requires_grad for w in weights))
    return _decoder_layer(
        x, *weights, position, cu_seqlens, cu_groups, num_kv_heads, head_dim, theta, eps, save, batch_invariant
    )


def _decoder_layer_setup(ctx, inputs, output):
    x_weights_position, (cu_seqlens, cu_groups, *numbers, _save, batch_invariant) = inputs[:9], inputs[9:]
    ctx.numbers = *numbers, batch_invariant
    ctx.save_for_backward(*x_weights_position, cu_seqlens, *output[1:])
    ctx.cu_groups = cu_groups


def _decoder_layer_backward(ctx, dy, *_):
    saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no second time
    grads = _ops.decoder_layer_backward(dy.contiguous(), *saved[:10], ctx.cu_groups, *saved[10:], *ctx.numbers)
    dx, dattn_norm, dqkv_weight, dqkv_bias, *rest = grads
    has_bias = saved[3] is not None
    return dx, dattn_norm, dqkv_weight, dqkv_bias if has_bias else None, *rest, *([None] * 9)


_decoder_layer = _differentiable("decoder_layer", _decoder_layer_setup, _decoder_layer_backward)


def decoder_layer_paged(
    x: Tensor,
    weights: LayerWeights,
    position: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slot: Tensor,
    page_table: Tensor,
    cu_query: Tensor,
    kv_len: Tensor,
    *,
    theta: float,
    eps: float,
    batch_invariant: bool = True,
) -> Tensor:
    """The same layer over a paged cache: decoding and chunked prefill. No gradient.

    Args:
        x: [T, D] of the new tokens, sequence after sequence.
        weights: see `LayerWeights`.
        position: [T] int64, of each new token in its sequence.
        key_pages: [num_pages, K, E, page], written by `kv_write` before attention reads it.
        value_pages: [num_pages, K, page, E], likewise.
        slot: [T] int64, where each new token's key and value go; see `kv_write`.
        page_table: [N, max_pages] int32; see `paged_attention`, as the next two.
        cu_query: [N + 1] int32.
        kv_len: [N] int32.
        theta: base of the rotary frequencies.
        eps: of both norms.
        batch_invariant: False takes the products on CUDA from cuBLAS; see `linear`.

    Returns:
        [T, D], dtype of ``x``: bit for bit what `decoder_layer` gives the same tokens, if batch-invariant.

    Raises:
        ValueError: wrong shape or value, the argument named; pages may have been written.
        TypeError: wrong dtype.

    Source:
        Kwon et al. 2023, arXiv:2309.06180.
    """
    return _ops.decoder_layer_paged(
        x, *weights, position, key_pages, value_pages, slot, page_table, cu_query, kv_len, theta, eps,
        batch_invariant,
    )  # fmt: skip


# ---------------------------------------------------------------- adamw


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_norm: float = float("inf"),
    master_low: Sequence[Tensor] = (),
) -> float:
    """Clip the gradients of all parameters by their global norm and take one AdamW step, in place.

    The step is that of ``torch.optim.AdamW`` after ``torch.nn.utils.clip_grad_norm_``; the gradients
    themselves are not changed.

    Args:
        params: P >= 1 tensors, each float32, bfloat16 or float64, contiguous; written.
        grads: their gradients, shape and dtype of the parameters, contiguous.
        exp_avg: running means of the gradients, likewise; written.
        exp_avg_sq: running means of their squares, likewise; written.
        steps: [] float32 each, steps taken so far; 1 is added.
        lr: learning rate; finite, >= 0.
        betas: decay of the running means, each in [0, 1).
        eps: finite, > 0.
        weight_decay: decoupled; finite, >= 0.
        clip_norm: bound of the global norm; > 0.
        master_low: [] for the above; or, for P bfloat16 parameters, the lower 16 bits of their float32 master weights,
            int16 and of their shapes; written.  A master is ``(parameter's bits << 16) + low``, so 0 makes it the
            parameter.  The step is then exactly that of the master as a float32 parameter, with exp_avg and
            exp_avg_sq float32 and each gradient float32 or bfloat16; the parameter is the master rounded to nearest,
            ties away from zero.

    Returns:
        The global norm before clipping, added in float64 and the same for any number of threads.  Where it
        is not finite nothing is written.  On CUDA reading it waits for the step, once.

    Raises:
        ValueError: lists of different lengths, wrong shape, not contiguous, or a bad number.
        TypeError: wrong dtype.

    Source:
        Loshchilov and Hutter 2019, arXiv:1711.05101; master weights: Micikevicius et al. 2018, arXiv:1710.03740.
    """
    return float(_ops.adamw(params, grads, exp_avg, exp_avg_sq, steps, master_low, lr, *betas, eps, weight_decay, clip_norm))
