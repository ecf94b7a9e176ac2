"""TRL's GRPOTrainer with our log-probs and our policy loss, and the same results.

    from grpo_engine.integrations.trl import GRPOTrainer  # in place of: from trl import GRPOTrainer

The model stays transformers'. Its head gives `ops.token_logprob` of the completion tokens alone, and the loss is
`ops.policy_loss`; sampling, rewards, advantages, optimizer and what is logged are TRL's. An option that the ops cannot
express is refused when the trainer is made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from grpo_engine import ops

TRL = "1.16"  # its trainer's private methods are overridden, so another version is another program

LOSSES: dict[str, dict[str, Any]] = {  # what a loss_type is to `ops.policy_loss`
    "grpo": {"aggregation": "sequence_mean"},
    "bnpo": {"aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "constant"},  # constant_length: max_completion_length
    "dapo": {"aggregation": "token_mean", "num_tokens": 1},  # a sum: TRL gives the tokens of the step
    "cispo": {"aggregation": "token_mean", "num_tokens": 1, "objective": "cispo"},
    "luspo": {"aggregation": "constant", "constant_length": 1},
}
OF_THE_STEP = ("dapo", "cispo")  # divided by the tokens of the optimizer step, the others by its micro-batches


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's `GRPOTrainer`; takes its arguments, all but the first three by name.

    Loss, gradients and logged values are TRL's to float32's rounding, as long as no log-ratio of two policies exceeds 20,
    where `ops.policy_loss` has a limit and TRL has none.

    Raises:
        RuntimeError: another version of TRL than `TRL`.
        ValueError: an option or a model that the ops cannot express; each is named, with what is supported.
    """

    _known: tuple[Tensor, Tensor, None] | None = None  # log-probs and entropies of the batch that TRL is to log

    def __init__(
        self, model: str | PreTrainedModel, reward_funcs: Any = None, args: trl.GRPOConfig | None = None, **more: Any
    ):
        if version("trl").split(".")[:2] != TRL.split("."):
            raise RuntimeError(f"grpo_engine's GRPOTrainer is made for TRL {TRL}, got {version('trl')}")
        _refuse(_unsupported_options(args) if args is not None else ())  # before a model is loaded; the defaults are fine
        super().__init__(model, reward_funcs, args, **more)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            _refuse(["deepspeed, fsdp: supported is a head whose weight is whole in every process"])
        if self.aux_loss_enabled:
            _refuse(["router_aux_loss_coef (of a mixture of experts): supported is 0"])
        _refuse(_unsupported_model(self.model))
        for m in (self.model, self.ref_model):
            if m is None:
                continue
            m = _without_adapters(self.accelerator.unwrap_model(m))
            m.forward = _with_token_logprob(m, self.temperature, in_float32=self.args.cast_lm_head_to_fp32)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self._known or super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        keep = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        B, T = keep.shape
        logprob, entropy, _ = self._get_per_token_logps_and_entropies(model, ids, attention, T, compute_entropy=True)

        assert entropy is not None  # it was asked for
        self._known = logprob.detach(), entropy.detach(), None
        try:
            with torch.no_grad():
                super()._compute_loss(model, inputs)  # what it logs is wanted, of these log-probs
        finally:
            self._known = None

        def flat(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(logprob.dtype).expand(B, T).reshape(-1)

        a = self.args
        cispo = self.loss_type == "cispo"  # TRL gives its ceiling whole, and has no floor
        loss = ops.policy_loss(
            flat(logprob),
            advantage=flat(self._advantage(inputs, logprob.detach(), entropy.detach(), keep)),
            cu_seqlens=torch.arange(0, B * T + 1, T, dtype=torch.int32, device=logprob.device),
            old_logprob=flat(inputs.get("old_per_token_logps")),
            ref_logprob=flat(inputs["ref_per_token_logps"]) if self.beta else None,
            mask=keep.bool().reshape(-1),
            ratio=self.importance_sampling_level,
            clip_low=1.0 if cispo else min(self.epsilon_low, 1.0),
            clip_high=self.epsilon_high - 1.0 if cispo else self.epsilon_high,
            dual_clip=None if cispo else a.delta,
            kl_coef=self.beta,
            kl_ratio=a.use_bias_correction_kl,
            **LOSSES[self.loss_type],
            **({"constant_length": self.max_completion_length} if self.loss_type == "dr_grpo" else {}),
        ).loss
        micro_batches = self.current_gradient_accumulation_steps if self.model.training else 1
        if self.loss_type not in OF_THE_STEP:
            return loss / micro_batches
        # the tokens that TRL counts are those of a rollout of all processes
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return loss / (tokens * micro_batches / a.steps_per_generation if self.model.training else tokens)

    def _advantage(self, inputs: dict[str, Any], logprob: Tensor, entropy: Tensor, keep: Tensor) -> Tensor:
        """[B, T] or [B, 1]: of each token, times every weight >= 0 that TRL gives to its loss but not to its KL."""
        advantage = inputs["advantages"]
        advantage = weighted = advantage if advantage.dim() == 2 else advantage[:, None]
        if self.off_policy_mask_threshold is not None:
            old = inputs.get("old_per_token_logps")
            sampled = inputs.get("sampling_per_token_logps", logprob if old is None else old)
            weighted = weighted * self.get_off_policy_mask(
                advantages=advantage, per_token_logps=logprob, sampling_per_token_logps=sampled, mask=keep,
                off_policy_threshold=self.off_policy_mask_threshold,
            )  # fmt: skip
        if self.top_entropy_quantile < 1.0:
            weighted = weighted * self.get_high_entropy_mask(entropy, keep, 1 - self.top_entropy_quantile)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            weighted = weighted * inputs["importance_sampling_ratio"]
        return weighted


def _with_token_logprob(model: PreTrainedModel, temperature: float, *, in_float32: bool) -> Callable[..., Any]:
    """A model's forward as TRL has prepared it, but with our head where TRL asks for its fused one."""
    theirs = model.forward

    @functools.wraps(theirs)  # generate reads the signature
    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return theirs(*args, **kwargs)
        target = kwargs.pop("labels")[:, 1:]
        hidden = model.base_model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1]
        weight, scored = model.get_output_embeddings().weight, target != -100
        autocast = torch.is_autocast_enabled(hidden.device.type) and not in_float32
        dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else weight.dtype
        values = ops.token_logprob(hidden[scored].to(dtype), weight.to(dtype), target[scored], temperature=temperature)
        logprob, entropy = (x.new_zeros(scored.shape).masked_scatter(scored, x) for x in values)
        return FusedCausalLMOutput(log_probs=logprob, entropy=entropy, label_mask=scored)

    return forward


