"""Reads and writes Hugging Face checkpoints of the Qwen2, Llama and Qwen3 architectures.

H query heads, K key/value heads, E head width, D width, F feed-forward width, V vocabulary.

The model holds q, k, v in one matrix and gate, up in another; on disk they are separate tensors:

    embed.weight [V, D]                   model.embed_tokens.weight
    layers.{i}.attn_norm [D]              model.layers.{i}.input_layernorm.weight
    layers.{i}.qkv_weight [(H+2K)E, D]    model.layers.{i}.self_attn.{q,k,v}_proj.weight, one below the other
    layers.{i}.qkv_bias [(H+2K)E]         model.layers.{i}.self_attn.{q,k,v}_proj.bias, Qwen2 only
    layers.{i}.q_norm, k_norm [E]         model.layers.{i}.self_attn.{q,k}_norm.weight, Qwen3 only
    layers.{i}.out_weight [D, HE]         model.layers.{i}.self_attn.o_proj.weight
    layers.{i}.mlp_norm [D]               model.layers.{i}.post_attention_layernorm.weight
    layers.{i}.gate_up_weight [2F, D]     model.layers.{i}.mlp.{gate,up}_proj.weight
    layers.{i}.down_weight [D, F]         model.layers.{i}.mlp.down_proj.weight
    final_norm [D]                        model.norm.weight
    head [V, D]                           lm_head.weight, only when not tied to the embedding

A checkpoint whose config.json asks for arithmetic that the model does not do is refused; so is a file that is
truncated, or that lacks a tensor, holds one too many, or one of another shape. Nothing is filled in by guessing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grpo_engine.model.config import ModelConfig, family_of
from grpo_engine.model.decoder import Model
from grpo_engine.model.hf_config import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    TOKENIZER_FILES,
    config_object,
    read_config,
)
from grpo_engine.records.jsonl import read_object
from grpo_engine.system.files import new_folder

_READABLE = ("F32", "BF16", "F16")  # safetensors' names; F16 is read, never written
_WRITABLE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_OBSOLETE = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # a function of rope_theta


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Where one tensor of the file lives in the model."""

    parameter: str  # the model's name
    start: int  # first row of the parameter
    shape: tuple[int, ...]  # of the piece; it takes shape[0] rows


def pieces(config: ModelConfig) -> dict[str, Piece]:
    """The tensors of a checkpoint, in the order in which they are written.

    Args:
        config: sizes.

    Returns:
        Hugging Face name -> `Piece`; together they cover every row of every parameter exactly once.
    """
    H, K, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    out: dict[str, Piece] = {}

    def add(parameter: str, *parts: tuple[str, tuple[int, ...]]) -> None:
        start = 0
        for name, shape in parts:
            out[name] = Piece(parameter=parameter, start=start, shape=shape)
            start += shape[0]

    add("embed.weight", ("model.embed_tokens.weight", (V, D)))
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        rows = (("q", H * E), ("k", K * E), ("v", K * E))
        add(f"{ours}.attn_norm", (f"{theirs}.input_layernorm.weight", (D,)))
        add(f"{ours}.qkv_weight", *((f"{theirs}.self_attn.{x}_proj.weight", (n, D)) for x, n in rows))
        if config.qkv_bias:
            add(f"{ours}.qkv_bias", *((f"{theirs}.self_attn.{x}_proj.bias", (n,)) for x, n in rows))
        if config.qk_norm:
            for x in "qk":
                add(f"{ours}.{x}_norm", (f"{theirs}.self_attn.{x}_norm.weight", (E,)))
        add(f"{ours}.out_weight", (f"{theirs}.self_attn.o_proj.weight", (D, H * E)))
        add(f"{ours}.mlp_norm", (f"{theirs}.post_attention_layernorm.weight", (D,)))
        add(f"{ours}.gate_up_weight", *((f"{theirs}.mlp.{x}_proj.weight", (F, D)) for x in ("gate", "up")))
        add(f"{ours}.down_weight", (f"{theirs}.mlp.down_proj.weight", (D, F)))
    add("final_norm", ("model.norm.weight", (D,)))
    if not config.tie_word_embeddings:
        add("head", ("lm_head.weight", (V, D)))
    return out


def split_parameters(model: Model) -> Iterator[tuple[str, Tensor]]:
    """The weights under their Hugging Face names, as views: nothing is copied.

    Args:
        model: any dtype.

    Yields:
        (name, tensor) in the order of `pieces`, detached, contiguous.
    """
    parameters = dict(model.named_parameters())
    for name, piece in pieces(model.config).items():
        yield name, parameters[piece.parameter].detach()[piece.start : piece.start + piece.shape[0]]


