"""The Qwen2.5 decoder over packed tokens, for sampling and for training alike.

T packed tokens, D width, F feed-forward width, H query heads, K key/value heads, E head width, V vocabulary.

There is no padding and no second definition: rollout calls the model with sequences that lie in KV pages,
training with packed ones, and both use the same ops, whose rows do not depend on the batch. So the log-prob that
sampling returns is, bit for bit, the one that training recomputes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo_engine import ops


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


class Sequences(Protocol):
    """Where the sequences of a batch lie, and so how its tokens meet: packed, or in KV pages."""

    def layer(self, index: int, layer: Layer, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        """Layer `index` on the stream x_TD: [T, D]."""
        ...


class Layer(nn.Module):
    """The weights of one decoder layer, under the names of `ops.LayerWeights`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        H, K, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        D, F = config.hidden_size, config.intermediate_size
        self.kv_heads, self.head_dim = K, E
        self.theta, self.eps = config.rope_theta, config.rms_norm_eps
        shapes = ops.LayerWeights(
            attn_norm=(D,),
            qkv_weight=((H + 2 * K) * E, D),
            qkv_bias=((H + 2 * K) * E,),
            out_weight=(D, H * E),
            mlp_norm=(D,),
            gate_up_weight=(2 * F, D),
            down_weight=(D, F),
        )
        for name, shape in shapes._asdict().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))

    @property
    def weights(self) -> ops.LayerWeights:
        return ops.LayerWeights(**self._parameters)


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences laid end to end, each seeing itself alone or, in a group, its group's prompt before it.

    cu_seqlens [N+1] int32; cu_groups [M+1] int32 in sequences, or None: see `ops.ragged_attention`. With
    activation_checkpointing a layer keeps its input alone and is computed again in the backward pass, to the same bits.
    """

    cu_seqlens: Tensor
    cu_groups: Tensor | None = None
    activation_checkpointing: bool = False

    def layer(self, index: int, layer: Layer, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        """See `Sequences`."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            # a layer draws nothing, so there is no state of a generator to put back
            return checkpoint(self._layer, layer, x_TD, positions_T, use_reentrant=False, preserve_rng_state=False)
        return self._layer(layer, x_TD, positions_T)

    def _layer(self, layer: Layer, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        return ops.decoder_layer(
            x_TD, layer.weights, positions_T, self.cu_seqlens, cu_groups=self.cu_groups,
            num_kv_heads=layer.kv_heads, head_dim=layer.head_dim, theta=layer.theta, eps=layer.eps,
        )  # fmt: skip


class Model(nn.Module):
    """The decoder and its head. Parameter names and their Hugging Face counterparts: `grpo_engine.weights`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        # a weight that is given is not drawn
        weight = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(Layer(config, dtype) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype))
        tied = config.tie_word_embeddings
        self.head = None if tied else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))

    @torch.no_grad()
    def init_weights(self, seed: int, *, std: float | None = 0.02) -> Model:
        """Draws all weights anew: normal matrices, zero biases, norms of one.

        The two projections into the stream are scaled by 1 / sqrt(2 layers) besides.

        Args:
            seed: of the draw, on the CPU; the same seed gives the same bits on every device.
            std: of a matrix's elements; None: 1 / sqrt(inputs). The usual 0.02 is meant for widths in the hundreds
                and above; at 16 to 160 it starves the first thousand steps.

        Returns:
            self.
        """
        cpu = torch.device("cpu")
        generator = torch.Generator(device=cpu).manual_seed(seed)
        into_stream = 1.0 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = into_stream if name.endswith(("out_weight", "down_weight")) else 1.0
                scale = scale / math.sqrt(p.shape[1]) if std is None else scale * std
                p.copy_(torch.randn(p.shape, generator=generator, device=cpu) * scale)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.fill_(1.0)
        return self

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the embedding itself when tied."""
        return self.embed.weight if self.head is None else self.head

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @functools.cached_property
    def num_parameters(self) -> int:
        """All weights, the tied head once."""
        return sum(p.numel() for p in self.parameters())

    @functools.cached_property
    def num_non_embedding(self) -> int:
        """N of the scaling laws: all weights but the embedding and the head."""
        outside = self.embed.weight.numel() + (0 if self.head is None else self.head.numel())
        return self.num_parameters - outside

    def forward(self, tokens_T: Tensor, positions_T: Tensor, sequences: Sequences) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens_T: [T] int64, packed sequences; each id in [0, V).
            positions_T: [T] int64, 0 at the start of each sequence.
            sequences: `Packed` for training; `grpo_engine.rollout` has those in KV pages.

        Returns:
            [T, D] of the model's dtype, differentiable in the weights.

        Raises:
            ValueError, TypeError: from the ops, naming what was wanted.
        """
        x_TD = nn.functional.embedding(tokens_T, self.embed.weight)
        for i, layer in enumerate(self.layers):
            x_TD = sequences.layer(i, layer, x_TD, positions_T)
        return ops.rms_norm(x_TD, self.final_norm, eps=self.config.rms_norm_eps)

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """[B, V] float32 logits of some hidden states; the log-probs of training never hold these for all tokens."""
        return ops.linear(hidden_BD, self.head_weight, out_dtype=torch.float32)

    def logprobs(
        self,
        tokens_T: Tensor,
        cu_seqlens: Tensor,
        *,
        cu_groups: Tensor | None = None,
        rows: Tensor | None = None,
        target: Tensor | None = None,
        positions_T: Tensor | None = None,
        temperature: float = 1.0,
        activation_checkpointing: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of given tokens, without a [T, V] tensor.

        Args:
            tokens_T: [T] int64, packed inputs.
            cu_seqlens: [N+1] int32, starts of the sequences.
            cu_groups: [M+1] int32, groups of sequences that share a prompt; see `Packed`.
            rows: [R] int64, which hidden states to score; default: all but each sequence's last.
            target: [R] int64, the token that each of those rows predicts; default: the token after the row.
            positions_T: [T] int64; default: counted from each sequence's start, which is right without groups.
            temperature: the logits are divided by it.
            activation_checkpointing: less memory, a third more work, the same bits; see `Packed`.

        Returns:
            (logprob [R] float32, entropy [R] float32), natural log, nats; differentiable.

        Raises:
            ValueError: rows without target or the other way round, and what the ops raise.
        """
        if (rows is None) != (target is None):
            raise ValueError("logprobs: rows and target go together, got only one of them")
        if positions_T is None:
            positions_T = packed_positions(cu_seqlens)
        hidden_TD = self(tokens_T, positions_T, Packed(cu_seqlens, cu_groups, activation_checkpointing))
        if rows is None:
            keep = torch.ones(tokens_T.numel(), dtype=torch.bool, device=tokens_T.device)
            keep[cu_seqlens[1:].long() - 1] = False
            rows = keep.nonzero().squeeze(1)
            target = tokens_T[rows + 1]
        hidden_RD = _select_rows(hidden_TD, rows)
        return ops.token_logprob(hidden_RD, self.head_weight, target, temperature=temperature)


def _select_rows(x_TD: Tensor, rows: Tensor) -> Tensor:
    # answers share their prompt's last row: its gradient is a sum, which index_select on CUDA makes by atomics, in any order
    return nn.functional.embedding(rows, x_TD) if x_TD.is_cuda else x_TD.index_select(0, rows)


def packed_positions(cu_seqlens: Tensor) -> Tensor:
    """[T] int64, the place of each packed token in its own sequence."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
    return torch.arange(starts.numel(), device=cu_seqlens.device) - starts
