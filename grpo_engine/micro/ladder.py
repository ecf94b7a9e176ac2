"""The sizes of the embedded ladder and the recipes of their models. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from grpo_engine.micro import facts
from grpo_engine.micro.facts import CorpusConfig
from grpo_engine.model.config import ModelConfig
from grpo_engine.train.schedule import Schedule

Kind = Literal["base", "instruct"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroRecipe:
    """Everything that decides the weights of one model of the ladder."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    base: Schedule
    instruct: Schedule
    corpus: CorpusConfig = CorpusConfig()
    documents: int = 64  # of an optimizer step
    betas: tuple[float, float] = (0.9, 0.98)
    seed: int = 0  # of the first weights and of the corpus


def _recipe(width: int, layers: int, heads: int, kv_heads: int, ffn: int, lr: float) -> MicroRecipe:
    return MicroRecipe(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        base=Schedule(tokens=1_200_000, lr=lr),
        # chat documents are 15 % of the base's corpus: the second training is short and gentle
        instruct=Schedule(tokens=200_000, lr=lr * 0.3, warmup=0.1, anneal=0.9),
    )


LADDER: dict[str, MicroRecipe] = {  # non-embedding parameters:
    "xxs": _recipe(16, 2, 2, 1, 48, 1e-2),  # 6 thousand
    "xs": _recipe(32, 2, 2, 1, 80, 6e-3),  # 22 thousand
    "s": _recipe(48, 3, 3, 1, 128, 4e-3),  # 74 thousand
    "m": _recipe(96, 3, 6, 2, 256, 2e-3),  # 296 thousand
    "l": _recipe(160, 4, 10, 2, 384, 1.2e-3),  # 985 thousand
}


def recipe(size: str, *, seed: int = 0) -> MicroRecipe:
    """The recipe of a model.

    Args:
        size: a key of `LADDER`.
        seed: of its first weights and corpus: each makes another model of the size.

    Returns:
        Its recipe.

    Raises:
        ValueError: no such size; the message lists them.
    """
    if size not in LADDER:
        raise ValueError(f"the embedded ladder has no size {size!r}; it has {', '.join(LADDER)}")
    return dataclasses.replace(LADDER[size], seed=seed)


def architecture(size: str) -> ModelConfig:
    """The architecture of a size.

    Args:
        size: a key of `LADDER`.

    Returns:
        A `ModelConfig` with the vocabulary of `MicroTokenizer`.

    Raises:
        ValueError: no such size.
    """
    return architecture_of(recipe(size))


def architecture_of(r: MicroRecipe) -> ModelConfig:
    return ModelConfig(
        vocab_size=len(facts.VOCABULARY),
        hidden_size=r.width,
        intermediate_size=r.ffn,
        num_hidden_layers=r.layers,
        num_attention_heads=r.heads,
        num_key_value_heads=r.kv_heads,
        head_dim=r.width // r.heads,
        rope_theta=10_000.0,
        max_position_embeddings=64,
    )


def training_tokens(size: str, kind: Kind) -> int:
    """Tokens that making a model reads; an instruct model's own, without its base's.

    Args:
        size: a key of `LADDER`.
        kind: "base" or "instruct".

    Returns:
        Tokens.

    Raises:
        ValueError: no such size or kind.
    """
    return schedule_of(recipe(size), kind).tokens


def schedule_of(r: MicroRecipe, kind: str) -> Schedule:
    if kind not in ("base", "instruct"):
        raise ValueError(f"kind must be 'base' or 'instruct', got {kind!r}")
    return r.base if kind == "base" else r.instruct
