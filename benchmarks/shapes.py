"""Shapes that the benchmarks share: the embedded ladder, SmolLM2-135M, Qwen2.5, and lengths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_engine.model.config import ModelConfig
from grpo_engine.model.decoder import Model
from grpo_engine.model.flops import causal_pairs, forward_flops
from grpo_engine.train.optimizer import adamw

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
# Qwen2.5: width, feed-forward width, layers, query heads, kv heads, head width, whether the head is the embedding
QWEN = {
    "0.5B": (896, 4864, 24, 14, 2, 64, True),
    "1.5B": (1536, 8960, 28, 12, 2, 128, True),
    "7B": (3584, 18944, 28, 28, 4, 128, False),
}
SMOLLM_VOCABULARY = 49_152


def ladder_config(size: str, *, vocabulary: int = LADDER_VOCABULARY, positions: int = 1024) -> ModelConfig:
    """A model of the embedded ladder."""
    width, layers, heads, kv_heads, ffn = LADDER[size]
    return ModelConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width // heads,
        max_position_embeddings=positions,
    )  # fmt: skip


def qwen_config(size: str = "0.5B") -> ModelConfig:
    """A Qwen2.5 model."""
    width, ffn, layers, heads, kv_heads, head_dim, tied = QWEN[size]
    return ModelConfig(
        vocab_size=QWEN_VOCABULARY, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied,
    )  # fmt: skip


def smollm_config() -> ModelConfig:
    """SmolLM2-135M: a Llama, without bias, so that its layers are not the fused op's."""
    return ModelConfig(
        vocab_size=SMOLLM_VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, rope_theta=100_000.0, rms_norm_eps=1e-5,
        max_position_embeddings=8192, qkv_bias=False,
    )  # fmt: skip


REAL = {"135M": smollm_config, "0.5B": qwen_config}  # sizes of published checkpoints that a CPU trains


@torch.no_grad()
def random_model(config: ModelConfig, dtype: torch.dtype, *, seed: int = 1, **how: bool) -> Model:
    """A model on the current default device, drawn there: drawing 7B weights on a CPU takes minutes.

    Args:
        config: its sizes.
        dtype: of its weights.
        seed: of the draw.
        **how: further settings of the model.

    Returns:
        The model: matrices of standard deviation 0.02, zero biases, norms of one.
    """
    model = Model(config, dtype, **how)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.normal_(0.0, 0.02, generator=generator)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def optimizer_of(model: Model, lr: float) -> torch.optim.AdamW:
    """What `grpo_engine.train.optimizer.update` steps."""
    return adamw(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0)


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
    generator = torch.Generator(device="cpu").manual_seed(seed)  # the same lengths on every device
    z = torch.randn(count, generator=generator, dtype=torch.float64, device="cpu")
    z = z - z.median()
    spread = math.log(longest) / z.max()
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
