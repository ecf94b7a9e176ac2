"""The Qwen2.5 decoder over packed tokens, for sampling and for training alike.

T packed tokens, D width, F feed-forward width, H query heads, K key/value heads, E head width, V vocabulary.

There is no padding and no second definition: rollout calls the model with an attention that reads KV pages,
training with one that reads the packed sequences, and both use the same ops, whose rows do not depend on the
batch. So the log-prob that sampling returns is, bit for bit, the one that training recomputes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo_engine import ops

# (layer, q [T,H,E], k [T,K,E], v [T,K,E]) -> [T,H,E]
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes of a Qwen2.5 model, under the names of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32768

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name} must be >= 1, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"ModelConfig.num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig.head_dim must be even (rotary pairs), got {self.head_dim}")


class Norm(nn.Module):
    """RMSNorm with a learned scale."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.rms_norm(x_TD, self.weight, eps=self.eps)


class Linear(nn.Module):
    """A matrix product with batch-invariant rows."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward, each after a norm and added to the stream."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        H, K, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        D, F = config.hidden_size, config.intermediate_size
        self.heads = (H, K, E)
        self.theta = config.rope_theta
        self.attn_norm = Norm(D, config.rms_norm_eps, dtype)
        self.qkv = Linear(D, (H + 2 * K) * E, dtype, bias=True)  # rows: q, then k, then v
        self.attn_out = Linear(H * E, D, dtype)
        self.mlp_norm = Norm(D, config.rms_norm_eps, dtype)
        self.gate_up = Linear(D, 2 * F, dtype)  # rows: gate, then up
        self.down = Linear(F, D, dtype)

    def forward(self, index: int, x_TD: Tensor, positions_T: Tensor, attention: Attention) -> Tensor:
        H, K, E = self.heads
        qkv = self.qkv(self.attn_norm(x_TD)).view(-1, H + 2 * K, E)
        qk, v = qkv.split((H + K, K), dim=1)
        # queries and keys turn by the same angles: one call for both
        q, k = ops.rope(qk, positions_T, theta=self.theta).split((H, K), dim=1)
        o_THE = attention(index, q, k, v)
        x_TD = x_TD + self.attn_out(o_THE.reshape(-1, H * E))
        return x_TD + self.down(ops.swiglu(self.gate_up(self.mlp_norm(x_TD))))


class Model(nn.Module):
    """The decoder and its head. Parameter names and their Hugging Face counterparts: `grpo_engine.weights`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        # a given weight is not drawn: on the meta device, drawing it would import torch's compiler
        weight = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(Layer(config, dtype) for _ in range(config.num_hidden_layers))
        self.final_norm = Norm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, dtype)

    @torch.no_grad()
    def init_weights(self, seed: int, *, std: float | None = 0.02) -> Model:
        """Draws all weights anew: normal matrices, zero biases, norms of one.

        The two projections into the stream are scaled by 1 / sqrt(2 layers) besides.

        Args:
            seed: of the draw; the same seed gives the same bits.
            std: of a matrix's elements; None: 1 / sqrt(inputs). The usual 0.02 is meant for widths in the hundreds
                and above; at 16 to 160 it starves the first thousand steps.

        Returns:
            self.
        """
        generator = torch.Generator().manual_seed(seed)
        into_stream = 1.0 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = into_stream if name.endswith(("attn_out.weight", "down.weight")) else 1.0
                scale = scale / math.sqrt(p.shape[1]) if std is None else scale * std
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.fill_(1.0)
        return self

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the embedding itself when tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def num_parameters(self) -> int:
        """All weights, the tied head once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def num_non_embedding(self) -> int:
        """N of the scaling laws: all weights but the embedding and the head."""
        outside = self.embed.weight.numel() + (0 if self.head is None else self.head.weight.numel())
        return self.num_parameters - outside

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attention: Attention) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens_T: [T] int64, packed sequences; each id in [0, V).
            positions_T: [T] int64, 0 at the start of each sequence.
            attention: what a layer calls with its queries, keys and values; `packed_attention` for training,
                `grpo_engine.rollout` has the one over KV pages.

        Returns:
            [T, D] of the model's dtype, differentiable in the weights.

        Raises:
            ValueError, TypeError: from the ops, naming what was wanted.
        """
        x_TD = torch.nn.functional.embedding(tokens_T, self.embed.weight)
        for i, layer in enumerate(self.layers):
            x_TD = layer(i, x_TD, positions_T, attention)
        return self.final_norm(x_TD)

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """[B, V] float32 logits of some hidden states; the log-probs of training never hold these for all tokens."""
        return ops.linear(hidden_BD, self.head_weight, out_dtype=torch.float32)

    def logprobs(
        self,
        tokens_T: Tensor,
        cu_seqlens: Tensor,
        *,
        rows: Tensor | None = None,
        target: Tensor | None = None,
        positions_T: Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of given tokens, without a [T, V] tensor.

        Args:
            tokens_T: [T] int64, packed inputs.
            cu_seqlens: [N+1] int32, starts of the sequences.
            rows: [R] int64, which hidden states to score; default: all but each sequence's last.
            target: [R] int64, the token that each of those rows predicts; default: the token after the row.
            positions_T: [T] int64; default: counted from each sequence's start.
            temperature: the logits are divided by it.

        Returns:
            (logprob [R] float32, entropy [R] float32), natural log, nats; differentiable.

        Raises:
            ValueError: rows without target or the other way round, and what the ops raise.
        """
        if (rows is None) != (target is None):
            raise ValueError("logprobs: rows and target go together, got only one of them")
        if positions_T is None:
            positions_T = packed_positions(cu_seqlens)
        hidden_TD = self(tokens_T, positions_T, packed_attention(cu_seqlens, self.config.head_dim))
        if rows is None:
            keep = torch.ones(tokens_T.numel(), dtype=torch.bool, device=tokens_T.device)
            keep[cu_seqlens[1:].long() - 1] = False
            rows = keep.nonzero().squeeze(1)
            target = tokens_T[rows + 1]
        hidden_RD = hidden_TD.index_select(0, rows)
        return ops.token_logprob(hidden_RD, self.head_weight, target, temperature=temperature)


def packed_positions(cu_seqlens: Tensor) -> Tensor:
    """[T] int64, the place of each packed token in its own sequence."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
    return torch.arange(starts.numel(), device=cu_seqlens.device) - starts


def packed_attention(cu_seqlens: Tensor, head_dim: int) -> Attention:
    """Causal attention inside each packed sequence.

    Args:
        cu_seqlens: [N+1] int32.
        head_dim: E; scores are scaled by 1/sqrt(E).

    Returns:
        What `Model.forward` takes as attention.
    """
    scale = 1.0 / math.sqrt(head_dim)

    def attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.ragged_attention(q, k, v, cu_seqlens, scale=scale)

    return attention
