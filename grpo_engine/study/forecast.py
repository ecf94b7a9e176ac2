"""What a run takes, before it runs: tokens, FLOPs by phase, memory, and time on a machine.

Tokens, FLOPs and memory follow from shapes and from how long prompts and answers are assumed to be (`EstimateConfig`);
they count what `grpo_engine.records.ledger` counts. Time on a CPU is FLOPs over a rate, and a time for each token. Time
on a GPU is that of `grpo_engine.study.gpus`. None of it reads weights or data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from grpo_engine.config import Config, ModelSource, RunConfig
from grpo_engine.micro.ladder import architecture as embedded
from grpo_engine.model.config import ModelConfig
from grpo_engine.model.flops import shape_flops
from grpo_engine.model.hf_config import read_config
from grpo_engine.model.hub import find_config
from grpo_engine.study.gpus import BANDWIDTH_FRACTION, FLOPS_FRACTION, GPUS, Gpu, GpuName
from grpo_engine.train import footprint
from grpo_engine.train.footprint import BYTES, Shapes, count_params

_QWEN25 = {  # of the models' config.json: layers, width, feed-forward width, heads, key/value heads, tied head
    "0.5B": (24, 896, 4864, 14, 2, True),
    "1.5B": (28, 1536, 8960, 12, 2, True),
    "3B": (36, 2048, 11008, 16, 2, True),
    "7B": (28, 3584, 18944, 28, 4, False),
    "14B": (48, 5120, 13824, 40, 8, False),
    "32B": (64, 5120, 27648, 40, 8, False),
    "72B": (80, 8192, 29568, 64, 8, False),
}
_QWEN3 = {  # likewise; heads are 128 wide, and their q and k have norms
    "0.6B": (28, 1024, 3072, 16, 8, True),
    "1.7B": (28, 2048, 6144, 16, 8, True),
    "4B": (36, 2560, 9728, 32, 8, True),
    "8B": (36, 4096, 12288, 32, 8, False),
    "14B": (40, 5120, 17408, 40, 8, False),
    "32B": (64, 5120, 25600, 64, 8, False),
}


class EstimateConfig(Config):
    """What a plan assumes of cells that have not run (`grpo_engine.study.run.measured_plan` knows the others)."""

    prompt_tokens: Annotated[float, Field(gt=0)] = 6.0  # a prompt
    response_tokens: Annotated[float, Field(gt=0)] = 5.0  # of a response, mean over the run; a size may have its own
    eval_sets: Annotated[int, Field(ge=1)] = 4
    start_s: Annotated[float, Field(ge=0)] = 1.5  # until a process does its first step
    flops_per_s: Annotated[float, Field(gt=0)] = 80e9  # CPU: a process, on large matrices
    us_per_token: Annotated[float, Field(ge=0)] = 4.0  # CPU: a trained token, besides: what does not shrink with N
    gpu: GpuName | None = None  # None: the CPU at hand
    flops_fraction: Annotated[float, Field(gt=0, le=1)] = FLOPS_FRACTION  # GPU: of the data sheet's FLOP/s, in matmuls
    bandwidth_fraction: Annotated[float, Field(gt=0, le=1)] = BANDWIDTH_FRACTION  # GPU: of its bandwidth, in decoding
    usd_per_hour: Annotated[float, Field(ge=0)] | None = None  # of one device


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """An estimate of one run, or a measurement where `measured`."""

    trained_tokens: float  # T of 6 N T
    flops: float  # all phases
    seconds: float  # of one device: a process on the CPU, or a GPU as if it held the whole run
    measured: bool = False
    phases: Mapping[str, float] = field(default_factory=dict)  # FLOPs by phase; without "evaluation" it is the ledger's
    memory: Mapping[str, float] = field(default_factory=dict)  # bytes by what they hold
    devices: int = 1  # that the run needs to fit
    usd: float | None = None

    @property
    def peak_bytes(self) -> float:
        """The most memory at a time."""
        return footprint.peak_bytes(self.memory)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """A run, and what its plan assumes of it."""

    config: RunConfig
    estimate: EstimateConfig


def architecture(source: ModelSource) -> ModelConfig | None:
    """The sizes of a model, without its weights.

    Args:
        source: a folder or a name on the hub, or a size of the embedded ladder.

    Returns:
        What the config.json says that is there or in the hub's cache; where there is none, what is published for the
        Qwen2.5 or Qwen3 model that its name begins with ("Qwen2.5-7B-Instruct"), or None. rms_norm_eps and positions are
        then not the model's.

    Raises:
        ValueError: the ladder has no such size, or a config.json of another kind of model.
    """
    if source.path is None:
        assert source.size is not None  # ModelSource has one of the two
        return embedded(source.size)

    if folder := find_config(source.path):
        return read_config(folder)
    family, _, size = Path(source.path).name.partition("-")
    published = {"Qwen2.5": _QWEN25, "Qwen3": _QWEN3}.get(family, {})
    if (sizes := published.get(size.partition("-")[0])) is None:
        return None

    layers, width, ffn, heads, kv_heads, tied = sizes
    qwen3 = family == "Qwen3"
    return ModelConfig(
        vocab_size=151_936 if tied or qwen3 else 152_064, hidden_size=width, intermediate_size=ffn,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=128 if qwen3 else width // heads, tie_word_embeddings=tied, qkv_bias=not qwen3, qk_norm=qwen3,
    )  # fmt: skip


def num_params(source: ModelSource) -> int:
    """Non-embedding parameters of a model, without its weights.

    Args:
        source: see `architecture`.

    Returns:
        N of the scaling laws; of a model whose architecture is not known, the nominal size: enough for an estimate.

    Raises:
        FileNotFoundError: neither architecture nor nominal size is known.
        ValueError: see `architecture`.
    """
    if model := architecture(source):
        return count_params(model)[0]
    if source.params_nominal is None:
        raise FileNotFoundError(
            f"{source.path}: no config.json, the name is no Qwen2.5 or Qwen3 model's, and params_nominal is not given"
        )
    return round(source.params_nominal)


class _Work(Shapes):
    """Shapes of an architecture as FLOPs besides."""

    def flops(self, tokens: float, pairs: float, head_rows: float) -> float:
        """See `grpo_engine.model.flops.forward_flops`."""
        if self.model is None:
            return 2.0 * self.params * tokens

        return shape_flops(self.model, self.params, tokens=tokens, pairs=pairs, head_rows=head_rows)


def forecast(config: RunConfig, estimate: EstimateConfig, *, params: int | None = None) -> Cost:
    """What a run will take.

    Args:
        config: of the run.
        estimate: lengths and rates.
        params: N of a model that is not looked up, because only its size is known; None: that of `config.model`.

    Returns:
        The cost. Time on a CPU is that of one process of one thread. On a GPU it is that of `grpo_engine.study.gpus`:
        decoding reads the weights once a step, and the keys and values of all running sequences for every token.
        `devices` is the smallest power of two that holds the run, and nothing is lost between them.

    Raises:
        FileNotFoundError, ValueError: see `num_params`.
    """
    element = BYTES[config.model.dtype]
    if params is None:
        work = _Work(architecture(config.model), num_params(config.model), element)
    else:
        work = _Work(None, params, element)
    p, a = estimate.prompt_tokens, estimate.response_tokens
    groups = config.steps * config.batch.prompts
    answers = groups * config.batch.group_size
    trained = answers * (p + a - 1)  # the last token of a sequence is not an input
    grpo = config.method == "grpo"

    seen = p * (a - 1) + a * (a - 1) / 2  # query-key pairs of an answer's inputs
    shared = work.flops(groups * p + answers * (a - 1), groups * p * (p + 1) / 2 + answers * seen, answers * a)
    plain = work.flops(trained, answers * (p * (p + 1) / 2 + seen), trained)
    forward = shared if grpo else plain  # a control's documents have no prompt in common
    prompts, sampled = _evaluated(config, estimate)
    prefill = work.flops(groups * p, groups * p * (p + 1) / 2, answers)
    decode = work.flops(answers * (a - 1), answers * seen, answers * (a - 1))
    evaluation = work.flops(prompts * p, prompts * p * (p + 1) / 2, sampled)
    evaluation += work.flops(sampled * (a - 1), sampled * seen, sampled * (a - 1))
    phases = {
        "prefill": prefill if grpo else 0.0,
        "decode": decode if grpo else 0.0,
        "reference": forward if grpo and config.loss.kl_coef > 0 else 0.0,
        "forward": forward,
        "backward": 2 * forward,
        "evaluation": evaluation,
    }
    held = footprint.memory(config, work, p, a)
    peak = footprint.peak_bytes(held)
    if estimate.gpu is None:
        # an evaluation has no backward pass
        passed = answers * (p + a) + sampled * (p + a) / 3
        seconds = estimate.start_s + sum(phases.values()) / estimate.flops_per_s + estimate.us_per_token * 1e-6 * passed
        devices = 1
    else:
        written = {"decode": answers * a if grpo else 0.0, "evaluation": sampled * a}
        gpu = GPUS[estimate.gpu]
        seconds = estimate.start_s + _gpu_seconds(gpu, config, estimate, work, phases, written)
        devices = gpu.devices(peak)
    return Cost(trained_tokens=trained, flops=sum(phases.values()), seconds=seconds, phases=phases, memory=held,
                devices=devices, usd=dollars(seconds, estimate))  # fmt: skip


def _gpu_seconds(
    gpu: Gpu, config: RunConfig, estimate: EstimateConfig, work: _Work, phases: Mapping[str, float],
    written: Mapping[str, float],
) -> float:  # fmt: skip
    """Time of all phases on one GPU; `written` are the tokens that are sampled, by phase."""
    dtype, shares = config.model.dtype, {"flops_fraction": estimate.flops_fraction}
    running = min(config.rollout.max_running, config.batch.prompts * config.batch.group_size)
    context = estimate.prompt_tokens + estimate.response_tokens / 2
    read_per_token = work.weight_bytes / running + context * work.kv_bytes
    learning = sum(flops for name, flops in phases.items() if name not in written)
    return gpu.learning_seconds(learning, dtype=dtype, **shares) + sum(
        gpu.sampling_seconds(phases[name], tokens * read_per_token, dtype=dtype,
                             bandwidth_fraction=estimate.bandwidth_fraction, **shares)
        for name, tokens in written.items()
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How long a run takes on one device as it is made longer or shorter, and what it holds."""

    fixed_seconds: float  # start and evaluations, whose number does not depend on the length
    seconds_per_flop: float  # of 6 N T
    peak_bytes: float

    def seconds(self, compute: float) -> float:
        """Of one device, for 6 N T FLOPs."""
        return self.fixed_seconds + self.seconds_per_flop * compute

    def compute(self, seconds: float) -> float:
        """6 N T FLOPs that so many seconds of one device buy; not positive where they are over before the first step."""
        return (seconds - self.fixed_seconds) / self.seconds_per_flop


