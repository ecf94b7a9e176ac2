"""Checkpoints of a run: written so that a kill at any moment leaves one that is whole.

A run directory holds

    checkpoint/            the newest: a Hugging Face folder (`grpo_engine.model.weights`: load it as a model anywhere),
                           with its tokenizer and chat template, optimizer.safetensors (or numbered shards of it)
                           and meta.json
    checkpoint.previous/   the one before it, used when the newest turns out to be damaged
    checkpoint.new/        one that is being written; whatever a killed process left of it is thrown away

`save` empties `checkpoint.previous`, writes and fsyncs `checkpoint.new`, renames `checkpoint` to
`checkpoint.previous` and `checkpoint.new` to `checkpoint`. At every moment `checkpoint` or `checkpoint.previous` is
whole once the first save has returned, and there are never more than two copies on the disk.

meta.json holds the step, the lengths of the record files, the hash of the configuration, the optimizer's scalar
settings, and length and SHA-256 of every other file and of itself; `load` believes nothing before it has checked them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from grpo_engine.model import hf_config, weights
from grpo_engine.model.decoder import Model
from grpo_engine.system import files

SCHEMA = 1
CURRENT, PREVIOUS, NEW = "checkpoint", "checkpoint.previous", "checkpoint.new"
OPTIMIZER_FILE = "optimizer.safetensors"
META_FILE = "meta.json"


class DamagedError(ValueError):
    """A checkpoint is not what was written; the message names the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A checkpoint whose every byte was checked.

    Example: State(folder=Path("runs/a/checkpoint"), step=20, lengths={"steps.jsonl": 9120},
    meta={"counters": {"step": 20}}, groups=[{"lr": 1e-6, "parameters": ["embed.weight"]}])
    """

    folder: Path  # the weights and the optimizer's tensors are read from here by `restore`
    step: int  # steps that were done
    lengths: Mapping[str, int]  # record file -> its length in bytes when the checkpoint was taken
    meta: Mapping[str, Any]  # what the caller of `save` added
    groups: list[dict[str, Any]]  # the optimizer's parameter groups: scalar settings, and the parameters' names

    def restore(self, model: Model, optimizer: torch.optim.Optimizer) -> None:
        """Puts weights and optimizer state back, in place and bit for bit.

        Args:
            model: of the same config and dtype as the one that was saved.
            optimizer: over this model's parameters, in the same groups.

        Raises:
            ValueError: the model's config or dtype, or the optimizer's groups, differ from what was saved.
        """
        found = json.loads((self.folder / hf_config.CONFIG_FILE).read_bytes())["dtype"]
        ours = str(model.dtype).removeprefix("torch.")
        if found != ours:
            raise ValueError(f"{self.folder / hf_config.CONFIG_FILE}: dtype must be {ours} (the model's), got {found}")
        mine = _groups(model, optimizer)
        theirs = [g["parameters"] for g in self.groups]
        if [g["parameters"] for g in mine] != theirs:
            raise ValueError(
                f"{self.folder / META_FILE}: the optimizer must have {len(theirs)} groups with the parameters "
                f"that were saved, got {len(mine)} groups or other parameters"
            )
        weights.load_into(model, self.folder)
        for group, saved in zip(optimizer.param_groups, self.groups, strict=True):
            for name, value in saved.items():
                if name != "parameters":
                    group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
        parameters = dict(model.named_parameters())
        optimizer.state.clear()
        for path in sorted(self.folder.glob(f"{Path(OPTIMIZER_FILE).stem}*")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    name, _, kind = key.rpartition(":")
                    parameter = parameters[name]
                    optimizer.state[parameter][kind] = file.get_tensor(key).to(parameter.device)


def save(
    run_dir: str | os.PathLike[str],
    *,
    model: Model,
    optimizer: torch.optim.Optimizer,
    step: int,
    config_hash: str,
    lengths: Mapping[str, int],
    meta: Mapping[str, Any],
    tokenizer_folder: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a checkpoint; a kill at any moment leaves the one before it, or this one.

    Args:
        run_dir: must exist. One process writes to it at a time.
        model: its weights.
        optimizer: its state: moments, step counts, lower halves of master weights, settings of each group.
        step: steps that were done.
        config_hash: of the configuration; `load` refuses another.
        lengths: record file -> length in bytes, after it was synced.
        meta: JSON; given back by `load`.
        tokenizer_folder: its files are copied along; None: there are none.

    Raises:
        TypeError: meta, or a setting of the optimizer, has no JSON form.
        ValueError: the optimizer holds a parameter that the model does not.
        OSError: it cannot be written, for instance for want of space; the newest checkpoint is still there.
    """
    run_dir = Path(run_dir)
    current, previous, new = run_dir / CURRENT, run_dir / PREVIOUS, run_dir / NEW
    groups = _groups(model, optimizer)
    facts = {
        "schema": SCHEMA,
        "step": step,
        "config_hash": config_hash,
        "lengths": dict(lengths),
        "meta": dict(meta),
        "groups": groups,
    }
    _digest(facts)  # a TypeError comes before anything is touched

    _remove(new)
    if current.exists():  # else a kill came between the two renames, and `previous` is the one whole checkpoint
        _remove(previous)
    new.mkdir()
    try:
        weights.write_files(model, new)
        if tokenizer_folder is not None:
            weights.copy_tokenizer(tokenizer_folder, new)
        weights.write_tensors(new, OPTIMIZER_FILE, _optimizer_tensors(model, optimizer))
        facts["files"] = {p.name: _fingerprint(p) for p in sorted(new.iterdir())}
        facts["sha256"] = _digest(facts)
        (new / META_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        files.sync_tree(new)
    except BaseException:
        _remove(new)
        raise
    if current.exists():
        os.rename(current, previous)
    os.rename(new, current)
    files.sync_folder(run_dir)


def load(run_dir: str | os.PathLike[str], *, config_hash: str) -> State | None:
    """The newest checkpoint of a run that is whole.

    A damaged newest checkpoint is thrown away, with a warning that names the file, when the one before it is whole;
    the run then repeats the steps between the two.

    Args:
        run_dir: of the run.
        config_hash: of the configuration that wants to go on.

    Returns:
        A `State`, or None when the run has none yet.

    Raises:
        ValueError: the checkpoint belongs to another configuration; or (`DamagedError`) there is no whole one: the
            message names the file, what was wanted and what came. Nothing is changed on the disk then.
    """
    run_dir = Path(run_dir)
    current, previous = run_dir / CURRENT, run_dir / PREVIOUS
    damage: DamagedError | None = None
    if current.exists():
        try:
            return _read(current, config_hash)
        except DamagedError as error:
            damage = error
    if not previous.exists():
        if damage is not None:
            raise damage
        return None
    try:
        state = _read(previous, config_hash)
    except DamagedError as error:
        raise DamagedError(f"{damage}; and the one before it: {error}" if damage else str(error)) from None
    # `save` trusts what lies in `current` and empties `previous`, so the whole one must lie in `current`
    if damage is not None:
        warnings.warn(f"{damage}; going on from step {state.step}, the checkpoint before it", stacklevel=2)
        _remove(current)
    os.rename(previous, current)
    files.sync_folder(run_dir)
    return State(folder=current, step=state.step, lengths=state.lengths, meta=state.meta, groups=state.groups)


def _read(folder: Path, config_hash: str) -> State:
    path = folder / META_FILE
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise DamagedError(f"{path}: not JSON ({error})") from None
    if not isinstance(facts, dict):
        raise DamagedError(f"{path}: must hold a JSON object, got {type(facts).__name__}")
    if facts.get("schema") != SCHEMA:
        raise DamagedError(f"{path}: schema must be {SCHEMA}, got {facts.get('schema')!r}")
    wanted, got = facts.pop("sha256", None), _digest(facts)
    if wanted != got:
        raise DamagedError(f"{path}: sha256 of its content must be {wanted}, got {got}")
    # after its own checksum, so that a damaged hash is not taken for another configuration
    if facts["config_hash"] != config_hash:
        raise ValueError(
            f"{path}: config_hash must be {config_hash} (this configuration), got {facts['config_hash']}: "
            "the checkpoint belongs to another run"
        )
    for name, fingerprint in facts["files"].items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"{file}: no such file, {META_FILE} names it")
        size = file.stat().st_size  # before the content: a truncated file is known at once
        if size != fingerprint["bytes"]:
            raise DamagedError(f"{file}: must have {fingerprint['bytes']} bytes, got {size}")
        found = _fingerprint(file)
        if found != fingerprint:
            raise DamagedError(f"{file}: sha256 must be {fingerprint['sha256']}, got {found['sha256']}")
    return State(folder=folder, step=facts["step"], lengths=facts["lengths"], meta=facts["meta"], groups=facts["groups"])


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _names(model: Model, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p not in names:
                raise ValueError(f"optimizer must hold parameters of the model, got another of shape {list(p.shape)}")
    return names


def _groups(model: Model, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    names = _names(model, optimizer)
    return [
        {k: v for k, v in group.items() if k != "params"} | {"parameters": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]


def _optimizer_tensors(model: Model, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    names = _names(model, optimizer)
    for p, state in optimizer.state.items():
        for kind, value in state.items():
            yield f"{names[p]}:{kind}", torch.as_tensor(value).detach().contiguous()


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
