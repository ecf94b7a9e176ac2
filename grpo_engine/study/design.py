"""A study is a list of cells that can be read before it is paid for.

`StudyConfig` says what varies (sizes, kinds, seeds, data reuse, group size) and `plan` expands it into `Cell`s: one
run each, with a resolved `RunConfig`, an identity that is a hash of it, and an estimate of what it will cost. Two
blocks of axes that meet in one configuration share its cell, so no run is paid for twice.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from ..config import Config, ModelSource, RunConfig, apply_overrides, load_yaml, validate
from ..records import run_id

if TYPE_CHECKING:
    from rich.table import Table

Kind = Literal["base", "instruct"]
PLAN_FILE = "plan.json"
STUDY_FILE = "study.yaml"
CELLS = "cells"


class SizeConfig(Config):
    """One rung of the ladder: where its weights are and what its runs need to be told."""

    base: str | None = None  # Hugging Face folder; None: the embedded ladder's model of this size
    instruct: str | None = None
    params_nominal: Annotated[float, Field(gt=0)] | None = None  # what the name says (0.5e9), recorded only
    run: dict[str, Any] = {}  # overrides of the run at this size, dotted ("optimizer.lr": 1e-4)


class AxesConfig(Config):
    """A block of cells: the full product of its axes."""

    name: str = "main"
    sizes: tuple[str, ...] = ()  # empty: every size of the study
    kinds: tuple[Kind, ...] = ("base",)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    tau: tuple[Annotated[float, Field(ge=1)], ...] = (1.0,)  # data reuse: prompts seen / different prompts
    group_size: tuple[Annotated[int, Field(ge=2)], ...] = ()  # empty: the run's own
    control: tuple[Kind, ...] = ()  # and, for these kinds, a plain-pretraining run of the same length per size and seed
    run: dict[str, Any] = {}  # overrides for this block, dotted

    @model_validator(mode="after")
    def _not_empty(self) -> AxesConfig:
        for axis in ("kinds", "seeds", "tau"):
            values = getattr(self, axis)
            if not values:
                raise ValueError(f"axes {self.name!r}: {axis} must not be empty")
        for axis in ("sizes", "kinds", "seeds", "tau", "group_size", "control"):
            values = getattr(self, axis)
            if len(set(values)) != len(values):
                raise ValueError(f"axes {self.name!r}: {axis} holds a value twice: {list(values)}")
        return self


class EstimateConfig(Config):
    """What the plan assumes of cells that have not run (`grpo_engine.study.run.measured_plan` knows the others)."""

    prompt_tokens: Annotated[float, Field(gt=0)] = 6.0  # a prompt
    answer_tokens: Annotated[float, Field(gt=0)] = 5.0  # an answer
    flops_per_s: Annotated[float, Field(gt=0)] = 40e9  # a process, on large matrices
    us_per_token: Annotated[float, Field(ge=0)] = 6.0  # a trained token, besides: what does not shrink with N
    start_s: Annotated[float, Field(ge=0)] = 4.0  # until a process does its first step
    eval_sets: Annotated[int, Field(ge=1)] = 4


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

    @property
    def name(self) -> str:
        return f"{self.size}-{self.kind}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """An estimate, or a measurement where `measured`."""

    trained_tokens: float
    flops: float
    seconds: float  # of one process
    measured: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run of the study."""

    id: str  # 12 hexadecimal digits, of the resolved configuration (its name left out)
    name: str  # readable and unique in the study: "s-base-seed0", "m-base-tau25-seed1", "s-base-control-seed0"
    axes: tuple[str, ...]  # the blocks that asked for it
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
        source: a path that ends in .yaml or .yml, or a preset's name ("smoke", "micro", "paper").
        overrides: dotted, "run.steps=20"; see `grpo_engine.config.apply_overrides`.

    Returns:
        The study, checked; each of its cells has been resolved once, so that a wrong run setting shows here.

    Raises:
        ValueError: a wrong key or value, named by its dotted path; no such preset.
        FileNotFoundError: no such file.
    """
    data = apply_overrides(load_yaml(os.fspath(source)), overrides)
    study = validate(StudyConfig, data, where=f"study {os.fspath(source)}")
    _cells(study)
    return study


def save_study(study: StudyConfig, path: str | os.PathLike[str]) -> None:
    """Writes a study as YAML that `load_study` reads back to an equal one.

    Args:
        study: the study.
        path: a file ending in .yaml.
    """
    Path(path).write_text(yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False))


def plan(study: StudyConfig) -> Plan:
    """Expands a study into its cells.

    The order is that of the blocks, and inside a block: sizes as the study lists them, kinds, tau, group sizes,
    seeds; controls after the runs that they are a control for.

    Args:
        study: the study.

    Returns:
        The plan, with estimated costs: 6 N T for training, 2 N T for the reference pass where there is one and for
        sampling, and evaluation; seconds by the rates of `study.estimate`.

    Raises:
        ValueError: a cell's configuration is wrong, or two different cells would get one name; the message
            names the cell.
    """
    sizes: dict[tuple[str, Kind], int] = {}
    cells = []
    needs: dict[ModelNeed, None] = {}
    for cell in _cells(study):
        key = (cell["size"], cell["kind"])
        if key not in sizes:
            sizes[key] = num_params(cell["config"].model)
        need = None
        if cell["config"].model.path is None:
            need = ModelNeed(size=cell["size"], kind=cell["kind"])
            needs[ModelNeed(size=cell["size"], kind="base")] = None
            needs[need] = None
        cost = _run_cost(cell["config"], sizes[key], study.estimate)
        cells.append(Cell(**cell, needs=need, cost=cost))
    order = sorted(needs, key=lambda n: (list(study.sizes).index(n.size), n.kind))
    return Plan(study=study, cells=tuple(cells), models=tuple((n, _model_cost(n, study)) for n in order))


def _cells(study: StudyConfig) -> list[dict[str, Any]]:
    """The cells without needs and cost."""
    found: dict[str, dict[str, Any]] = {}
    for block in study.axes:
        sizes = block.sizes or tuple(study.sizes)
        for size, kind, tau, group in itertools.product(
            sizes, block.kinds, block.tau, block.group_size or (None,)
        ):
            for seed in block.seeds:
                _add(found, _cell(study, block, size, kind, seed, tau, group, "grpo"))
        for size, kind, seed in itertools.product(sizes, block.control, block.seeds):
            _add(found, _cell(study, block, size, kind, seed, 1.0, None, "pretrain"))
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
    tau: float,
    group: int | None,
    method: Literal["grpo", "pretrain"],
) -> dict[str, Any]:
    entry = study.sizes[size]
    folder = entry.base if kind == "base" else entry.instruct
    data = apply_overrides(study.run, _dotted(entry.run))
    data = apply_overrides(data, _dotted(block.run))
    data = apply_overrides(data, [f"seed={seed}", f"method={method}", f"model.kind={kind}"])
    data["model"] |= {"path": folder} if folder else {"size": size}
    if entry.params_nominal is not None:
        data["model"]["params_nominal"] = entry.params_nominal
    if group is not None:
        data = apply_overrides(data, [f"batch.group_size={group}"])
    parts = [size, kind, *(["control"] if method == "pretrain" else [])]
    default = validate(RunConfig, data, where=f"study {study.name}, cell {'-'.join(parts)}")
    if tau != 1:
        unique = max(1, round(default.steps * default.batch.prompts / tau))
        data = apply_overrides(data, [f"task.train_problems={unique}"])
        parts.append(f"tau{tau:g}")
    if group is not None and group != _default_group(study, block, size):
        parts.append(f"G{group}")
    name = "-".join([*parts, f"seed{seed}"])
    config: RunConfig = validate(RunConfig, data | {"name": name}, where=f"study {study.name}, cell {name}")
    return {
        "id": run_id(config.model_dump(mode="json", exclude={"name"})),
        "name": name,
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


def _default_group(study: StudyConfig, block: AxesConfig, size: str) -> int:
    data = apply_overrides(study.run, _dotted(study.sizes[size].run))
    data = apply_overrides(data, _dotted(block.run))
    return (data.get("batch") or {}).get("group_size", RunConfig().batch.group_size)


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


# ------------------------------------------------------------------------------------------- costs


def num_params(source: ModelSource) -> int:
    """Non-embedding parameters of a model, without loading its weights.

    Args:
        source: a folder with config.json, or a size of the embedded ladder.

    Returns:
        N of the scaling laws. For a folder that is not there (yet), the nominal size, if one is given: enough for
        an estimate.

    Raises:
        FileNotFoundError, ValueError: no config.json and no nominal size, or the ladder has no such size.
    """
    if source.path is not None and source.params_nominal and not (Path(source.path) / "config.json").is_file():
        return round(source.params_nominal)
    import torch

    from ..model import Model

    with torch.device("meta"):
        return Model(_architecture(source)).num_non_embedding


def _architecture(source: ModelSource) -> Any:
    if source.path is not None:
        from ..weights import read_config

        return read_config(source.path)
    from ..pretrain import architecture

    return architecture(source.size)


def _run_cost(config: RunConfig, params: int, estimate: EstimateConfig) -> Cost:
    answers = config.steps * config.batch.prompts * config.batch.group_size
    tokens = answers * (estimate.prompt_tokens + estimate.answer_tokens)
    flops = 6.0 * params * tokens
    if config.method == "grpo":
        if config.loss.kl_coef > 0:
            flops += 2.0 * params * tokens
        prompts = config.steps * config.batch.prompts * estimate.prompt_tokens  # a prompt is computed once a group
        flops += 2.0 * params * (prompts + answers * estimate.answer_tokens)
    tokens_evaluated = _eval_answers(config, estimate) * (estimate.prompt_tokens + estimate.answer_tokens)
    flops += 2.0 * params * tokens_evaluated
    passed = tokens + tokens_evaluated / 3  # an evaluation has no backward pass
    seconds = estimate.start_s + flops / estimate.flops_per_s + estimate.us_per_token * 1e-6 * passed
    return Cost(trained_tokens=tokens, flops=flops, seconds=seconds)


def _eval_answers(config: RunConfig, estimate: EstimateConfig) -> float:
    count = config.evaluation.count
    others = math.ceil(count / config.evaluation.others_every) if count else 0
    passes = count + (estimate.eval_sets - 1) * others
    each = config.evaluation.samples + (1 if config.evaluation.greedy else 0)
    return passes * (config.task.eval_problems or 500) * each


def _model_cost(need: ModelNeed, study: StudyConfig) -> Cost:
    from ..pretrain import training_tokens

    params = num_params(ModelSource(size=need.size, kind=need.kind))
    tokens = float(training_tokens(need.size, need.kind))
    flops = 6.0 * params * tokens
    estimate = study.estimate
    seconds = estimate.start_s + flops / estimate.flops_per_s + estimate.us_per_token * 1e-6 * tokens
    return Cost(trained_tokens=tokens, flops=flops, seconds=seconds)


# ---------------------------------------------------------------------------------------- as a table


def plan_rows(plan: Plan, states: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The plan as rows for a table or for JSON: models first, then cells.

    Args:
        plan: the plan.
        states: what is known of each cell or model by name ("done", "running 12 of 40", ...); None for a dry run.

    Returns:
        One dict a row: id, name, axes, method, size, kind, seed, tau, group_size, steps, trained_tokens, flops,
        seconds, measured, state, overrides.
    """
    rows = []
    for need, cost in plan.models:
        rows.append(
            {
                "id": None, "name": f"model {need.name}", "axes": [], "method": "prepare", "size": need.size,
                "kind": need.kind, "seed": None, "tau": None, "group_size": None, "steps": None,
                "overrides": [], "state": (states or {}).get(f"model {need.name}"),
            }
            | _cost_row(cost)
        )  # fmt: skip
    for cell in plan.cells:
        rows.append(
            {
                "id": cell.id, "name": cell.name, "axes": list(cell.axes), "method": cell.method, "size": cell.size,
                "kind": cell.kind, "seed": cell.seed, "tau": cell.tau, "group_size": cell.group_size,
                "steps": cell.config.steps, "overrides": list(cell.overrides),
                "state": (states or {}).get(cell.name),
            }
            | _cost_row(cell.cost)
        )  # fmt: skip
    return rows


