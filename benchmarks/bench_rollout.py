"""Rollout beside transformers' generate and llama.cpp: the embedded ladder, random SmolLM2-135M and Qwen2.5-0.5B."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.lengths import answer_lengths  # noqa: E402
from benchmarks.shapes import (  # noqa: E402
    LADDER,
    REAL,
    equal_lengths,
    ladder_config,
    log_normal_lengths,
    qwen_config,
    random_model,
)
from benchmarks.table import OURS, Case, Later, Missing, WrongAnswer, main, same_bits  # noqa: E402
from grpo_engine.config import RolloutConfig  # noqa: E402
from grpo_engine.model.decoder import Model  # noqa: E402
from grpo_engine.model.flops import causal_pairs, forward_flops  # noqa: E402
from grpo_engine.rollout.engine import Engine, derive_seeds  # noqa: E402
from grpo_engine.system.memory import keep_freed_memory  # noqa: E402

PROMPT, NEW = 8, 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of log-probs, in nats; bfloat16 rounds through 24 layers or 30
REAL_PROMPT, REAL_NEW = 32, {"135M": 48, "0.5B": 32}  # tokens


class Rollout:
    """Answers to P prompts, G each; the answers of a group are equally long."""

    def __init__(self, model, prompts, group_size, lengths):
        self.model, self.prompts, self.G, self.lengths = model, prompts, group_size, lengths
        self.seeds = derive_seeds(7, count=len(prompts) * group_size)
        self.config = RolloutConfig(max_new_tokens=max(lengths))
        # an engine keeps its pages and graphs from one rollout to the next, as a run's does
        self.generate = Engine(model).generate

    def run(self, count=None):
        """A `RolloutBatch` of the first `count` prompts, or of all."""
        prompts = self.prompts[:count].tolist()
        with answer_lengths(self.lengths):
            seeds = self.seeds[: len(prompts) * self.G]
            return self.generate(prompts, group_size=self.G, seeds=seeds, stop_ids=(), config=self.config)

    def tensors(self, count=None):
        out = self.run(count)
        return [out.tokens, out.logprob, out.entropy]

    def first_logprobs(self, tokens):
        """[P, K] log-probs of some tokens [P, K] as the first of an answer."""
        P, n = self.prompts.shape
        cu = torch.arange(P + 1, dtype=torch.int32, device=self.prompts.device) * n
        rows = (cu[1:].long() - 1).repeat_interleave(tokens.shape[1])
        with torch.inference_mode():
            return self.model.logprobs(self.prompts.flatten(), cu, rows=rows, target=tokens.flatten())[0].view_as(tokens)

    def flops(self):
        """Of what must be computed: each prompt once, each response token but the last."""
        P, G, n = len(self.prompts), self.G, self.prompts.shape[1]
        fed = [length - 1 for length in self.lengths]
        pairs = P * causal_pairs(n) + G * sum(causal_pairs(n + k) - causal_pairs(n) for k in fed)
        return forward_flops(self.model, tokens=P * n + G * sum(fed), pairs=pairs, head_rows=G * sum(self.lengths))


def case(name, model, *, prompts, group_size, lengths, others, prompt_tokens=PROMPT, heavy=False):
    """`others`: peers by name, made of (rows of prompts, length of each row)."""
    prompt = torch.randint(model.config.vocab_size, (prompts, prompt_tokens))
    mine = Rollout(model, prompt, group_size, lengths)
    rows = [n for n in lengths for _ in range(group_size)]
    made = {key: make(prompt.repeat_interleave(group_size, dim=0), rows) for key, make in others.items()}

    def check(who, result):
        if who == OURS:
            inputs = result.cu_seqlens[1:] - result.cu_seqlens[:-1]
            if (inputs - prompt_tokens).tolist() != rows:
                raise WrongAnswer("answers are not as long as asked")
            return
        if result.shape != (len(rows), max(rows)):
            raise WrongAnswer(f"answers of shape {list(result.shape)}, wanted {[len(rows), max(rows)]}")
        some = torch.randint(model.config.vocab_size, (prompts, 64), device=prompt.device)
        theirs = torch.log_softmax(made[who].last_logits()[::group_size], dim=-1).gather(1, some)
        error = float((theirs - mine.first_logprobs(some)).abs().max())
        if not error <= TOLERANCE[model.dtype]:
            raise WrongAnswer(f"its log-probs differ from ours by {error:.3g}, allowed {TOLERANCE[model.dtype]}")

    def alone(result):
        n = int(result.cu_seqlens[group_size])
        return same_bits(mine.tensors(1), [x[:n] for x in (result.tokens, result.logprob, result.entropy)])

    return Case(
        name=name,
        ours=mine.run,
        peers={key: getattr(peer, "generate", peer) for key, peer in made.items()},
        tolerance=TOLERANCE[model.dtype],
        check=check,
        bits=lambda: mine.tensors(2),
        alone=alone if prompts > 1 else None,
        heavy=heavy,
        flops=mine.flops(),
        products=model.dtype,
        nbytes=max(rows) * sum(p.numel() * p.element_size() for p in model.parameters()),  # weights, once a step
        derived={
            "tokens/s": lambda seconds: sum(rows) / seconds,
            "ms a decode step": lambda seconds: 1e3 * seconds / max(rows),
        },
    )


def transformers_peer(model, dtype=None):
    """Of a dtype of its own, or of the model's."""

    def make(prompts, rows):
        return peers.optional("transformers", lambda: peers.TransformersGeneration(model, prompts, rows, dtype=dtype))

    return make


