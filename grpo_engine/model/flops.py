"""FLOPs of a forward pass, from shapes alone. One multiply-add counts as two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_engine.model.config import ModelConfig

if TYPE_CHECKING:
    from grpo_engine.model.decoder import Model


def forward_flops(model: Model, *, tokens: int, pairs: int, head_rows: int) -> float:
    """FLOPs of one forward pass.

    Args:
        model: whose matrices are multiplied.
        tokens: T, tokens that go through the layers.
        pairs: query-key pairs of the attention, summed over sequences (see `causal_pairs`).
        head_rows: hidden states that go through the head.

    Returns:
        ``2 N T + 4 L H E pairs + 2 D V head_rows`` with N the non-embedding parameters.
    """
    return shape_flops(model.config, model.num_non_embedding, tokens=tokens, pairs=pairs, head_rows=head_rows)


def shape_flops(c: ModelConfig, params: int, *, tokens: float, pairs: float, head_rows: float) -> float:
    """`forward_flops` of an architecture with so many non-embedding parameters."""
    attention = 4.0 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs
    head = 2.0 * c.hidden_size * c.vocab_size * head_rows
    return 2.0 * params * tokens + attention + head


def causal_pairs(length: int) -> int:
    """Query-key pairs of a causal sequence: each token sees itself and all before it."""
    return length * (length + 1) // 2
