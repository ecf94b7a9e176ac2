"""A study is a list of cells that can be read before it is paid for.

`StudyConfig` says what varies (sizes, kinds, seeds, data reuse, order, group size, the algorithm's switches) and `plan`
expands it into `Cell`s: one run each, with a resolved `RunConfig`, an identity that is a hash of it, and an estimate of
what it will cost (`forecast.py`). Two blocks of axes that meet in one configuration share its cell, so no run is paid
for twice.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from grpo_engine.config import Config, ModelSource, Positive, RunConfig, apply_overrides, load_yaml, validate
from grpo_engine.micro.ladder import training_tokens
from grpo_engine.records.records import run_id
from grpo_engine.study.forecast import Cost, EstimateConfig, forecast, num_params, pretraining

Kind = Literal["base", "instruct"]
Order = Literal["curriculum", "shuffled"]
PLAN_FILE = "plan.json"
STUDY_FILE = "study.yaml"
CELLS = "cells"


class SizeConfig(Config):
    """One rung of the ladder: where its weights are and what its runs need to be told."""

    base: str | None = None  # Hugging Face folder; None: the embedded ladder's model of this size
    instruct: str | None = None
    params_nominal: Annotated[float, Field(gt=0)] | None = None  # what the name says (0.5e9), recorded only
    run: dict[str, Any] = {}  # overrides of the run at this size, dotted ("optimizer.lr": 1e-4)
    response_tokens: dict[Kind, Annotated[float, Field(gt=0)]] = {}  # for the estimate, instead of its own


class AxesConfig(Config):
    """A block of cells: the full product of its axes."""

    name: str = "main"
    sizes: tuple[str, ...] = ()  # empty: every size of the study
    kinds: tuple[Kind, ...] = ("base",)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)  # embedded ladder: of the model too, but where model.seed is set
    tau: tuple[Annotated[float, Field(ge=1)], ...] = (1.0,)  # data reuse: prompts seen / different prompts
    unique: tuple[Positive, ...] = ()  # or the number of different prompts, instead of tau
    order: tuple[Order, ...] = ()  # easy to hard, or each pass in an order of its own; empty: the run's own
    group_size: tuple[Annotated[int, Field(ge=2)], ...] = ()  # empty: the run's own
    variants: dict[str, dict[str, Any]] = {}  # name -> overrides, dotted; one without overrides is the plain run
    control: tuple[Kind, ...] = ()  # and, for these kinds, a plain-pretraining run of the same length per size and seed
    run: dict[str, Any] = {}  # overrides for this block, dotted

    @model_validator(mode="after")
    def _not_empty(self) -> AxesConfig:
        for axis in ("kinds", "seeds", "tau"):
            values = getattr(self, axis)
            if not values:
                raise ValueError(f"axes {self.name!r}: {axis} must not be empty")
        for axis in ("sizes", "kinds", "seeds", "tau", "unique", "order", "group_size", "control"):
            values = getattr(self, axis)
            if len(set(values)) != len(values):
                raise ValueError(f"axes {self.name!r}: {axis} holds a value twice: {list(values)}")
        if self.unique and self.tau != (1.0,):
            raise ValueError(f"axes {self.name!r}: give tau or unique, and not both")
        return self


class StudyConfig(Config):
    """A whole study."""

    name: str
    run: dict[str, Any] = {}  # what every run has in common, nested as in `RunConfig`
    sizes: dict[str, SizeConfig]  # smallest first
    axes: tuple[AxesConfig, ...]
    estimate: EstimateConfig = EstimateConfig()

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if not self.sizes:
            raise ValueError("sizes must name at least one size")
        if not self.axes:
            raise ValueError("axes must hold at least one block")
        for block in self.axes:
            if unknown := [s for s in block.sizes if s not in self.sizes]:
                raise ValueError(
                    f"axes {block.name!r}: sizes {', '.join(unknown)} unknown; this study has {', '.join(self.sizes)}"
                )
            for size in block.sizes or self.sizes:
                entry = self.sizes[size]
                paths = {"base": entry.base, "instruct": entry.instruct}
                embedded = not any(paths.values())
                if not embedded and block.control:
                    raise ValueError(
                        f"axes {block.name!r}: size {size} is a folder of weights, whose pretraining text is "
                        "unknown: only models of the embedded ladder can have a control"
                    )
                for kind in block.kinds:
                    if not embedded and paths[kind] is None:
                        raise ValueError(f"axes {block.name!r}: size {size} has no folder for its {kind} model")
        names = [block.name for block in self.axes]
        if len(set(names)) != len(names):
            raise ValueError(f"axes must have different names, got {names}")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelNeed:
    """Weights that must exist before a cell can run, made by us: a model of the embedded ladder."""

    size: str
    kind: Kind
    seed: int

    @property
    def name(self) -> str:
        return f"{self.size}-{self.kind}-{self.seed}"

    @property
    def base(self) -> ModelNeed:
        """What it is made from; a base itself."""
        return replace(self, kind="base")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run of the study."""

    id: str  # 12 hexadecimal digits, of the resolved configuration (its name left out)
    name: str  # readable and unique in the study: "s-base-seed0", "m-base-tau25-seed1", "s-base-control-seed0"
    variant: str  # order and switches that differ from the study's own; "" for its plain runs
    axes: tuple[str, ...]  # the blocks that contain it
    method: Literal["grpo", "pretrain"]
    size: str
    kind: Kind
    seed: int
    tau: float
    group_size: int
    config: RunConfig
    overrides: tuple[str, ...]  # what makes `config` out of RunConfig's defaults, dotted
    needs: ModelNeed | None  # None: the weights are a folder
    cost: Cost

    @property
    def prompts(self) -> int:
        """Prompts a step."""
        return self.config.batch.prompts

    @property
    def folder(self) -> str:
        """Where the run lies, inside the study's folder."""
        return f"{CELLS}/{self.name}.{self.id[:8]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The cells of a study in the order of the ladder, and the models that must be made for them."""

    study: StudyConfig
    cells: tuple[Cell, ...]
    models: tuple[tuple[ModelNeed, Cost], ...]  # base before instruct


