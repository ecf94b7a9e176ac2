"""GGUF files, the format of llama.cpp, as Hugging Face folders.

The `gguf` library dequantises the weights. This module names the tensors, undoes the row order that the format has for
Llama's rotary pairs, and writes the tokenizer. What it does not know is refused by name: another architecture, tokenizer,
tensor or scaling of positions.

    file                                   folder
    general.architecture, sizes            config.json
    tensors                                model.safetensors, float32 or bfloat16
    tokenizer.ggml.*                       tokenizer.json, tokenizer_config.json
    tokenizer.chat_template                chat_template.jinja
    tokenizer.ggml.eos_token_id, eot, eom  generation_config.json
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from grpo_engine.model.config import FAMILIES, ModelConfig, RopeScaling
from grpo_engine.model.decoder import rope_frequencies
from grpo_engine.model.hf_config import CONFIG_FILE, GENERATION_FILE, config_object
from grpo_engine.model.hub import Snapshot
from grpo_engine.model.weights import pieces, write_tensors
from grpo_engine.system.files import cache_root, fingerprint, new_folder
from grpo_engine.system.locks import FOREVER, locked
from grpo_engine.system.machine import num_cores

if TYPE_CHECKING:
    import tokenizers

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # the format's names, which are keys of FAMILIES
# the format's name of a tensor -> Hugging Face's, in layer {0}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1 and later: how many times slower each pair turns
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # kinds of tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class _Splitting:
    """How a tokenizer cuts a text into words before it merges bytes."""

    pattern: str | None  # None: GPT-2's
    digits: bool = False  # each digit is a word
    nfc: bool = False  # the text is normalised first
    whole_words: bool = False  # a word that is a token is taken as it is, whatever the merges say
    begins: bool = False  # a text begins with the begin-of-text token where the file does not say


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTINGS = {  # by tokenizer.ggml.pre
    "gpt-2": _Splitting(pattern=None),
    "smollm": _Splitting(pattern=None, digits=True),
    "qwen2": _Splitting(pattern=rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", nfc=True),
    "llama-bpe": _Splitting(pattern=rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", whole_words=True, begins=True),
}


def convert(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Path:
    """Writes the model of a GGUF file as a Hugging Face folder.

    Args:
        path: one file of a model whose architecture is in `ARCHITECTURES` and whose tokenizer is in `SPLITTINGS`.
        out: the folder, which must not exist; it appears whole or not at all.
        dtype: of the weights written. float32 has the bits of the gguf library's dequantisation.

    Returns:
        out.

    Raises:
        FileNotFoundError: no such file.
        FileExistsError: out exists.
        ValueError: not a GGUF file, or one with something that is not known here; the message names file and field.
        ModuleNotFoundError: the gguf library is not installed.
    """
    reader = _open(Path(path))
    fields = _Fields(Path(path), {key: field.contents() for key, field in reader.fields.items()})
    tensors = {t.name: t for t in reader.tensors}
    config = _config(fields, tensors)
    tokenizer, settings, generation = _tokenizer(fields, config.vocab_size)
    with new_folder(Path(out)) as folder:
        write_tensors(folder, "model.safetensors", _weights(fields, tensors, config, getattr(torch, dtype)))
        tokenizer.save(str(folder / "tokenizer.json"))
        _write(folder / CONFIG_FILE, config_object(config, dtype) | generation)
        _write(folder / GENERATION_FILE, generation)
        _write(folder / "tokenizer_config.json", settings)
        if template := fields.get("tokenizer.chat_template", str, None):
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Path(out)


def converted(path: str | os.PathLike[str]) -> Snapshot:
    """The folder of a GGUF file in the cache, converted if it is not there; the file's content is its revision.

    Args:
        path: see `convert`, whose errors this raises too.

    Returns:
        A folder with float32 weights.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"model.path={path}: no such file")
    content = fingerprint(path)
    folder = cache_root() / "gguf" / f"{Path(path).stem}-{content}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock"), f"{folder}: another process makes this model", wait_s=FOREVER):
        if not folder.is_dir():
            convert(path, folder)
    return Snapshot(folder, content)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a GGUF file, by its ending."""
    return os.fspath(path).endswith(".gguf")


class _Fields:
    """The file's metadata; a field that is missing or of a wrong type is named."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self._values = path, values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """A field of a type; without a default it must be there."""
        value = self._values.get(key, default)
        if value is ... or (value is not default and not isinstance(value, kind)):
            got = "none" if value is ... else repr(value)[:60]
            raise ValueError(f"{self.path}: {key} must be of type {kind.__name__}, got {got}")
        return value

    def refuse(self, key: str, wanted: str, got: object) -> ValueError:
        return ValueError(f"{self.path}: {key} must be {wanted}, got {got!r}")


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path}: GGUF files are read by the gguf library: pip install gguf") from None
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:  # what the library raises
        raise ValueError(f"{path}: not a whole GGUF file ({error})") from None