def _unsupported_options(a: trl.GRPOConfig) -> Iterator[str]:
    """One sentence for each option that is refused."""
    high = a.epsilon if a.epsilon_high is None else a.epsilon_high
    if a.loss_type not in LOSSES:
        yield f"loss_type={a.loss_type!r}: supported are {', '.join(LOSSES)}"
    if a.importance_sampling_level not in ("token", "sequence"):
        yield f"importance_sampling_level={a.importance_sampling_level!r}: supported are token, sequence"
    if a.loss_type == "cispo" and not 1 <= high < math.inf:
        yield f"epsilon_high={high} of loss_type='cispo', the largest ratio: supported is 1 or more"
    if a.loss_type != "cispo" and not (a.epsilon >= 0 and 0 <= high < math.inf):
        yield f"epsilon={a.epsilon}, epsilon_high={high}: supported are finite values from 0"
    if a.loss_type != "cispo" and a.delta is not None and not a.delta > 1 + high:
        yield f"delta={a.delta}: supported is more than 1 + epsilon_high = {1 + high}, or None"
    if not 0 <= a.beta < math.inf:
        yield f"beta={a.beta}: supported is a finite value from 0"
    if a.temperature <= 0:
        yield f"temperature={a.temperature}: supported is more than 0"
    if a.entropy_coef != 0 or a.use_adaptive_entropy:
        yield "entropy_coef, use_adaptive_entropy: supported is a loss without an entropy bonus"
    if a.fp16:
        yield "fp16=True: supported are float32 and bf16"


@torch.no_grad()
def _unsupported_model(model: nn.Module) -> Iterator[str]:
    """One sentence when the logits are anything but hidden states times a weight, bit for bit."""
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        yield f"{model.active_peft_config.peft_type} of peft: supported are adapters of weights, as LoRA"
        return
    model = _without_adapters(model)
    if not isinstance(model, PreTrainedModel) or model.config.get_text_config() is not model.config:
        yield f"model {type(model).__name__}: supported are transformers' language models, without images"
        return
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        yield f"the head {head}: supported is a torch.nn.Linear without bias"
    elif head.weight.dtype not in (torch.float32, torch.bfloat16):
        yield f"a head of {head.weight.dtype}: supported are float32 and bfloat16"
    else:
        training = model.training
        ids = torch.arange(1, 9, device=model.device)[None] % model.config.vocab_size
        hidden = model.eval().base_model(input_ids=ids, use_cache=False).last_hidden_state
        plain, logits = head(hidden), model(input_ids=ids, use_cache=False).logits
        model.train(training)
        if not torch.equal(plain, logits.to(plain.dtype)):
            yield (
                f"{type(model).__name__} does something to its logits (a scale, a soft cap): supported are models whose "
                "logits are the last hidden states times the head's weight"
            )


def _without_adapters(model: nn.Module) -> nn.Module:
    """The model inside peft's, whose layers call the adapters; any other as it is."""
    return model.get_base_model() if is_peft_model(model) else model


def _refuse(reasons: Iterable[str]) -> None:
    if reasons := list(reasons):
        raise ValueError("grpo_engine's GRPOTrainer cannot do what was asked: " + "; ".join(reasons))