def load_study(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> StudyConfig:
    """Reads a study from a YAML file or a preset.

    Args:
        source: a path that ends in .yaml or .yml, or a preset's name ("smoke", "micro", "paper"). A file with a line
            `extends: paper` says only what is different: its mappings are merged into those of the preset or file that
            it names, everything else in it replaces.
        overrides: dotted, "run.steps=20"; see `grpo_engine.config.apply_overrides`.

    Returns:
        The study, checked; each of its cells has been resolved once, so that a wrong run setting shows here.

    Raises:
        ValueError: a wrong key or value, named by its dotted path; no such preset.
        FileNotFoundError: no such file.
    """
    data = apply_overrides(_extended(source), overrides)
    study = validate(StudyConfig, data, where=f"study {os.fspath(source)}")
    _cells(study)
    return study


def _extended(source: str | os.PathLike[str]) -> dict[str, Any]:
    def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
        both = {
            k: merged(below[k], v) if isinstance(v, Mapping) and isinstance(below.get(k), Mapping) else v
            for k, v in above.items()
        }
        return {**below, **both}

    data, seen = load_yaml(os.fspath(source)), [os.fspath(source)]
    while (parent := data.pop("extends", None)) is not None:
        if parent in seen:
            raise ValueError(f"study {source}: it extends itself: {' -> '.join([*seen, parent])}")
        seen.append(parent)
        data = merged(load_yaml(parent), data)
    return data


def save_study(study: StudyConfig, path: str | os.PathLike[str]) -> None:
    """Writes a study as YAML that `load_study` reads back to an equal one.

    Args:
        study: the study.
        path: a file ending in .yaml.
    """
    Path(path).write_text(yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def plan(study: StudyConfig) -> Plan:
    """Expands a study into its cells.

    The order is that of the blocks, and inside a block: sizes as the study lists them, kinds, tau, group sizes,
    seeds; controls after the runs that they are a control for.

    Args:
        study: the study.

    Returns:
        The plan, with the costs that `forecast` gives it.

    Raises:
        ValueError: a cell's configuration is wrong, or two different cells would get one name; the message
            names the cell.
    """
    cells = []
    needs: dict[ModelNeed, None] = {}
    for cell in _cells(study):
        if (rounds := cell["config"].batch.sampling_rounds) > 1:
            raise ValueError(
                f"{cell['name']}: batch.sampling_rounds must be 1 in a study, got {rounds}: runs are averaged at equal "
                "prompts, and replaced groups make them differ from run to run"
            )
        need = None
        if cell["config"].model.path is None:
            need = ModelNeed(size=cell["size"], kind=cell["kind"], seed=cell["config"].model.seed)
            needs[need.base] = None
            needs[need] = None
        cost = forecast(cell["config"], estimate_of(study, cell["size"], cell["kind"]))
        cells.append(Cell(**cell, needs=need, cost=cost))
    order = sorted(needs, key=lambda n: (list(study.sizes).index(n.size), n.seed, n.kind))
    return Plan(study=study, cells=tuple(cells), models=tuple((n, _model_cost(n, study)) for n in order))


def estimate_of(study: StudyConfig, size: str, kind: Kind) -> EstimateConfig:
    """The study's estimate, with the response length of a size and kind where that has its own."""
    own = study.sizes[size].response_tokens.get(kind)
    return study.estimate.model_copy(update={"response_tokens": own} if own else {})


def _cells(study: StudyConfig) -> list[dict[str, Any]]:
    """The cells without needs and cost."""
    found: dict[str, dict[str, Any]] = {}
    for block in study.axes:
        sizes = block.sizes or tuple(study.sizes)
        reuse: list[dict[str, Any]] = [{"unique": u} for u in block.unique] or [{"tau": t} for t in block.tau]
        for size, kind, data, group, order, variant, seed in itertools.product(
            sizes, block.kinds, reuse, block.group_size or (None,), block.order or (None,), block.variants or ("",),
            block.seeds,
        ):  # fmt: skip
            _add(found, _cell(study, block, size, kind, seed, group=group, order=order, variant=variant, **data))
        for size, kind, seed in itertools.product(sizes, block.control, block.seeds):
            _add(found, _cell(study, block, size, kind, seed, method="pretrain"))
    names: dict[str, str] = {}
    for cell in found.values():
        if cell["name"] in names:
            raise ValueError(
                f"study {study.name}: two different cells would be called {cell['name']!r}: put the setting that "
                "differs between their blocks on an axis, or into a study of its own"
            )
        names[cell["name"]] = cell["id"]
    return list(found.values())


def _add(found: dict[str, dict[str, Any]], cell: dict[str, Any]) -> None:
    if cell["id"] in found:
        known = found[cell["id"]]
        if cell["axes"][0] not in known["axes"]:
            known["axes"] += cell["axes"]
    else:
        found[cell["id"]] = cell


def _cell(
    study: StudyConfig,
    block: AxesConfig,
    size: str,
    kind: Kind,
    seed: int,
    *,
    tau: float = 1.0,
    unique: int | None = None,
    group: int | None = None,
    order: Order | None = None,
    variant: str = "",
    method: Literal["grpo", "pretrain"] = "grpo",
) -> dict[str, Any]:
    entry = study.sizes[size]
    folder = entry.base if kind == "base" else entry.instruct
    data = apply_overrides(study.run, _dotted(entry.run))
    data = apply_overrides(data, _dotted(block.run))
    data = apply_overrides(data, [f"seed={seed}", f"method={method}", f"model.kind={kind}"])
    data["model"] |= {"path": folder} if folder else {"size": size, "seed": data["model"].get("seed", seed)}
    data["model"].pop("prompt_template" if kind == "instruct" else "chat_template_kwargs", None)  # the other kind's
    if entry.params_nominal is not None:
        data["model"]["params_nominal"] = entry.params_nominal
    parts = [size, kind, *(["control"] if method == "pretrain" else [])]
    plain: RunConfig = validate(RunConfig, data, where=f"study {study.name}, cell {'-'.join(parts)}")
    switches: list[str] = []
    if order is not None and (order == "shuffled") != plain.task.shuffle:
        data = apply_overrides(data, [f"task.shuffle={json.dumps(order == 'shuffled')}"])
        switches.append(order)
    if variant and block.variants[variant]:
        data = apply_overrides(data, _dotted(block.variants[variant]))
        switches.append(variant)
    if group is not None:
        data = apply_overrides(data, [f"batch.group_size={group}"])
    seen = plain.steps * plain.batch.prompts
    if unique is not None:
        if unique > seen:
            raise ValueError(f"axes {block.name!r}: unique={unique} is more than the {seen} prompts that a run sees")
        tau = seen / unique
    if tau != 1:
        data = apply_overrides(data, [f"task.train_problems={unique or max(1, round(seen / tau))}"])
        parts.append(f"U{unique}" if unique else f"tau{tau:g}")
    if group is not None and group != plain.batch.group_size:
        parts.append(f"G{group}")
    name = "-".join([*parts, *switches, f"seed{seed}"])
    config: RunConfig = validate(RunConfig, data | {"name": name}, where=f"study {study.name}, cell {name}")
    return {
        "id": run_id(config.model_dump(mode="json", exclude={"name"})),
        "name": name,
        "variant": "-".join(switches),
        "axes": (block.name,),
        "method": method,
        "size": size,
        "kind": kind,
        "seed": seed,
        "tau": float(tau),
        "group_size": config.batch.group_size,
        "config": config,
        "overrides": tuple(_difference(config)),
    }


def _dotted(overrides: Mapping[str, Any]) -> list[str]:
    """{"optimizer.lr": 1e-4} or {"optimizer": {"lr": 1e-4}} as ["optimizer.lr=0.0001"]."""
    out = []
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            out += [f"{key}.{inner}" for inner in _dotted(value)]
        else:
            out.append(f"{key}={json.dumps(value)}")
    return out


def _difference(config: RunConfig) -> list[str]:
    """Dotted overrides that make `config` out of the defaults; where the weights are is always said."""

    def walk(ours: Mapping[str, Any], default: Mapping[str, Any], prefix: str) -> list[str]:
        out = []
        for key, value in ours.items():
            if isinstance(value, dict) and isinstance(default.get(key), dict) and value and default[key]:
                out += walk(value, default[key], f"{prefix}{key}.")
            elif key not in default or value != default[key]:
                out.append(f"{prefix}{key}={json.dumps(value)}")
        return out

    default = RunConfig().model_dump(mode="json", exclude={"model": {"size", "path"}})
    source = "size" if config.model.path is None else "path"
    unused = "path" if source == "size" else "size"
    return walk(config.model_dump(mode="json", exclude={"model": {unused}}), default, "")


def _model_cost(need: ModelNeed, study: StudyConfig) -> Cost:
    params = num_params(ModelSource(size=need.size, kind=need.kind))
    return pretraining(params, float(training_tokens(need.size, need.kind)), study.estimate)