# ---------------------------------------------------------------- the architecture


def _config(fields: _Fields, tensors: Mapping[str, Any]) -> ModelConfig:
    kind = fields.get("general.architecture", str)
    if kind not in ARCHITECTURES:
        raise fields.refuse("general.architecture", f"one of {', '.join(ARCHITECTURES)}", kind)
    scaling = fields.get(f"{kind}.rope.scaling.type", str, "none")
    if scaling != "none":
        raise fields.refuse(f"{kind}.rope.scaling.type", "'none'", scaling)
    width, heads = fields.get(f"{kind}.embedding_length", int), fields.get(f"{kind}.attention.head_count", int)
    head_dim = fields.get(f"{kind}.attention.key_length", int, width // heads)
    for key in (f"{kind}.attention.value_length", f"{kind}.rope.dimension_count"):
        if fields.get(key, int, head_dim) != head_dim:
            raise fields.refuse(key, f"the width of a head, {head_dim}", fields[key])
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{fields.path}: tensor token_embd.weight is missing")
    family = FAMILIES[kind]
    theta = fields.get(f"{kind}.rope.freq_base", float, 10_000.0)
    return ModelConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=width,
        intermediate_size=fields.get(f"{kind}.feed_forward_length", int),
        num_hidden_layers=fields.get(f"{kind}.block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=fields.get(f"{kind}.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=_rope_scaling(fields, tensors, theta, head_dim),
        # float32 in the file: the shortest decimal that gives it is what config.json said
        rms_norm_eps=float(f"{fields.get(f'{kind}.attention.layer_norm_rms_epsilon', float):.7g}"),
        tie_word_embeddings="output.weight" not in tensors,
        max_position_embeddings=fields.get(f"{kind}.context_length", int, family.max_position_embeddings),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        model_type=kind,
    )


def _rope_scaling(fields: _Fields, tensors: Mapping[str, Any], theta: float, head_dim: int) -> RopeScaling | None:
    """Llama 3's, whose factors the file has and whose settings it has not: those of 3.1 to 3.3 that give these factors."""
    if _ROPE_FACTORS not in tensors:
        return None
    factors = _dequantized(tensors[_ROPE_FACTORS]).double()
    scaling = RopeScaling(
        factor=float(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    given = plain / rope_frequencies(theta, head_dim, scaling, torch.device("cpu")).double()
    if given.shape != factors.shape or not torch.allclose(given, factors, rtol=1e-5):
        raise ValueError(f"{fields.path}: tensor {_ROPE_FACTORS} must be that of Llama 3.1 to 3.3, got another scaling")
    return scaling


# ---------------------------------------------------------------- the weights


def _dequantized(tensor: Any) -> Tensor:
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values if values.flags.writeable else values.copy())  # float32 is a view of the file


def _hf_name(name: str) -> str | None:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer is None:
        return _NAMES.get(name)
    module = _LAYER_NAMES.get(layer[2])
    return module and f"model.layers.{layer[1]}.{module}.{layer[3]}"


def _weights(
    fields: _Fields, tensors: Mapping[str, Any], config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The weights under Hugging Face's names, in the order of `pieces`; all names and shapes are checked first."""
    wanted = pieces(config)
    found = {_hf_name(name): tensor for name, tensor in tensors.items() if name != _ROPE_FACTORS}
    unknown = [name for name in tensors if name != _ROPE_FACTORS and _hf_name(name) not in wanted]
    if unknown:
        raise ValueError(f"{fields.path}: tensor {unknown[0]} is unknown to a {config.model_type} model")
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{fields.path}: the tensor of {missing[0]} is missing")
    for name, piece in wanted.items():
        shape = tuple(int(n) for n in reversed(found[name].shape))
        if shape != piece.shape:
            raise ValueError(f"{fields.path}: tensor {found[name].name} must have shape {piece.shape}, got {shape}")

    def read(name: str) -> Tensor:
        weight = _dequantized(found[name]).view(wanted[name].shape)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        module = name.split(".")[-2]
        if config.model_type == "llama" and module in heads:
            weight = _rotary_halves(weight, heads[module])
        return weight.to(dtype).contiguous()

    with ThreadPoolExecutor(num_cores()) as pool:  # numpy lets go of the interpreter while it computes
        yield from zip(wanted, pool.map(read, wanted), strict=True)


def _rotary_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a head from (0, E/2, 1, E/2 + 1, ...), which turns neighbours, to (0, 1, ..., E - 1), which turns halves."""
    return weight.view(heads, weight.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


# ---------------------------------------------------------------- the tokenizer


def _tokenizer(fields: _Fields, rows: int) -> tuple[tokenizers.Tokenizer, dict[str, Any], dict[str, Any]]:
    """The tokenizer, tokenizer_config.json and generation_config.json."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE

    model = fields.get("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise fields.refuse("tokenizer.ggml.model", "'gpt2' (merges of bytes)", model)
    name = fields.get("tokenizer.ggml.pre", str, "gpt-2")
    if name not in SPLITTINGS:
        raise fields.refuse("tokenizer.ggml.pre", f"one of {', '.join(SPLITTINGS)}", name)
    splitting = SPLITTINGS[name]
    texts, kinds = fields.get("tokenizer.ggml.tokens", list), fields.get("tokenizer.ggml.token_type", list)
    if not len(texts) == len(kinds) == rows:
        raise fields.refuse("tokenizer.ggml.tokens", f"as long as token_type and the embedding, {rows}", len(texts))
    used = [(i, text, kind) for i, (text, kind) in enumerate(zip(texts, kinds, strict=True)) if kind != _UNUSED]
    merges = [tuple(pair.split(" ")) for pair in fields.get("tokenizer.ggml.merges", list)]
    bpe = BPE(vocab={text: i for i, text, _ in used}, merges=merges, ignore_merges=splitting.whole_words)
    tokenizer = Tokenizer(bpe)
    added = {
        i: AddedToken(text, special=kind == _CONTROL, normalized=False)
        for i, text, kind in used
        if kind in (_CONTROL, _USER_DEFINED)
    }
    tokenizer.add_tokens(list(added.values()))
    _split_words(tokenizer, splitting)
    tokenizer.decoder = ByteLevelDecoder()

    ids = {
        role: fields.get(f"tokenizer.ggml.{role}_token_id", int, None) for role in ("bos", "eos", "eot", "eom", "padding")
    }
    if ids["eos"] is None:
        raise ValueError(f"{fields.path}: tokenizer.ggml.eos_token_id must be there, got none")
    begins = fields.get("tokenizer.ggml.add_bos_token", bool, splitting.begins)
    if begins and ids["bos"] is None:
        raise ValueError(f"{fields.path}: tokenizer.ggml.bos_token_id must be there (texts begin with it), got none")
    _end(tokenizer, texts[ids["bos"]] if begins else None, ids["bos"])
    named = {"bos_token": ids["bos"], "eos_token": ids["eos"], "pad_token": ids["padding"]}
    settings = {
        "added_tokens_decoder": {
            str(i): {"content": t.content, "special": t.special, "normalized": False, "lstrip": False, "rstrip": False,
                     "single_word": False}
            for i, t in added.items()
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields.get(f"{fields['general.architecture']}.context_length", int, 2**20),
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: texts[i] for role, i in named.items() if i is not None},
    }  # fmt: skip
    stops = list(dict.fromkeys(i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None))
    generation = {"bos_token_id": ids["bos"], "eos_token_id": stops if len(stops) > 1 else stops[0]}
    return tokenizer, settings, generation


def _split_words(tokenizer: tokenizers.Tokenizer, splitting: _Splitting) -> None:
    from tokenizers import Regex
    from tokenizers.normalizers import NFC
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if splitting.nfc:
        tokenizer.normalizer = NFC()
    parts: list[Any] = [Digits(individual_digits=True)] if splitting.digits else []
    if splitting.pattern is not None:
        parts.append(Split(Regex(splitting.pattern), behavior="isolated"))
    parts.append(ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    tokenizer.pre_tokenizer = Sequence(parts)


def _end(tokenizer: tokenizers.Tokenizer, begin: str | None, begin_id: int | None) -> None:
    """What is put around a text: nothing, or a begin-of-text token."""
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    own = ByteLevel(trim_offsets=False)
    if begin is None:
        tokenizer.post_processor = own
        return
    template = TemplateProcessing(single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, begin_id)])
    tokenizer.post_processor = Sequence([own, template])


def _write(path: Path, obj: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(obj, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
