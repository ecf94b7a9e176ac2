"""Configuration: one small frozen model per stage, gathered in `RunConfig`.

A wrong key or value is an error that names it. Presets are YAML files inside the package; a dotted override
(``optimizer.lr=1e-4``) changes one value. The resolved configuration is the first thing a run writes, and its
hash is the run's id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

from grpo_engine.system import plugins

PRESETS = Path(__file__).parent / "presets"

Positive = Annotated[int, Field(ge=1)]
Scoring = Literal["default", "paper"]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# of a chat template's arguments, what follows from the problem or from how its text is used
TEMPLATE_ARGUMENTS = {"messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message",
                      "tokenize", "return_tensors", "return_dict", "return_assistant_tokens_mask"}  # fmt: skip


def named_or_target(*names: str) -> pydantic.AfterValidator:
    """Of a setting that is one of some names, or "module:function" of the user's own."""

    def check(name: str) -> str:
        if name not in names and not plugins.is_target(name):
            known = ", ".join(map(repr, names[:-1]))
            raise ValueError(f"must be {known} or {names[-1]!r}, got {name!r}; 'module:function' names your own")
        return name

    return pydantic.AfterValidator(check)


class Config(pydantic.BaseModel):
    """What all configurations share: frozen, unknown keys refused."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class ModelSource(Config):
    """Which weights a run starts from: a Hugging Face model, or one of the embedded ladder."""

    path: str | None = None  # Hugging Face folder, .gguf file, or a name on the hub: OWNER/NAME, OWNER/NAME@REVISION
    size: str | None = None  # size of the embedded ladder, for instance "s"; exclusive with path
    kind: Literal["base", "instruct"] = "base"  # instruct models get their prompts through the chat template
    seed: Annotated[int, Field(ge=0)] = 0  # embedded ladder: of first weights and corpus; several bases of one size
    params_nominal: float | None = None  # what the model's name says, for instance 0.5e9; only recorded
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_invariant: bool = True  # False: products on CUDA by cuBLAS; sampling and training differ in bits
    system_prompt: str | None = None  # goes before every prompt, in place of the system message of a row that has one
    chat_template_kwargs: dict[str, Any] = {}  # kind=instruct: arguments of the chat template, as enable_thinking
    prompt_template: str | None = None  # kind=base: what is shown in place of a prompt, with {prompt} in it

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> ModelSource:
        if (self.path is None) == (self.size is None):
            raise ValueError("give either path (a Hugging Face folder) or size (embedded ladder), and not both")
        if self.path is not None and self.seed:
            raise ValueError(f"seed belongs to models of the embedded ladder, got {self.seed} and a path")
        return self

    @pydantic.model_validator(mode="after")
    def _prompts(self) -> ModelSource:
        if self.chat_template_kwargs and self.kind != "instruct":
            raise ValueError(f"chat_template_kwargs belongs to kind=instruct, got kind={self.kind}")
        if taken := TEMPLATE_ARGUMENTS & self.chat_template_kwargs.keys():
            raise ValueError(f"chat_template_kwargs must not hold {', '.join(sorted(taken))}: a run sets it")
        if self.prompt_template is not None and self.kind != "base":
            raise ValueError(f"prompt_template belongs to kind=base, got kind={self.kind}: a chat has its model's template")
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template must hold {{prompt}}, got {self.prompt_template!r}")
        if self.path is None and (self.system_prompt, self.prompt_template, self.chat_template_kwargs) != (None, None, {}):
            raise ValueError("system_prompt, prompt_template and chat_template_kwargs belong to models with a path")
        return self


class TaskConfig(Config):
    """Problems to train on and to be tested on."""

    name: str = "micro"  # micro, files, or "module:function" of your own: see `tasks`
    train: str | list[str] | None = None  # files: what to train on, see `tasks.rows`; your own: what you like
    evals: dict[str, str | list[str]] = {}  # likewise: name -> files
    train_problems: Positive | None = None  # how many different training problems; None: all, or as many as needed
    subset: Literal["nested", "independent"] = "nested"  # which: a smaller number's are among a larger one's, or not
    eval_problems: Positive | None = 500  # problems an evaluation set is cut to; None: all
    eval_draw: Literal["test", "selection"] = "test"  # micro only; selection: others, to choose settings on
    shuffle: bool = True  # False: a curriculum, easy to hard by pass rate or grade; equals in their file's order

    @pydantic.model_validator(mode="after")
    def _files(self) -> TaskConfig:
        if self.name not in ("micro", "files") and not plugins.is_target(self.name):
            raise ValueError(f"task.name must be micro, files or 'module:function', got {self.name!r}")
        if self.name == "files" and self.train is None:
            raise ValueError("task.train must name a file of problems when task.name is files")
        if self.name == "micro" and (self.train is not None or self.evals):
            raise ValueError("task.train and task.evals belong to task.name=files, not to micro")
        if self.name != "micro" and self.eval_draw != "test":
            raise ValueError("task.eval_draw belongs to task.name=micro: a file's problems are named by task.evals")
        return self


class RolloutConfig(Config):
    """How answers are sampled."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    top_k: Positive | None = None  # None: off
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_new_tokens: Positive = 16
    max_prompt_tokens: Positive | None = None  # longer prompts are left out, and counted
    num_pages: Positive | None = None  # KV pages; None: enough for max_running sequences
    page_size: Annotated[int, Field(ge=16, multiple_of=16)] = 16  # tokens a KV page
    max_running: Positive = 512  # sequences decoded at once
    max_step_tokens: Positive = 8192  # tokens a forward pass of the rollout


