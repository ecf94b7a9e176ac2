"""Small models for tests: ours with random weights, and the same as Hugging Face's."""

from pathlib import Path

import torch

from grpo_engine.model import weights
from grpo_engine.model.config import ModelConfig
from grpo_engine.model.decoder import Model
from grpo_engine.model.tokenizer import train_bpe


def small_config(*, heads: int = 4, kv_heads: int = 2, tied: bool = True, vocab: int = 97, head_dim: int = 8):
    return ModelConfig(
        vocab_size=vocab, hidden_size=heads * head_dim, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        tie_word_embeddings=tied, max_position_embeddings=256,
    )  # fmt: skip


def random_model(config: ModelConfig | None = None, *, seed: int = 0, scale: float = 8.0, dtype=torch.float32) -> Model:
    """Weights larger than at initialisation, so that distributions are far from uniform; biases are not zero."""
    model = Model(config or small_config()).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale if p.dim() == 2 else 1.0)
            if p.dim() == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def qwen2_config(*, vocab: int, width: int, layers: int, heads: int, positions: int):
    """Of transformers."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=positions,
        tie_word_embeddings=True,
    )  # fmt: skip


def save_qwen2(folder: Path, texts: list[str], *, vocab: int, width: int, layers: int, heads: int, positions: int) -> Path:
    """A random checkpoint as transformers saves it, with a tokenizer trained on the texts."""
    from transformers import Qwen2ForCausalLM

    config = qwen2_config(vocab=vocab, width=width, layers=layers, heads=heads, positions=positions)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    train_bpe(texts, vocab_size=vocab, folder=folder)
    return folder


def as_transformers(model: Model, folder: Path):
    """The same weights in transformers, by way of a checkpoint on disk."""
    from transformers import AutoModelForCausalLM

    weights.save_checkpoint(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
