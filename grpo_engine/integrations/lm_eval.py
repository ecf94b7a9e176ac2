"""Our rollout and our log-probs under EleutherAI's lm-evaluation-harness.

    python -m grpo_engine.integrations.lm_eval run --model grpo_engine --model_args pretrained=FOLDER --tasks gsm8k

takes lm_eval's own command line; in Python, importing this module registers the model "grpo_engine". Requests are answered
in one rollout, so that the batch stays full; choices of one question share its computation; nothing is padded, and no
score or text depends on what else is asked.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from grpo_engine import ops
from grpo_engine.config import RolloutConfig
from grpo_engine.load import DTYPES
from grpo_engine.model import hub, weights
from grpo_engine.model.decoder import Packed
from grpo_engine.model.tokenizer import HFTokenizer
from grpo_engine.rollout.engine import Engine, SamplingRequest, derive_seeds
from grpo_engine.system import device as devices

HEAD_ROWS = 256  # rows whose logits exist at once
FIRST_TOKENS = 32  # of a response before it is looked at for stop strings; twice as many each further time
SAMPLING = {"do_sample", "temperature", "until", "max_gen_toks", "top_p", "top_k", "min_p"}

Request = tuple[Any, list[int], list[int]]  # (texts, context, continuation)


@register_model("grpo_engine")
class GrpoEngineLM(TemplateLM):
    """A checkpoint of a family that `weights.load_model` reads.

    Args:
        pretrained: folder with config.json, safetensors and tokenizer.json, or a name on the hub.
        dtype: "float32" or "bfloat16".
        device: "auto" (also None and "cuda:0", which lm_eval gives when nothing is said), "cpu" or "cuda".
        max_gen_toks: tokens of a response whose task names no limit.
        seed: of sampled responses; response i of a call has its own.
        max_running: sequences decoded at once.
        max_step_tokens: tokens of a forward pass.
        batch_size, max_batch_size: of lm_eval's command line; not used.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "float32",
        device: str | None = "auto",
        max_gen_toks: int = 256,
        seed: int = 0,
        max_running: int = 512,
        max_step_tokens: int = 8192,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"grpo_engine: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        device = "auto" if device in (None, "cuda:0") else device
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"grpo_engine: device must be auto, cpu or cuda, got {device!r}")
        self._device = torch.device(devices.resolve(device))
        if self._device.type == "cuda":
            devices.require_capability()
        folder = hub.find_model(pretrained).folder
        self.pretrained, self.max_gen_toks, self.seed = pretrained, int(max_gen_toks), int(seed)
        self.text = HFTokenizer(folder)
        self.tokenizer = self.text.templates  # of TemplateLM, for chat templates
        self.engine = Engine(weights.load_model(folder, dtype=DTYPES[dtype], device=self._device.type))
        self.limits = {"max_running": int(max_running), "max_step_tokens": int(max_step_tokens)}

    # ------------------------------------------------------------------ text

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.engine.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, with what tokenizer.json puts around it unless that is there or unwanted."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        return self.text.encode_prompt(string, chat=False) if add_special_tokens else self.text.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    # ------------------------------------------------------------------ responses

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The response to each (context, settings), cut before the first of its stop strings.

        A context that leaves no room for the response loses its first tokens, as everywhere in lm_eval.

        Raises:
            ValueError: a setting that the rollout does not know (it is named), or no room for any context.
        """
        settings = [self._settings(request.args[1]) for request in requests]
        prompts = [
            self.tok_encode(request.args[0])[-(self.max_length - s["max_gen_toks"]) :]
            for request, s in zip(requests, settings, strict=True)
        ]
        seeds = derive_seeds(self.seed, count=len(requests))
        responses: list[list[int]] = [[] for _ in requests]
        texts = [""] * len(requests)
        waiting, tokens = list(range(len(requests))), FIRST_TOKENS
        while waiting:
            # a response depends on prompt, seed and position alone: gone on with later, it is what it would have been
            unfinished = []
            for i, response, stopped in self._go_on(waiting, prompts, responses, settings, seeds, tokens):
                responses[i] += response
                ids = responses[i][:-1] if stopped else responses[i]
                text = self.text.decode(ids)
                texts[i] = postprocess_generated_text(text, settings[i]["until"], None)
                if stopped or texts[i] != text or len(responses[i]) == settings[i]["max_gen_toks"]:
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                else:
                    unfinished.append(i)
            waiting, tokens = unfinished, 2 * tokens
        return texts

    def _settings(self, asked: dict[str, Any]) -> dict[str, Any]:
        s = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        if unknown := sorted(s.keys() - SAMPLING):
            raise ValueError(
                f"grpo_engine: unknown generation settings {', '.join(unknown)}; known: {', '.join(sorted(SAMPLING))}"
            )
        if not 0 < s["max_gen_toks"] < self.max_length:
            raise ValueError(
                f"grpo_engine: max_gen_toks={s['max_gen_toks']} must be positive and leave room in the model's "
                f"{self.max_length} positions"
            )
        s.setdefault("temperature", 0.0)
        s["until"] = [text for text in s["until"] if text]
        return s

    def _go_on(
        self, waiting: Sequence[int], prompts: Sequence[list[int]], responses: Sequence[list[int]],
        settings: Sequence[dict[str, Any]], seeds: torch.Tensor, tokens: int,
    ) -> Iterator[tuple[int, list[int], bool]]:  # fmt: skip
        """Up to `tokens` further tokens of each response that waits: (which, tokens, whether it stopped)."""
        filters = functools.partial(_filters, settings)
        for filter_key, alike in _grouped(waiting, filters).items():
            config = RolloutConfig(**self.limits, **dict(filter_key))
            parts = _grouped(
                alike, lambda i: (settings[i]["temperature"], min(tokens, settings[i]["max_gen_toks"] - len(responses[i])))
            )
            requests = [
                SamplingRequest(
                    prompts=[prompts[i] + responses[i] for i in part], group_size=1, seeds=seeds[part],
                    temperature=temperature, max_new_tokens=new,
                )
                for (temperature, new), part in parts.items()
            ]  # fmt: skip
            rollouts = self.engine.stream(requests, stop_ids=self.text.stop_ids, config=config).run()
            for part, rollout in zip(parts.values(), rollouts, strict=True):
                for i, response, finish in zip(part, rollout.responses(), rollout.finish, strict=True):
                    yield i, response, finish == "stop"

    # ------------------------------------------------------------------ log-likelihoods

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the model's length."""
        windows = [
            [
                (None, *utils.make_disjoint_window(window))
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length, context_len=1,
                )
            ]
            for request in requests
        ]  # fmt: skip
        scores = iter(self._loglikelihood_tokens(list(itertools.chain(*windows))))
        totals = [sum(score for score, _ in itertools.islice(scores, len(part))) for part in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the greedy one) of each request."""
        cut = []  # what does not fit is lost on the left
        for text, context, continuation in requests:
            if not (context and 0 < len(continuation) <= self.max_length):
                raise ValueError(
                    f"grpo_engine: wanted a context and a continuation of 1 to {self.max_length} tokens, "
                    f"got {len(context)} and {len(continuation)}: {text!r:.200}"
                )
            lost = max(0, len(context) + len(continuation) - self.max_length - 1)
            cut.append((tuple(context[lost:]), continuation))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for part in self._passes(cut):
            for i, result in zip(part, self._score([cut[i] for i in part]), strict=True):
                results[i] = result
                if requests[i][0] is not None:  # a window of a rolling text has none
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
        return results

    def _passes(self, requests: Sequence[tuple[tuple[int, ...], list[int]]]) -> Iterator[list[int]]:
        """Requests in forward passes of about max_step_tokens, those of one context side by side."""
        part: list[int] = []
        used = 0
        for context, alike in _grouped(range(len(requests)), lambda i: requests[i][0]).items():
            for n, i in enumerate(alike):
                cost = len(requests[i][1]) + (len(context) if n == 0 else 0)
                if part and used + cost > self.limits["max_step_tokens"]:
                    yield part
                    part, used = [], len(context)
                part.append(i)
                used += cost
        if part:
            yield part

    @torch.inference_mode()
    def _score(self, requests: Sequence[tuple[tuple[int, ...], list[int]]]) -> list[tuple[float, bool]]:
        """One forward pass. A context is a segment, and what each continuation adds to it is another that sees it."""
        tokens: list[int] = []
        positions: list[int] = []
        starts, groups, rows, target = [0], [0], [], []
        for context, alike in itertools.groupby(requests, key=lambda request: request[0]):
            tokens += context
            positions += range(len(context))
            starts.append(len(tokens))
            last = len(tokens) - 1
            for _, continuation in alike:
                rows += [last, *range(len(tokens), len(tokens) + len(continuation) - 1)]
                target += continuation
                tokens += continuation[:-1]  # the last token is no input
                positions += range(len(context), len(context) + len(continuation) - 1)
                starts.append(len(tokens))
            groups.append(len(starts) - 1)
        model = self.engine.model
        to_device = functools.partial(torch.tensor, device=self._device)
        packed = Packed(to_device(starts, dtype=torch.int32), to_device(groups, dtype=torch.int32))
        hidden = model(to_device(tokens), to_device(positions), packed)[to_device(rows)]
        logprobs, greedy = [], []
        for some, wanted in zip(hidden.split(HEAD_ROWS), to_device(target).split(HEAD_ROWS), strict=True):
            logits = ops.linear(some, model.head_weight, out_dtype=torch.float32, batch_invariant=model.batch_invariant)
            logprobs.append(ops.gather_logprob(logits, wanted)[0])
            greedy.append(logits.argmax(dim=-1) == wanted)
        lengths = [len(continuation) for _, continuation in requests]
        pairs = zip(torch.cat(logprobs).cpu().split(lengths), torch.cat(greedy).cpu().split(lengths), strict=True)
        return [(float(score.double().sum()), bool(same.all())) for score, same in pairs]


def _filters(settings: Sequence[dict[str, Any]], i: int) -> tuple[tuple[str, Any], ...]:
    """The filters of a request as `RolloutConfig` has them; what is off is left out."""
    s = settings[i]
    off = {"top_k": (None, 0), "top_p": (None, 1, 1.0), "min_p": (None, 0, 0.0)}
    return tuple((name, s[name]) for name, values in off.items() if s.get(name) not in values)


def _grouped(items: Iterable[int], key: Any) -> dict[Any, list[int]]:
    """The items of each key, keys in the order of their first item."""
    groups: dict[Any, list[int]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
