"""The decoder of Qwen2.5, Llama 3, Qwen3 and Mistral over packed tokens, for sampling and for training alike.

T packed tokens, D width, F feed-forward width, H query heads, K key/value heads, E head width, V vocabulary.

There is no padding and no second definition: rollout calls the model with sequences that lie in KV pages,
training with packed ones, and both use the same ops, whose rows do not depend on the batch. So the log-prob that
sampling returns is, bit for bit, the one that training recomputes.

A family is three settings of `ModelConfig`: qkv_bias, qk_norm and rope_scaling.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo_engine import ops
from grpo_engine.model.config import ModelConfig, RopeScaling


@functools.lru_cache
@torch.inference_mode(False)  # a rollout may be the first to ask, and training keeps it for the backward pass
def rope_frequencies(theta: float, head_dim: int, scaling: RopeScaling, device: torch.device) -> Tensor:
    """[E/2] float32, radians a token, in the float32 steps in which transformers takes them.

    One tensor for each device, so that a CUDA graph finds it where it was.
    """
    index = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    plain = 1.0 / theta**index
    wavelength = 2 * math.pi / plain
    reach = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = (reach / wavelength - low) / (high - low)  # of the plain frequency
    mixed = (1 - share) * plain / scaling.factor + share * plain
    slow = torch.where(wavelength > reach / low, plain / scaling.factor, plain)
    between = (wavelength >= reach / high) & (wavelength <= reach / low)
    return torch.where(between, mixed, slow).to(device)


class Sequences(Protocol):
    """Where the sequences of a batch lie, and so how its tokens meet: packed, or in KV pages."""

    def layer(self, index: int, layer: Layer, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        """Layer `index` on the stream x_TD: [T, D]."""
        ...


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [T, H, E], k and v [T, K, E] -> [T, H, E]


class Layer(nn.Module):
    """The weights of one decoder layer, under the names of `ops.LayerWeights`, with q_norm and k_norm [E] or without.

    The fused op is Qwen2.5's and Llama's. What has norms of heads (Qwen3) or stretched rotary frequencies (Llama 3)
    composes the single ops (`by_single_ops`), in sampling and in training, so that both make the same bits; it costs
    dispatches and passes through memory.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, batch_invariant: bool) -> None:
        super().__init__()
        self.batch_invariant = batch_invariant
        H, K, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        D, F = config.hidden_size, config.intermediate_size
        self.kv_heads, self.head_dim = K, E
        self.scale = 1.0 / math.sqrt(E)  # of attention scores
        self.theta, self.eps = config.rope_theta, config.rms_norm_eps
        self.rope_scaling = config.rope_scaling
        self.fused = config.fused
        shapes = ops.LayerWeights(
            attn_norm=(D,),
            qkv_weight=((H + 2 * K) * E, D),
            qkv_bias=((H + 2 * K) * E,) if config.qkv_bias else None,
            out_weight=(D, H * E),
            mlp_norm=(D,),
            gate_up_weight=(2 * F, D),
            down_weight=(D, F),
        )
        norms = {name: (E,) if config.qk_norm else None for name in ("q_norm", "k_norm")}
        for name, shape in (shapes._asdict() | norms).items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, dtype=dtype)))

    @property
    def weights(self) -> ops.LayerWeights:
        """Of a fused layer."""
        return ops.LayerWeights(**{name: self._parameters[name] for name in ops.LayerWeights._fields})

    def by_single_ops(self, x_TD: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """The layer as `ops.decoder_layer` defines it, with what this family has besides.

        Args:
            x_TD: [T, D], the stream.
            positions_T: [T] int64.
            attend: how the tokens meet.

        Returns:
            [T, D]; differentiable where attend is.
        """
        K, E = self.kv_heads, self.head_dim
        linear = functools.partial(ops.linear, batch_invariant=self.batch_invariant)
        h_TD = ops.rms_norm(x_TD, self.attn_norm, eps=self.eps)
        heads = linear(h_TD, self.qkv_weight, self.qkv_bias).view(x_TD.shape[0], -1, E)
        query, key, value = heads.split([heads.shape[1] - 2 * K, K, K], dim=1)
        attn = attend(self._turned(query, self.q_norm, positions_T), self._turned(key, self.k_norm, positions_T), value)
        out_TD = linear(attn.flatten(1), self.out_weight)
        h_TD, x_TD = ops.rms_norm(out_TD, self.mlp_norm, eps=self.eps, residual=x_TD)
        return x_TD + linear(ops.swiglu(linear(h_TD, self.gate_up_weight)), self.down_weight)

    def _turned(self, heads_THE: Tensor, norm: Tensor | None, positions_T: Tensor) -> Tensor:
        if norm is not None:
            rows = heads_THE.reshape(-1, self.head_dim)
            heads_THE = ops.rms_norm(rows, norm, eps=self.eps).view(heads_THE.shape)
        frequency = None
        if self.rope_scaling is not None:
            frequency = rope_frequencies(self.theta, self.head_dim, self.rope_scaling, heads_THE.device)
        return ops.rope(heads_THE, positions_T, theta=self.theta, frequency=frequency)


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
            # a layer samples nothing, so there is no state of a generator to put back
            return checkpoint(self._layer, layer, x_TD, positions_T, use_reentrant=False, preserve_rng_state=False)
        return self._layer(layer, x_TD, positions_T)

    def _layer(self, layer: Layer, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        if not layer.fused:
            attend = functools.partial(
                ops.ragged_attention, cu_seqlens=self.cu_seqlens, scale=layer.scale, cu_groups=self.cu_groups
            )
            return layer.by_single_ops(x_TD, positions_T, attend)
        return ops.decoder_layer(
            x_TD, layer.weights, positions_T, self.cu_seqlens, cu_groups=self.cu_groups,
            num_kv_heads=layer.kv_heads, head_dim=layer.head_dim, theta=layer.theta, eps=layer.eps,
            batch_invariant=layer.batch_invariant,
        )  # fmt: skip


class Model(nn.Module):
    """The decoder and its head. Parameter names and their Hugging Face counterparts: `grpo_engine.model.weights`.

    batch_invariant=False lets products on CUDA use cuBLAS (`ops.linear`): sampling and training then differ in bits.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, batch_invariant: bool = True) -> None:
        super().__init__()
        self.config = config
        self.batch_invariant = batch_invariant
        # a weight that is given is not drawn
        weight = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(Layer(config, dtype, batch_invariant) for _ in range(config.num_hidden_layers))
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
            sequences: `Packed` for training; `grpo_engine.rollout.engine` has those in KV pages.

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
        return ops.linear(hidden_BD, self.head_weight, out_dtype=torch.float32, batch_invariant=self.batch_invariant)

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
        return ops.token_logprob(
            hidden_RD, self.head_weight, target, temperature=temperature, batch_invariant=self.batch_invariant
        )


def _select_rows(x_TD: Tensor, rows: Tensor) -> Tensor:
    # responses share their prompt's last row: its gradient is a sum, which index_select on CUDA makes by atomics, unordered
    return nn.functional.embedding(rows, x_TD) if x_TD.is_cuda else x_TD.index_select(0, rows)


def packed_positions(cu_seqlens: Tensor) -> Tensor:
    """[T] int64, the position of each packed token in its own sequence."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
    return torch.arange(starts.numel(), device=cu_seqlens.device) - starts