def load_model(
    folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    batch_invariant: bool = True,
) -> Model:  # fmt: skip
    """A model with the weights of a Hugging Face folder.

    Memory: the model, where it is to live, and one tensor of the file at a time: files are mapped, not read, and each
    tensor goes straight to its place and dtype.

    Args:
        folder: config.json and either model.safetensors or shards with model.safetensors.index.json.
        dtype: of the model; weights of another are converted (to bfloat16: rounded to nearest even).
        device: where the model is to live.
        batch_invariant: of its products on CUDA; see `Model`.

    Returns:
        A `Model` whose parameters require gradients.

    Raises:
        FileNotFoundError: no such folder, no config.json, no weights.
        ValueError: as `read_config` and `load_into`.
        TypeError: dtype is not a floating type.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"load_model: dtype must be a floating type, got {dtype}")
    config = read_config(folder)
    checked = _checked_tensors(Path(folder), config)  # before the memory is taken
    with torch.device(device):  # by way of the meta device, torch would import its compiler
        model = Model(config, dtype, batch_invariant)
    _fill(model, checked)
    return model


def load_into(model: Model, folder: str | os.PathLike[str]) -> None:
    """Puts the weights of a Hugging Face folder into a model that exists, in place.

    All headers are checked before the first weight is written.

    Args:
        model: its config must equal the folder's, but for max_position_embeddings.
        folder: as for `load_model`.

    Raises:
        FileNotFoundError: no such folder, no config.json, no weights.
        ValueError: a config that differs (the field is named), or a file that is truncated, an index that names a
            missing file or a wrong place, a tensor that is missing, unknown, there twice, of a wrong shape or of a
            dtype that is no float32, bfloat16 or float16; the message names the file and the tensor, what was
            wanted and what came.
    """
    found = read_config(folder)
    for f in fields(ModelConfig):
        theirs, ours = getattr(found, f.name), getattr(model.config, f.name)
        if f.compare and theirs != ours and f.name != "max_position_embeddings":
            raise ValueError(f"{Path(folder) / CONFIG_FILE}: {f.name} must be {ours} (the model's), got {theirs}")
    _fill(model, _checked_tensors(Path(folder), model.config))


@torch.no_grad()
def _fill(model: Model, files: Mapping[Path, list[str]]) -> None:
    parameters = dict(model.named_parameters())
    layout = pieces(model.config)
    tied_heads = []
    for path, names in files.items():
        try:
            with safe_open(path, framework="pt") as shard:
                for name in names:
                    if name not in layout:
                        tied_heads.append((path, shard.get_tensor(name)))
                        continue
                    piece = layout[name]
                    rows = parameters[piece.parameter][piece.start : piece.start + piece.shape[0]]
                    rows.copy_(shard.get_tensor(name))
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    for path, head in tied_heads:
        if not torch.equal(head.to(model.embed.weight), model.embed.weight):
            raise ValueError(
                f"{path}: lm_head.weight must equal model.embed_tokens.weight where config.json says "
                "tie_word_embeddings, got different values"
            )


def _checked_tensors(folder: Path, config: ModelConfig) -> dict[Path, list[str]]:
    """Which tensors to read from which file, all headers checked."""
    layout = pieces(config)
    files = _weight_files(folder)
    file_of: dict[str, Path] = {}
    for path, listed in files.items():
        header = _read_header(path)
        for name in sorted((listed or set()) - header.keys()):
            raise ValueError(f"{path}: tensor {name} is missing, {INDEX_FILE} places it here")
        for name, (dtype, shape) in header.items():
            if name in file_of:
                raise ValueError(f"{path}: tensor {name} is there twice, also in {file_of[name].name}")
            if listed is not None and name not in listed:
                raise ValueError(f"{path}: tensor {name} is there, but {INDEX_FILE} does not place it here")
            file_of[name] = path
            if _OBSOLETE.fullmatch(name):
                continue
            tied_head = name == "lm_head.weight" and config.tie_word_embeddings
            if name not in layout and not tied_head:
                raise ValueError(f"{path}: tensor {name} is unknown to a {family_of(config)} model of {CONFIG_FILE}'s sizes")
            wanted = layout["model.embed_tokens.weight" if tied_head else name].shape
            if shape != wanted:
                raise ValueError(f"{path}: tensor {name} must have shape {list(wanted)}, got {list(shape)}")
            if dtype not in _READABLE:
                raise ValueError(f"{path}: tensor {name} must be one of {', '.join(_READABLE)}, got {dtype}")
    missing = [name for name in layout if name not in file_of]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        where = next(iter(files)) if len(files) == 1 else folder / INDEX_FILE
        size = list(layout[missing[0]].shape)
        raise ValueError(f"{where}: tensor {missing[0]}{more} is missing, wanted shape {size}")
    out: dict[Path, list[str]] = {path: [] for path in files}
    for name, path in file_of.items():
        if not _OBSOLETE.fullmatch(name):
            out[path].append(name)
    return out


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """File -> the tensors that the index places in it, None where there is no index."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder}: must hold {SINGLE_FILE} or {INDEX_FILE}, got both; remove the stale one")
    if single.is_file():
        return {single: None}
    if not index.is_file():
        other = sorted(p.name for p in folder.glob("*.bin"))
        hint = f"; {other[0]} is not read, save it as safetensors" if other else ""
        raise FileNotFoundError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there{hint}")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must be an object of tensor -> file, got {weight_map!r}")
    files: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise ValueError(f"{index}: weight_map[{name!r}] must be the name of a file in the folder, got {file!r}")
        files.setdefault(folder / file, set()).add(name)
    for path, names in files.items():
        if not path.is_file():
            raise ValueError(f"{index}: file {path.name} (of tensor {min(names)}) is missing")
    return {**files}


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor -> (dtype, shape) of a safetensors file whose length is what its header says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if (start + file.read(32)).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path}: holds a Git LFS pointer, not weights; fetch them with `git lfs pull`")
        header_size = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + header_size > size:
            wanted = "at least 8" if len(start) < 8 else f"at least {8 + header_size}"
            raise ValueError(f"{path}: truncated, or not safetensors: wanted {wanted} bytes, got {size}")
        file.seek(8)
        text = file.read(header_size)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"tensor {key} is there twice")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=unique)
        header.pop("__metadata__", None)
        out = {name: (str(t["dtype"]), tuple(map(int, t["shape"]))) for name, t in header.items()}
        end = max((int(t["data_offsets"][1]) for t in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: the header is no safetensors header ({error})") from None
    if 8 + header_size + end != size:
        raise ValueError(f"{path}: truncated or overlong: wanted {8 + header_size + end} bytes, got {size}")
    return out


def save_checkpoint(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    tokenizer_folder: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a Hugging Face folder that transformers, and `load_model`, read back bit for bit.

    Atomic: written under another name beside `folder`, fsynced, renamed; a kill leaves the folder as it was.

    Args:
        model: float32, bfloat16 or float16 weights.
        folder: absent, or empty; what it would hold is never mixed with other files. Its parents are made.
        tokenizer_folder: `TOKENIZER_FILES` that are there are copied along.
        max_shard_bytes: files are split so that none is longer, unless one tensor alone is.

    Raises:
        FileExistsError: the folder holds something.
        FileNotFoundError: tokenizer_folder holds no tokenizer.
        ValueError: max_shard_bytes < 1.
        TypeError: another dtype of weights.
        OSError: it cannot be written; nothing is left behind.
    """
    with new_folder(Path(folder)) as temporary:
        write_files(model, temporary, max_shard_bytes=max_shard_bytes)
        if tokenizer_folder is not None:
            copy_tokenizer(tokenizer_folder, temporary)


def write_files(model: Model, folder: Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes config.json and the safetensors files into a folder, neither atomically nor synced.

    Args:
        model: float32, bfloat16 or float16 weights.
        folder: must exist.
        max_shard_bytes: as for `save_checkpoint`.

    Raises:
        ValueError: max_shard_bytes < 1.
        TypeError: another dtype of weights.
        OSError: it cannot be written.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be >= 1, got {max_shard_bytes}")
    if model.dtype not in _WRITABLE:
        raise TypeError(f"model must be one of {', '.join(_WRITABLE.values())}, got {model.dtype}")
    weight_map = write_tensors(folder, SINGLE_FILE, split_parameters(model), max_shard_bytes=max_shard_bytes)
    if len(set(weight_map.values())) > 1:
        total = {"total_parameters": model.num_parameters, "total_size": sum(p.nbytes for p in model.parameters())}
        _write_object(folder / INDEX_FILE, {"metadata": total, "weight_map": weight_map})
    _write_object(folder / CONFIG_FILE, config_object(model.config, _WRITABLE[model.dtype]))


def write_tensors(
    folder: Path, file: str, tensors: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int = 5 * 10**9
) -> dict[str, str]:
    """Writes tensors of any device into one safetensors file, or into numbered ones.

    Memory: that of one file on the host.

    Args:
        folder: must exist.
        file: its name when one is enough, "NAME.safetensors"; else NAME-00001-of-00003.safetensors and so on.
        tensors: (name, tensor) in the order wanted, contiguous.
        max_shard_bytes: no file's tensors are longer, unless one tensor alone is.

    Returns:
        Tensor -> file.

    Raises:
        OSError: it cannot be written.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors:
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    stem = file.removesuffix(".safetensors")
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [file]
    for name, shard in zip(files, shards, strict=True):
        try:
            save_file({key: t.cpu() for key, t in shard.items()}, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # what the library makes of a full disk
            raise OSError(f"{folder / name}: cannot be written ({error})") from error
    return {key: name for name, shard in zip(files, shards, strict=True) for key in shard}


def copy_tokenizer(source: str | os.PathLike[str], folder: Path) -> None:
    """Copies the `TOKENIZER_FILES` that a folder has; where its config.json alone says where answers end, so does the copy.

    Args:
        source: a folder with tokenizer.json.
        folder: where to.

    Raises:
        FileNotFoundError: source has no tokenizer.json.
    """
    if not (Path(source) / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{source}: no tokenizer there (tokenizer.json is missing)")
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)
    config, generation = (
        read_object(path) if path.is_file() else {} for path in (Path(source) / CONFIG_FILE, folder / GENERATION_FILE)
    )
    if generation.get("eos_token_id") is None and config.get("eos_token_id") is not None:
        _write_object(folder / GENERATION_FILE, generation | {"eos_token_id": config["eos_token_id"]})


def _write_object(path: Path, obj: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(obj, indent=2, sort_keys=True) + "\n", encoding="utf-8")
