"""The families of models, one row each, and the sizes of a decoder. No torch: plans and forecasts read them too."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What a model_type says about the arithmetic, and what its config.json implies without saying it.

    All families have RMSNorm with a weight, a SwiGLU with silu, rotary positions and causal attention over all tokens.
    """

    architecture: str  # transformers' class
    qkv_bias: bool = False  # biases of the query, key and value projections
    qk_norm: bool = False  # RMSNorm of each query and key head
    head_dim: int | None = None  # where config.json has none; None: width / heads
    max_position_embeddings: int  # likewise
    window: int | None = None  # sliding_window where config.json has none, and then it is refused; None: no such setting


FAMILIES = {  # by model_type
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True, max_position_embeddings=32768),
    "llama": Family(architecture="LlamaForCausalLM", max_position_embeddings=2048),
    "qwen3": Family(architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=128, max_position_embeddings=32768),
    "mistral": Family(architecture="MistralForCausalLM", max_position_embeddings=131072, window=4096),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama 3's longer reach: rotations slower than once in original / low_freq_factor tokens are slowed `factor` times.

    Those faster than once in original / high_freq_factor tokens stay, those between are mixed. Grattafiori et al. 2024,
    arXiv:2407.21783; rope_type "llama3" of Hugging Face's config.json, with its names.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"RopeScaling needs 0 < low_freq_factor < high_freq_factor, got {self.low_freq_factor} and "
                f"{self.high_freq_factor}"
            )
        if not (1 <= self.factor < math.inf and self.original_max_position_embeddings >= 1):
            raise ValueError(
                f"RopeScaling needs factor >= 1 and original_max_position_embeddings >= 1, got {self.factor} and "
                f"{self.original_max_position_embeddings}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes and family of a model, under the names of Hugging Face's config.json."""

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
    qkv_bias: bool = True  # Qwen2.5
    qk_norm: bool = False  # Qwen3: each head of q and k has a norm, before it is turned
    rope_scaling: RopeScaling | None = None  # Llama 3.1 and later
    model_type: str | None = field(default=None, compare=False)  # a key of FAMILIES, as it was read; None: see `family_of`

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name} must be >= 1, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"ModelConfig.num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig.head_dim must be even (rotary pairs), got {self.head_dim}")

    @property
    def fused(self) -> bool:
        """Whether a layer is the fused op's; see `Layer`."""
        return not self.qk_norm and self.rope_scaling is None


def family_of(config: ModelConfig) -> str:
    """The model_type of a configuration.

    Args:
        config: any.

    Returns:
        A key of `FAMILIES`: the one that it was read with, else the first with its qkv_bias and qk_norm.

    Raises:
        ValueError: no family has that combination of qkv_bias and qk_norm.
    """
    if config.model_type is not None:
        return config.model_type
    for name, family in FAMILIES.items():
        if (family.qkv_bias, family.qk_norm) == (config.qkv_bias, config.qk_norm):
            return name
    raise ValueError(f"no family has qkv_bias={config.qkv_bias} with qk_norm={config.qk_norm}")
