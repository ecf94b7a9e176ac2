"""Shapes that the benchmarks share: the embedded ladder, Qwen2.5-0.5B, and lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_engine.ledger import causal_pairs, forward_flops
from grpo_engine.model import Model, ModelConfig

LADDER_VOCABULARY = 128
# non-embedding parameters -> width, layers, query heads, kv heads, feed-forward width
LADDER = {
    "0.025M": (32, 2, 2, 1, 80),
    "0.2M": (64, 4, 4, 2, 192),
    "0.8M": (128, 4, 4, 2, 384),
    "3.2M": (256, 4, 8, 2, 768),
    "10.6M": (384, 6, 6, 2, 1152),
}
QWEN_VOCABULARY = 151_936


def ladder_config(size: str, *, vocabulary: int = LADDER_VOCABULARY, positions: int = 1024) -> ModelConfig:
    """A model of the embedded ladder."""
    width, layers, heads, kv_heads, ffn = LADDER[size]
    return ModelConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width // heads,
        max_position_embeddings=positions,
    )  # fmt: skip


def qwen_config() -> ModelConfig:
    """Qwen2.5-0.5B."""
    return ModelConfig(
        vocab_size=QWEN_VOCABULARY, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip


def equal_lengths(count: int, length: int) -> list[int]:
    return [length] * count


def log_normal_lengths(count: int, mean: int, *, seed: int = 0, longest: int = 8) -> list[int]:
    """Lengths whose longest is `longest` times their median and whose sum is about count * mean.

    Args:
        count: how many, at least 8.
        mean: target of their mean.
        seed: of the draw.
        longest: the longest over the median.

    Returns:
        Lengths >= 1, in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, generator=generator, dtype=torch.float64)
    z = z - z.median()
    spread = torch.log(torch.tensor(float(longest), dtype=torch.float64)) / z.max()
    shape = torch.exp(spread * z)
    scale = count * mean / shape.sum()
    return (shape * scale).round().clamp(min=1).long().tolist()


def cumulative(lengths: list[int]) -> Tensor:
    """[N+1] int32, start of each sequence, then the total."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def sequence_flops(model: Model, lengths: list[int], *, head_rows: int) -> float:
    """FLOPs of one forward pass over packed sequences."""
    pairs = sum(causal_pairs(n) for n in lengths)
    return forward_flops(model, tokens=sum(lengths), pairs=pairs, head_rows=head_rows)