def pace(config: RunConfig, estimate: EstimateConfig, *, params: int | None = None) -> Pace:
    """`forecast` for every length of a run.

    Args:
        config: of the run; its steps do not matter.
        estimate: see `forecast`.
        params: see `forecast`.

    Returns:
        The pace: `forecast` is linear in the number of steps.

    Raises:
        FileNotFoundError, ValueError: see `forecast`.
    """
    short, long = (
        forecast(config.model_copy(update={"steps": n}), estimate, params=params) for n in (config.steps, 2 * config.steps)
    )
    n = num_params(config.model) if params is None else params
    step_seconds = long.seconds - short.seconds
    compute = 6.0 * n * (long.trained_tokens - short.trained_tokens)
    return Pace(
        fixed_seconds=short.seconds - step_seconds, seconds_per_flop=step_seconds / compute, peak_bytes=short.peak_bytes
    )


def pretraining(params: int, tokens: float, estimate: EstimateConfig) -> Cost:
    """What making a model of the embedded ladder takes, always on the CPU: 6 N T."""
    flops = 6.0 * params * tokens
    seconds = estimate.start_s + flops / estimate.flops_per_s + estimate.us_per_token * 1e-6 * tokens
    phases = {"forward": flops / 3, "backward": flops * 2 / 3}
    return Cost(trained_tokens=tokens, flops=flops, seconds=seconds, phases=phases)


def dollars(seconds: float, estimate: EstimateConfig) -> float | None:
    """The price of so many device seconds; None where none was given."""
    return None if estimate.usd_per_hour is None else estimate.usd_per_hour * seconds / 3600


def _evaluated(config: RunConfig, estimate: EstimateConfig) -> tuple[float, float]:
    """(prompts, answers) of all evaluations of a run."""
    count = config.evaluation.count
    others = -(-count // config.evaluation.others_every)
    problems = (count + (estimate.eval_sets - 1) * others) * (config.task.eval_problems or 500)
    greedy = 1 if config.evaluation.greedy else 0
    return problems * (1.0 + greedy), problems * (config.evaluation.samples + greedy)