def llama_cpp_peer(model):
    return lambda prompts, rows: peers.optional("llama_cpp", lambda: peers.LlamaCpp(model, prompts, rows))


def real_case(name, size, *, prompts, group_size, new, llama_cpp):
    """bfloat16 weights; transformers in float32 too, because a CPU may have no bfloat16 products."""
    model = random_model(REAL[size](), torch.bfloat16).requires_grad_(False)
    others = {"transformers, float32": transformers_peer(model, torch.float32)}
    if peers.native_bfloat16():
        others["transformers"] = transformers_peer(model)
    else:
        others["transformers"] = lambda prompts, rows: Missing(why=peers.NO_BFLOAT16)
    if llama_cpp:
        others["llama.cpp"] = llama_cpp_peer(model)
    return case(
        name, model, prompts=prompts, group_size=group_size, lengths=equal_lengths(prompts, new), others=others,
        prompt_tokens=REAL_PROMPT, heavy=True,
    )  # fmt: skip


def real(quick):
    keep_freed_memory()
    for size in ("135M",) if quick else REAL:
        new = 4 if quick else REAL_NEW[size]
        for prompts, group_size in ((2, 2), (1, 1)) if quick else ((8, 8), (32, 1), (1, 1)):
            name = f"{size} bfloat16, {prompts} x {group_size} answers of {new}, {REAL_PROMPT} of prompt"
            yield Later(name=name, make=partial(real_case, name, size, prompts=prompts, group_size=group_size, new=new,
                                                llama_cpp=group_size == 1))  # fmt: skip


def cases(quick):
    keep_freed_memory()  # as a run does; the peers of this process have it too
    for size in ("0.2M",) if quick else LADDER:
        model = Model(ladder_config(size)).init_weights(1, std=None)
        for kind, draw in (("equal", equal_lengths), ("log-normal", log_normal_lengths)):
            lengths = draw(32, NEW)
            yield case(
                f"{size}, batch 256, {kind} lengths (longest {max(lengths)})", model, prompts=32, group_size=8,
                lengths=lengths, others={"transformers": transformers_peer(model)},
            )  # fmt: skip


def qwen(size, *, prompts, group_size, prompt_tokens, lengths, peer):
    model = random_model(qwen_config(size), torch.bfloat16)
    longest = f"longest {max(lengths)}, {prompt_tokens} of prompt"
    return case(
        f"{size} bfloat16, {prompts} x {group_size} answers ({longest})", model, prompts=prompts, group_size=group_size,
        lengths=lengths, prompt_tokens=prompt_tokens, others={"transformers": transformers_peer(model)} if peer else {},
    )  # fmt: skip


def cuda(quick):
    new = 64 if quick else 256
    yield partial(qwen, "0.5B", prompts=16, group_size=16, prompt_tokens=256, lengths=equal_lengths(16, new), peer=True)
    yield partial(qwen, "0.5B", prompts=16, group_size=16, prompt_tokens=256,
                  lengths=log_normal_lengths(16, new, longest=4), peer=False)  # fmt: skip
    yield partial(qwen, "1.5B", prompts=16, group_size=16, prompt_tokens=256, lengths=equal_lengths(16, new), peer=False)


if __name__ == "__main__":
    note = "A decode step is the rollout's time over its longest answer, prefill included."
    main("rollout", cases, real=real, cuda=cuda, whole=True, unit="ms", note=note)
