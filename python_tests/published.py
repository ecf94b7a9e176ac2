"""config.json of published models, as their pages have it."""

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
         "head_dim", "vocab_size", "tie_word_embeddings")  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
PUBLISHED = {
    "Qwen2.5-0.5B": ("qwen2", 24, 896, 4864, 14, 2, None, 151936, True),
    "Qwen2.5-1.5B": ("qwen2", 28, 1536, 8960, 12, 2, None, 151936, True),
    "Qwen2.5-3B": ("qwen2", 36, 2048, 11008, 16, 2, None, 151936, True),
    "Qwen2.5-7B": ("qwen2", 28, 3584, 18944, 28, 4, None, 152064, False),
    "Qwen2.5-14B": ("qwen2", 48, 5120, 13824, 40, 8, None, 152064, False),
    "Qwen2.5-32B": ("qwen2", 64, 5120, 27648, 40, 8, None, 152064, False),
    "Qwen2.5-72B": ("qwen2", 80, 8192, 29568, 64, 8, None, 152064, False),
    "Llama-3.2-1B": ("llama", 16, 2048, 8192, 32, 8, 64, 128256, True),
    "Llama-3.2-3B": ("llama", 28, 3072, 8192, 24, 8, 128, 128256, True),
    "Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 8, None, 128256, False),
    "Qwen3-0.6B": ("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True),
    "Qwen3-8B": ("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False),
}


def published(name: str) -> dict:
    """The fields that decide what a model of `PUBLISHED` computes."""
    kind, *sizes = PUBLISHED[name]
    raw = {"model_type": kind, **{k: v for k, v in zip(SIZES, sizes, strict=True) if v is not None}}
    if kind == "llama":
        return raw | {"rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072,
                      "rope_scaling": LLAMA3 | {"factor": 8.0 if "3.1" in name else 32.0}}  # fmt: skip
    return raw | {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}
