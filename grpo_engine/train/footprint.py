"""What a run holds in memory, from shapes, before anything is allocated: docs/memory.md.

Plans read it (`grpo_engine.study.forecast`), and `train` refuses a run that cannot fit.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_engine.config import RunConfig, apply_overrides
from grpo_engine.system.memory import free_bytes

if TYPE_CHECKING:
    from grpo_engine.model.config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}
ROOM = 0.9  # of a device's memory that a run may fill: the rest is for buffers of a moment and what lies between blocks
SWITCH = "GRPO_ENGINE_MEMORY_CHECK"  # 0: a run that is too large is tried all the same


def count_params(model: ModelConfig) -> tuple[int, int]:
    """(non-embedding parameters, all parameters) of an architecture; the tied head counts once."""
    D, F, E = model.hidden_size, model.intermediate_size, model.head_dim
    H, K = model.num_attention_heads, model.num_key_value_heads
    qkv = (D + model.qkv_bias) * (H + 2 * K) * E
    layer = qkv + H * E * D + 3 * D * F + 2 * D + 2 * E * model.qk_norm
    inside = model.num_hidden_layers * layer + D
    return inside, inside + model.vocab_size * D * (1 if model.tie_word_embeddings else 2)


@dataclass(frozen=True, slots=True)
class Shapes:
    """An architecture as bytes; of an unknown one N alone counts."""

    model: ModelConfig | None
    params: int  # non-embedding
    size: int  # bytes of an element

    @property
    def weight_bytes(self) -> float:
        return float(self.size * (count_params(self.model)[1] if self.model else self.params))

    @property
    def kv_bytes(self) -> float:
        """Of one token."""
        m = self.model
        return 2.0 * self.size * m.num_hidden_layers * m.num_key_value_heads * m.head_dim if m else 0.0

    @property
    def head_bytes(self) -> float:
        """Of the head's weight, and so of its gradient in one micro-batch: a tied one waits for the embedding's."""
        return float(self.size * self.model.vocab_size * self.model.hidden_size) if self.model else 0.0

    @property
    def logit_bytes(self) -> float:
        """Of one row."""
        return 4.0 * self.model.vocab_size if self.model else 0.0

    def activation_bytes(self, checkpointing: bool) -> float:
        """Of one token of a micro-batch, at the most."""
        if self.model is None:
            return 0.0
        m = self.model
        D, F, E = m.hidden_size, m.intermediate_size, m.head_dim
        H, K = m.num_attention_heads, m.num_key_value_heads
        layer = self.size * (2 * D + (2 * H + 2 * K) * E + 2 * F) + 4 * (2 * H + 2)
        if not m.fused:  # both norms' results, turned queries and keys, the activation; normed heads, copied and not
            layer += self.size * (2 * D + (H + K) * E * (3 if m.qk_norm else 1) + F) + 4 * (H + K) * m.qk_norm
        kept = self.size * D if checkpointing else layer
        whole = 3 if checkpointing else 2  # a layer's backward pass, and what is computed again for it
        return float(m.num_hidden_layers * kept + whole * layer)


def memory(config: RunConfig, shapes: Shapes, prompt_tokens: float, response_tokens: float) -> dict[str, float]:
    """Bytes by what they hold, at the most.

    Args:
        config: of the run.
        shapes: of its model.
        prompt_tokens: a prompt.
        response_tokens: tokens of a response; pages are for `rollout.max_new_tokens` whatever this is.

    Returns:
        "weights", "gradients", "optimizer", "head gradient", "activations" and what else the run has: "reference", "KV",
        "logits".
    """
    grpo = config.method == "grpo"
    wide = shapes.weight_bytes * 4 / shapes.size  # gradients and moments are float32 whatever the weights are
    master = shapes.weight_bytes if shapes.size == 2 else 0.0  # the lower half of a float32 master
    out = {"weights": shapes.weight_bytes, "gradients": wide, "optimizer": 2 * wide + master}
    if grpo and config.loss.kl_coef > 0:
        out["reference"] = shapes.weight_bytes
    r, sequences = config.rollout, config.batch.prompts * config.batch.group_size
    most = sequences
    if config.evaluation.count:  # responses to a set, at least
        most = max(most, (config.task.eval_problems or 500) * (config.evaluation.samples + config.evaluation.greedy))
    running = min(r.max_running, most)
    pages = r.num_pages or (running + 1) * -(-round(prompt_tokens + r.max_new_tokens) // r.page_size)
    out["KV"] = pages * r.page_size * shapes.kv_bytes if grpo else 0.0
    out["logits"] = running * shapes.logit_bytes if grpo else 0.0
    sequence = prompt_tokens + response_tokens
    tokens = min(max(config.batch.tokens_per_micro_batch, sequence), sequences * sequence)
    out["head gradient"] = shapes.head_bytes
    out["activations"] = tokens * shapes.activation_bytes(config.batch.activation_checkpointing)
    return out


def peak_bytes(held: Mapping[str, float], *, pages_stay: bool = False) -> float:
    """The most memory at a time: keys and values are there while responses are sampled, gradients while it trains.

    Args:
        held: of `memory`.
        pages_stay: keys and values are there all the time.
    """
    rest = dict(held)
    pages, logits = rest.pop("KV", 0.0), rest.pop("logits", 0.0)
    training = sum(rest.pop(name, 0.0) for name in ("gradients", "head gradient", "activations"))
    return sum(rest.values()) + (pages + max(logits, training) if pages_stay else max(pages + logits, training))


def require_room(config: RunConfig, model: ModelConfig, prompt_tokens: int) -> bool:
    """Refuses a run that cannot fit into what is free now; nothing is allocated.

    Args:
        config: of the run; its device is resolved.
        model: its architecture.
        prompt_tokens: its longest prompt.

    Returns:
        Whether pages may stay beside training; else the two take turns.

    Raises:
        ValueError: it does not fit, and GRPO_ENGINE_MEMORY_CHECK is not 0. The message says what would be held, and up
            to three settings with which it would fit.
    """
    free = free_bytes(config.device)

    def held(c: RunConfig) -> dict[str, float]:
        shapes = Shapes(model, count_params(model)[0], BYTES[c.model.dtype])
        return memory(c, shapes, prompt_tokens, c.rollout.max_new_tokens)

    if free is None:
        return True
    room = ROOM * free
    if peak_bytes(held(config)) > room and os.environ.get(SWITCH) != "0":
        parts = ", ".join(f"{name} {_gb(n)}" for name, n in held(config).items() if n)
        least = -(-(prompt_tokens + config.rollout.max_new_tokens) // config.rollout.page_size) + 1
        settings = settings_that_fit(config, lambda c: peak_bytes(held(c)) <= room, least_pages=least)
        advice = f"it would fit with {' '.join(settings)}" if settings else "no three settings would make it fit"
        raise ValueError(
            f"this run holds {_gb(peak_bytes(held(config)))} at the most ({parts}; keys and values and gradients take "
            f"turns), and {_gb(free)} of memory are free on {config.device}, of which a run may fill {ROOM:.0%}: "
            f"{advice}; {SWITCH}=0 tries it all the same"
        )
    return peak_bytes(held(config), pages_stay=True) <= room


def settings_that_fit(config: RunConfig, fits: Callable[[RunConfig], bool], *, least_pages: int) -> list[str]:
    """Overrides with which a run fits: as few as can be, at most three, those first that change no result.

    Args:
        config: of a run that does not fit.
        fits: whether one does.
        least_pages: KV pages with which it can still run.

    Returns:
        "key.path=value" each, numbers as large as fit; [] where no three settings are enough.
    """
    budget = config.batch.tokens_per_micro_batch
    numbers = {"rollout.num_pages": (least_pages, 10**9), "batch.tokens_per_micro_batch": (min(256, budget), budget)}
    choices = ["rollout.num_pages", "batch.tokens_per_micro_batch"]
    if not config.batch.activation_checkpointing:
        choices.append("batch.activation_checkpointing=true")
    if config.method == "grpo" and config.loss.kl_coef > 0:
        choices.append("loss.kl_coef=0")
    if config.model.dtype == "float32":
        choices.append("model.dtype=bfloat16")

    def with_(values: Mapping[str, int], flags: list[str]) -> list[str]:
        return [*(f"{name}={n}" for name, n in values.items()), *flags]

    def good(overrides: list[str]) -> bool:
        return fits(RunConfig.model_validate(apply_overrides(config.model_dump(), overrides)))

    for count in (1, 2, 3):
        for chosen in itertools.combinations(choices, count):
            flags = [c for c in chosen if "=" in c]
            values = {c: numbers[c][0] for c in chosen if c not in flags}
            if not good(with_(values, flags)):
                continue
            for name in values:  # as large as fits
                low, high = numbers[name]
                while low < high:
                    middle = (low + high + 1) // 2
                    if good(with_({**values, name: middle}, flags)):
                        low = middle
                    else:
                        high = middle - 1
                values[name] = low
            return with_(values, flags)
    return []


def _gb(n: float) -> str:
    return f"{n / 1e9:.3g} GB"
