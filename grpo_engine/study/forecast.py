"""What a run takes, before it runs: tokens, FLOPs by phase, memory, and time on a machine.

Tokens, FLOPs and memory follow from shapes and from how long prompts and answers are assumed to be (`EstimateConfig`);
they count what `grpo_engine.records.ledger` counts. Time is FLOPs over the rate that a `Machine` is assumed to reach
and, where its memory is the limit, bytes over its bandwidth. None of it reads weights or data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from grpo_engine.config import Config, ModelSource, RunConfig
from grpo_engine.micro.ladder import architecture as embedded
from grpo_engine.model.config import ModelConfig
from grpo_engine.model.flops import shape_flops
from grpo_engine.model.hf_config import read_config
from grpo_engine.model.hub import find_config
from grpo_engine.study.gpus import GPUS
from grpo_engine.train import footprint
from grpo_engine.train.footprint import BYTES, Shapes, count_params

GpuName = Literal["a100", "h100", "h200", "b200", "l40s", "l4", "mi300x"]


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
    answer_tokens: Annotated[float, Field(gt=0)] = 5.0  # an answer, mean over the run; a size may have its own
    eval_sets: Annotated[int, Field(ge=1)] = 4
    start_s: Annotated[float, Field(ge=0)] = 1.5  # until a process does its first step
    flops_per_s: Annotated[float, Field(gt=0)] = 80e9  # CPU: a process, on large matrices
    us_per_token: Annotated[float, Field(ge=0)] = 4.0  # CPU: a trained token, besides: what does not shrink with N
    gpu: GpuName | None = None  # None: the CPU at hand
    # GPU, shares of the data sheet's FLOP/s and bandwidth in training and decoding: rounded from 0.5B and 1.5B on an H200
    product_share: Annotated[float, Field(gt=0, le=1)] = 0.22
    bandwidth_share: Annotated[float, Field(gt=0, le=1)] = 0.12
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


def forecast(config: RunConfig, estimate: EstimateConfig) -> Cost:
    """What a run will take.

    Args:
        config: of the run.
        estimate: lengths and rates.

    Returns:
        The cost. Time on a CPU is that of one process of one thread. On a GPU products run at `product_share` of the
        data sheet, decoding at that or at `bandwidth_share` of the bandwidth, whichever is slower (weights and the keys
        and values of all running sequences are read for every token); `devices` is the smallest power of two that
        holds the run, and nothing is lost between them.

    Raises:
        FileNotFoundError, ValueError: see `num_params`.
    """
    work = _Work(architecture(config.model), num_params(config.model), BYTES[config.model.dtype])
    p, a = estimate.prompt_tokens, estimate.answer_tokens
    groups = config.steps * config.batch.prompts
    answers = groups * config.batch.group_size
    trained = answers * (p + a - 1)  # the last token of a sequence is not an input
    grpo = config.method == "grpo"

    seen = p * (a - 1) + a * (a - 1) / 2  # query-key pairs of an answer's inputs
    shared = work.flops(groups * p + answers * (a - 1), groups * p * (p + 1) / 2 + answers * seen, answers * a)
    plain = work.flops(trained, answers * (p * (p + 1) / 2 + seen), trained)
    forward = shared if grpo else plain  # a control's documents have no prompt in common
    asked, sampled = _evaluated(config, estimate)
    prefill = work.flops(groups * p, groups * p * (p + 1) / 2, answers)
    decode = work.flops(answers * (a - 1), answers * seen, answers * (a - 1))
    evaluation = work.flops(asked * p, asked * p * (p + 1) / 2, sampled)
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
    total = sum(phases.values())
    if estimate.gpu is None:
        # an evaluation has no backward pass
        passed = answers * (p + a) + sampled * (p + a) / 3
        seconds = estimate.start_s + total / estimate.flops_per_s + estimate.us_per_token * 1e-6 * passed
    else:
        gpu = GPUS[estimate.gpu]
        rate = gpu.peak(config.model.dtype) * estimate.product_share
        written = (answers if grpo else 0) * a + sampled * a
        running = min(config.rollout.max_running, config.batch.prompts * config.batch.group_size)
        read = written * (work.weight_bytes / running + (p + a / 2) * work.kv_bytes)
        drawn = phases["decode"] + evaluation
        drawing = max(drawn / rate, read / (gpu.bandwidth * estimate.bandwidth_share))
        seconds = estimate.start_s + (total - drawn) / rate + drawing
    cost = Cost(trained_tokens=trained, flops=total, seconds=seconds, phases=phases, memory=held,
                usd=dollars(seconds, estimate))  # fmt: skip
    devices = 1
    while estimate.gpu and cost.peak_bytes > devices * footprint.ROOM * GPUS[estimate.gpu].memory:
        devices *= 2
    return replace(cost, devices=devices)


def gpu_here() -> str:
    """The key in `GPUS` of this machine's first GPU.

    Raises:
        ValueError: no GPU, or one that is not listed.
    """
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    for gpu in GPUS:
        if name is not None and gpu in name.lower().replace(" ", ""):
            return gpu
    raise ValueError(f"the GPU here must be one of {', '.join(GPUS)}, got {name or 'none'}")


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
    asked = (count + (estimate.eval_sets - 1) * others) * (config.task.eval_problems or 500)
    greedy = 1 if config.evaluation.greedy else 0
    return asked * (1.0 + greedy), asked * (config.evaluation.samples + greedy)