class RewardConfig(Config):
    """How answers are scored."""

    timeout_s: Annotated[float, Field(gt=0)] = 10.0  # wall-clock limit of one answer
    workers: Positive = 2  # killable processes; none are started when every scorer is harmless
    scoring: Scoring = "default"  # of problems from files; paper: as its code scores, errors included (`rewards.paper`)
    function: Annotated[str, Field(pattern=plugins.TARGET)] | None = None  # "module:function" of your own, for all problems
    overlong_buffer: Positive | None = None  # tokens before the length limit in which a response loses reward (DAPO)
    overlong_penalty: NonNegative = 1.0  # what it has lost at the limit; training alone sees it
    scorer: str | dict[str, str] | None = None  # name of the scorer of all problems, or by data_source: {"my/*": math}
    unprotected: bool = False  # run programs where the kernel refuses a protection of `rewards.sandbox`

    @pydantic.model_validator(mode="after")
    def _one_choice(self) -> RewardConfig:
        if self.scorer is not None and self.function is not None:
            raise ValueError(f"give scorer or function, not both, got {self.scorer!r} and {self.function!r}")
        return self


class AdvantageConfig(Config):
    """How rewards become advantages (`grpo_engine.train.advantages`)."""

    estimator: Annotated[str, named_or_target("grpo", "dr_grpo", "rloo", "reinforce_pp")] = "grpo"
    std: Literal["unbiased", "population", "none"] = "unbiased"  # estimator=grpo: see `ops.group_advantages`
    eps: NonNegative = 1e-6  # estimator=grpo and reinforce_pp: added to the standard deviation

    @pydantic.model_validator(mode="after")
    def _std(self) -> AdvantageConfig:
        if self.std != "unbiased" and self.estimator != "grpo" and not plugins.is_target(self.estimator):
            raise ValueError(f"std belongs to estimator=grpo, got std={self.std} and estimator={self.estimator}")
        return self


class LossConfig(Config):
    """The policy loss (`ops.policy_loss`)."""

    objective: Annotated[str, named_or_target("clip", "cispo")] = "clip"  # your own: `grpo_engine.train.loss`
    ratio: Literal["token", "sequence"] = "token"  # sequence: GSPO
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    clip_high: NonNegative = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    kl: Literal["k1", "k2", "k3"] = "k3"
    kl_coef: NonNegative = 0.001  # 0 loads no reference model
    kl_ratio: bool = False  # multiply each KL estimate by the ratio
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    constant_length: Positive | None = None  # tokens; aggregation=constant divides by N * this
    mask_truncated: bool = False  # leave responses out that ended at the length limit; no denominator counts them

    @pydantic.model_validator(mode="after")
    def _constant(self) -> LossConfig:
        if (self.aggregation == "constant") != (self.constant_length is not None):
            raise ValueError("loss.constant_length goes with loss.aggregation=constant, and only with it")
        return self


