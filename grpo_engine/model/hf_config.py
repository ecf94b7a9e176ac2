"""config.json of a Hugging Face folder: which model it is, and which arithmetic it asks for.

A config.json that asks for arithmetic that the model does not do is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from grpo_engine.model.config import FAMILIES, Family, ModelConfig, RopeScaling, family_of
from grpo_engine.records.jsonl import read_object

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
# copied beside the weights when a tokenizer folder is given: all that transformers or we read of it
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    GENERATION_FILE,
)


_LLAMA3 = tuple(f.name for f in fields(RopeScaling))


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The sizes of a checkpoint, after a check that its arithmetic is the model's.

    Fields that are absent take the values that transformers' configuration of the family gives them (rope_theta 10000,
    an untied head), not those of `ModelConfig`; the five sizes and num_key_value_heads must be there.

    Args:
        folder: with a config.json as transformers 4 or 5 writes it.

    Returns:
        A `ModelConfig`.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: not JSON, a field that is missing or of a wrong type, or a value that changes the arithmetic;
            the message names the file, the field, what was wanted and what came.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder (models are read from local Hugging Face folders)")
    raw = read_object(folder / CONFIG_FILE)
    where = str(folder / CONFIG_FILE)
    family = _family(raw, where)
    _refuse_other_arithmetic(raw, where, family)

    heads = _integer(raw, "num_attention_heads", where)
    width = _integer(raw, "hidden_size", where)
    kv_heads = heads if raw.get("num_key_value_heads", 0) is None else _integer(raw, "num_key_value_heads", where)
    if raw.get("head_dim") is not None:
        head_dim = _integer(raw, "head_dim", where)
    elif family.head_dim is not None:
        head_dim = family.head_dim
    elif width % heads:
        raise ValueError(
            f"{where}: hidden_size must be a multiple of num_attention_heads={heads} where head_dim is absent, got {width}"
        )
    else:
        head_dim = width // heads
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"{where}: tie_word_embeddings must be true or false, got {tied!r}")
    theta, scaling = _rope(raw, where)
    try:
        return ModelConfig(
            vocab_size=_integer(raw, "vocab_size", where),
            hidden_size=width,
            intermediate_size=_integer(raw, "intermediate_size", where),
            num_hidden_layers=_integer(raw, "num_hidden_layers", where),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=RopeScaling(**scaling) if scaling else None,
            rms_norm_eps=_positive(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
            tie_word_embeddings=tied,
            max_position_embeddings=_integer(raw, "max_position_embeddings", where, default=family.max_position_embeddings),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            model_type=raw["model_type"],
        )
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from None


def _family(raw: Mapping[str, Any], where: str) -> Family:
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{where}: model_type must be one of {', '.join(map(repr, FAMILIES))}, got {kind!r}")
    return FAMILIES[kind]


def _refuse_other_arithmetic(raw: Mapping[str, Any], where: str, family: Family) -> None:
    def demand(name: str, allowed: tuple[Any, ...], wanted: str) -> None:
        if raw.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{where}: {name} must be {wanted}, got {raw[name]!r}")

    architectures = [family.architecture]
    demand("architectures", (None, architectures), str(architectures))
    if not family.qkv_bias:  # Qwen2's are there without being asked for
        demand("attention_bias", (False, None), "false")
        demand("mlp_bias", (False, None), "false")
    demand("hidden_act", ("silu",), "'silu'")
    demand("use_sliding_window", (False, None), "false")
    if family.window is not None and raw.get("sliding_window", family.window) is not None:
        window = raw.get("sliding_window", f"none (then it is {family.window})")
        raise ValueError(f"{where}: sliding_window must be null (attention inside a window is not computed), got {window}")
    demand("attention_dropout", (0, None), "0")
    demand("quantization_config", (None,), "absent (quantized weights are not read)")
    others = set(raw.get("layer_types") or ()) - {"full_attention"}
    if others:
        raise ValueError(f"{where}: layer_types must all be 'full_attention', got {sorted(map(str, others))}")


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """Base of the frequencies, and the fields of `RopeScaling` or None.

    transformers 4 writes rope_theta and rope_scaling, transformers 5 one object rope_parameters.
    """
    found, scaling = {}, None
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"{where}: {name} must be null or an object, got {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        own = set(_LLAMA3) if kind == "llama3" else set()
        strange = set(rope) - own - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind not in ("default", "llama3") or strange or rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(
                f"{where}: {name} must be null or of rope_type 'default' or 'llama3' and nothing else, got {rope!r}"
            )
        if kind == "llama3":
            asked = {field: _positive(rope.get(field), f"{name}.{field}", where) for field in _LLAMA3}
            asked[_LLAMA3[-1]] = _integer(rope, _LLAMA3[-1], f"{where}: {name}")
            if scaling not in (None, asked):
                raise ValueError(f"{where}: rope_scaling and rope_parameters must agree, got {scaling} and {asked}")
            scaling = asked
        if "rope_theta" in rope:
            found[f"{name}.rope_theta"] = rope["rope_theta"]
    if raw.get("rope_theta") is not None:
        found["rope_theta"] = raw["rope_theta"]
    values = {name: _positive(value, name, where) for name, value in found.items()}
    if len(set(values.values())) > 1:
        raise ValueError(f"{where}: rope_theta must be given once, got {values}")
    return next(iter(values.values()), 10_000.0), scaling


def _integer(raw: Mapping[str, Any], name: str, where: str, *, default: int | None = None) -> int:
    value = raw.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {name} must be an integer >= 1, got {value!r}{'' if name in raw else ' (absent)'}")
    return value


def _positive(value: Any, name: str, where: str) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not good:
        raise ValueError(f"{where}: {name} must be a finite number > 0, got {value!r}")
    return float(value)


def config_object(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json as both transformers 4 (rope_theta) and 5 (rope_parameters) read it; dtype: "float32", for instance."""
    model_type = family_of(config)
    family = FAMILIES[model_type]
    sizes = {f.name: getattr(config, f.name) for f in fields(config)}
    for ours in ("qkv_bias", "qk_norm", "rope_scaling", "model_type"):
        del sizes[ours]
    if family.window is not None:
        sizes["sliding_window"] = None
    if family.head_dim is None and config.head_dim * config.num_attention_heads == config.hidden_size:
        del sizes["head_dim"]  # Qwen2's config has no such field; transformers computes it
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        rope |= asdict(config.rope_scaling) | {"rope_type": "llama3"}
        sizes["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return sizes | {
        "architectures": [family.architecture],
        "attention_dropout": 0.0,
        "dtype": dtype,
        "hidden_act": "silu",
        "model_type": model_type,
        "rope_parameters": rope,
        "torch_dtype": dtype,
        "use_sliding_window": False,
    }