def _cost_row(cost: Cost) -> dict[str, Any]:
    return {
        "trained_tokens": cost.trained_tokens,
        "flops": cost.flops,
        "seconds": cost.seconds,
        "measured": cost.measured,
    }


def plan_json(plan: Plan) -> dict[str, Any]:
    """What `plan.json` holds: the study's name, every row of `plan_rows`, and totals.

    Args:
        plan: the plan.

    Returns:
        A JSON-like dict.
    """
    rows = plan_rows(plan)
    return {
        "study": plan.study.name,
        "cells": [r for r in rows if r["method"] != "prepare"],
        "models": [r for r in rows if r["method"] == "prepare"],
        "total": {k: sum(r[k] for r in rows) for k in ("trained_tokens", "flops", "seconds")},
    }


def plan_table(plan: Plan, states: Mapping[str, str] | None = None, *, jobs: int | None = None) -> Table:
    """The plan as a table with a total, for a dry run or `study status`.

    Args:
        plan: the plan.
        states: as for `plan_rows`; None leaves the column out.
        jobs: processes side by side, for the estimate of the wall-clock time; None: one a CPU core.

    Returns:
        A rich table; times that are estimates carry a "~".
    """
    from rich.table import Table

    jobs = jobs or num_cores()
    rows = plan_rows(plan, states)
    total = plan_json(plan)["total"]
    wall = max(total["seconds"] / jobs, max(r["seconds"] for r in rows))
    table = Table(
        title=f"study {plan.study.name}",
        title_justify="left",
        caption=f"{len(plan.cells)} cells and {len(plan.models)} models to prepare: {human(total['trained_tokens'])} "
        f"tokens, {total['flops']:.1e} FLOPs, about {duration(total['seconds'])} of one process, "
        f"about {duration(wall)} with {jobs} at once",
        caption_justify="left",
    )
    for name in ("id", "cell"):
        table.add_column(name, no_wrap=True)
    for name in ("steps", "tokens", "FLOPs", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    if states is not None:
        table.add_column("state")
    for r in rows:
        table.add_row(
            r["id"] or "",
            r["name"],
            "" if r["steps"] is None else str(r["steps"]),
            human(r["trained_tokens"]),
            f"{r['flops']:.1e}",
            ("" if r["measured"] else "~") + duration(r["seconds"]),
            *([r["state"] or ""] if states is not None else []),
        )
    return table


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def human(number: float) -> str:
    """1234567 as "1.23M": three digits and a suffix.

    Args:
        number: not negative.

    Returns:
        Text of at most seven characters for numbers under 1e15.
    """
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """75 as "1m15s".

    Args:
        seconds: not negative.

    Returns:
        "0.4s", "42s", "1m15s", "3h02m" or "4.1d".
    """
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    if seconds < 59.5:
        return f"{seconds:.0f}s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}m{rest:02d}s"
    if seconds < 48 * 3600:
        hours, rest = divmod(round(seconds / 60), 60)
        return f"{hours}h{rest:02d}m"
    return f"{seconds / 86400:.1f}d"