class OptimizerConfig(Config):
    """AdamW with a constant learning rate after a linear warm-up."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NonNegative = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0  # global gradient norm


class BatchConfig(Config):
    """How many answers a step samples and how they are cut for training."""

    prompts: Positive = 64  # P
    group_size: Annotated[int, Field(ge=2)] = 8  # G
    sampling_rounds: Positive = 1  # 2 or more: so many rounds, at most, replace groups of equal reward (DAPO)
    minibatches: Positive = 1  # optimizer steps a GRPO step; prompts must divide by it
    tokens_per_micro_batch: Positive = 4096  # forward and backward at once; changes memory and rounding, not results
    activation_checkpointing: bool = False  # keep a layer's input, compute the rest again in backward; changes no bit

    @pydantic.model_validator(mode="after")
    def _divides(self) -> BatchConfig:
        if self.prompts % self.minibatches:
            raise ValueError(f"batch.prompts={self.prompts} must divide by batch.minibatches={self.minibatches}")
        return self


class EvalConfig(Config):
    """When and how held-out problems are answered."""

    count: Annotated[int, Field(ge=0)] = 12  # evaluations of a run, spaced evenly in log(step), step 0 and last included
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.7
    samples: Positive = 4  # answers to each problem at that temperature
    greedy: bool = True  # and one greedy answer besides
    others_every: Positive = 4  # sets besides the first: at the first, the last and each others_every-th evaluation


class RunConfig(Config):
    """Everything that decides what a run computes."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    steps: Positive = 100
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is a GPU; see `grpo_engine.system.device`
    method: Literal["grpo", "pretrain"] = "grpo"  # pretrain: the control, plain language modelling of the same length
    model: ModelSource = ModelSource(size="s")
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    evaluation: EvalConfig = EvalConfig()
    checkpoint_every: Positive = 20  # steps; how much a kill can cost, and nothing else

    @property
    def most_prompts(self) -> int:
        """The training prompts that a run samples for, at the most."""
        return self.steps * self.batch.prompts * self.batch.sampling_rounds

    @pydantic.model_validator(mode="after")
    def _replaced_groups(self) -> RunConfig:
        if self.batch.sampling_rounds > 1 and self.advantage.estimator == "reinforce_pp":
            raise ValueError(
                f"batch.sampling_rounds={self.batch.sampling_rounds} replaces groups of equal reward, which have a gradient "
                "with advantage.estimator=reinforce_pp"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _buffer(self) -> RunConfig:
        buffer, limit = self.reward.overlong_buffer, self.rollout.max_new_tokens
        if buffer is not None and buffer > limit:
            raise ValueError(f"reward.overlong_buffer={buffer} must be at most rollout.max_new_tokens={limit}")
        return self


def load_yaml(source: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, or in the preset of that name.

    Args:
        source: a path that ends in .yaml or .yml, or the name of a preset ("smoke").

    Returns:
        The parsed mapping; an empty file gives {}.

    Raises:
        ValueError: no such preset, not YAML, or not a mapping at the top level; the message names the file.
        FileNotFoundError: no such file.
    """
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = PRESETS / f"{source}.yaml"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
            raise ValueError(f"no preset {str(source)!r}: presets are {known}; a file must end in .yaml")
    if not path.exists():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_YamlLoader)
    except yaml.YAMLError as e:
        raise ValueError(f"{path}: not YAML: {e}") from e
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{path}: the top level must be a mapping, got {type(data).__name__}")
    return data


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's idea of a number: 1e-4 is one (YAML 1.1 wants 1.0e-4)."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a nested mapping with dotted overrides applied.

    Args:
        data: nested mapping.
        overrides: "a.b.c=value" each; the value is read as YAML (numbers, booleans, null, [lists]).

    Returns:
        The new mapping; keys on the way are made where absent (validation then says whether they exist).

    Raises:
        ValueError: an override without "=" or a path through a value that is no mapping.
    """
    out: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in data.items()}
    for item in overrides:
        key, eq, text = item.partition("=")
        if not eq or not key:
            raise ValueError(f"an override must be key.path=value, got {item!r}")
        *parents, last = key.split(".")
        node = out
        for name in parents:
            child = node.get(name)
            if child is not None and not isinstance(child, Mapping):
                raise ValueError(f"override {item!r}: {name} is a value, not a group of settings")
            node[name] = dict(child or {})
            node = node[name]
        node[last] = yaml.load(text, Loader=_YamlLoader)
    return out


def validate(model: type[Config], data: Mapping[str, Any], *, where: str = "configuration") -> Any:
    """Builds a configuration and turns pydantic's report into one line per fault.

    Args:
        model: the class to build.
        data: nested mapping.
        where: the name of the source, for messages.

    Returns:
        An instance of `model`.

    Raises:
        ValueError: one line per wrong key or value: its dotted path, what was wanted, what came.
    """
    try:
        return model.model_validate(dict(data))
    except pydantic.ValidationError as e:
        lines = []
        for fault in e.errors():
            path = ".".join(str(p) for p in fault["loc"]) or model.__name__
            if fault["type"] == "extra_forbidden":
                known = ", ".join(sorted(_fields_at(model, fault["loc"][:-1])))
                lines.append(f"{path}: unknown key; known keys here: {known}")
            else:
                message = fault["msg"].removeprefix("Value error, ")
                got = "" if fault["type"] == "value_error" else f", got {fault['input']!r}"
                lines.append(f"{path}: {message}{got}")
        raise ValueError(f"{where}:\n  " + "\n  ".join(lines)) from None


def _fields_at(model: type[pydantic.BaseModel], path: Sequence[int | str]) -> set[str]:
    for name in path:
        field = model.model_fields.get(str(name))
        nested = field.annotation if field else None
        if not (isinstance(nested, type) and issubclass(nested, pydantic.BaseModel)):
            return set()
        model = nested
    return set(model.model_fields)


def load_run_config(source: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run configuration of a YAML file with dotted overrides, or of overrides alone.

    Args:
        source: path or preset name of a *run* configuration (see `load_yaml`); None for the defaults.
        overrides: see `apply_overrides`.

    Returns:
        A validated `RunConfig`.

    Raises:
        ValueError: see `validate`, `load_yaml` and `apply_overrides`.
    """
    data = {} if source is None else load_yaml(source)
    return validate(RunConfig, apply_overrides(data, overrides), where=str(source or "overrides"))
